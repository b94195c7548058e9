"""One step that is asked for by itself: its batch, and whether a server makes such a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stepcal.errors import InputError, shown
from stepcal.simulator import ServerConfig, StepBatch
from stepcal.simulator.layout import Int32Array


def batch_of(
    decode_kv_lens: Sequence[int],
    prefill_chunk_tokens: Sequence[int],
    prefill_kv_lens: Sequence[int] | None,
    waiting: int,
) -> StepBatch:
    """Build the batch of a step; see `stepcal.step_time.coefficients.StepTimeModel.predict_us`.

    Raises
    ------
    InputError
        If a length is no positive whole number, or a prefilling request has no context for its chunk.
    """
    contexts = prefill_chunk_tokens if prefill_kv_lens is None else prefill_kv_lens
    decode = _whole(decode_kv_lens, "decode_kv_lens")
    chunks, kv = _whole(prefill_chunk_tokens, "prefill_chunk_tokens"), _whole(contexts, "prefill_kv_lens")
    if chunks.shape != kv.shape or min([1, *decode, *chunks]) < 1 or (kv < chunks).any() or waiting < 0:
        raise InputError(
            f"`decode_kv_lens` {shown(decode.tolist())}, `prefill_chunk_tokens` {shown(chunks.tolist())}, "
            f"`prefill_kv_lens` {shown(kv.tolist())}, `waiting` {waiting}: lengths are at least 1, a context holds its "
            "chunk, and every prefilling request has both."
        )
    return StepBatch(chunks, kv, decode, waiting)


def wide_server(batch: StepBatch) -> ServerConfig:
    """Return a server with the usual limits, or wider ones where a step needs them."""
    usual = ServerConfig(kv_blocks=2)
    return replace(
        usual,
        max_num_seqs=max(batch.requests, usual.max_num_seqs),
        max_num_batched_tokens=max(batch.prefill_tokens + batch.decode_tokens, usual.max_num_batched_tokens),
        max_model_len=max(usual.max_model_len, *batch.decode_kv_lens.tolist(), *batch.prefill_kv_lens.tolist()),
    )


def check_within_limits(batch: StepBatch, limits: ServerConfig) -> None:
    """Check that a server makes such a step.

    Raises
    ------
    InputError
        If it has more requests or tokens than a step of the server can hold, or a context beyond its limit.
    """
    contexts = [*batch.decode_kv_lens.tolist(), *batch.prefill_kv_lens.tolist()]
    for what, value, name in (
        ("requests", batch.requests, "max_num_seqs"),
        ("tokens", batch.prefill_tokens + batch.decode_tokens, "max_num_batched_tokens"),
        ("tokens of one context", max(contexts, default=0), "max_model_len"),
    ):
        most = getattr(limits, name)
        if value > most:
            raise InputError(
                f"The step has {value:,} {what}, and the server's `{name}` is {most:,}, so it never makes it. Ask for a "
                f"smaller step, or raise `{name}`."
            )


def _whole(values: Sequence[int], name: str) -> Int32Array:
    try:
        given = np.asarray(values)
        is_whole = given.dtype.kind in "iu" and given.ndim == 1
        if given.size and not (is_whole and np.abs(given).max() <= np.iinfo(np.int32).max):
            raise ValueError("not a list of whole numbers")
        return given.astype(np.int32)
    except (TypeError, ValueError):
        raise InputError(f"`{name}` is {shown(values)}; it must be a list of whole numbers of tokens.") from None
