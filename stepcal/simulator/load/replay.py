"""Replay of a measured request trace: real arrivals, the workload's prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stepcal.errors import InputError
from stepcal.simulator.layout import Int32Array
from stepcal.simulator.load.shared_prefix import Workload
from stepcal.simulator.load.workload import RequestList
from stepcal.units import US_PER_S

if TYPE_CHECKING:
    import pandas as pd

REQUIRED_COLUMNS = ("index", "arrival_time_us", "prompt_tokens", "output_tokens")


def replay_requests(table: pd.DataFrame, workload: Workload | None = None) -> RequestList:
    """Requests of one experiment as they really arrived.

    With a workload, request ``i`` has the text of its prompt ``i % n_prompts`` (the generator cycles through them)
    and generates exactly `output_len` tokens, because `ignore_eos` was on; the measured output lengths are of
    re-tokenised text. Failed rows have no lengths: they take those of their prompt, as measured on other requests or,
    if all of them failed, as the workload says. Without a workload, the lengths are those of the table, and every
    prompt is its own text.

    Parameters
    ----------
    table : DataFrame
        Columns `index`, `arrival_time_us`, `prompt_tokens`, `output_tokens`, and optionally `has_error` and `priority`;
        sorted by arrival, one experiment.
    workload : Workload, optional

    Returns
    -------
    RequestList

    Raises
    ------
    InputError
        If a column is missing, the trace is not sorted or an index occurs twice, a request that did not fail has no
        length, or one failed and there is no workload to take its length from.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in table.columns]
    if missing:
        raise InputError(
            f"The request table lacks {', '.join(f'`{name}`' for name in missing)}; it has {', '.join(table.columns)}."
        )
    if "experiment_id" in table.columns and table["experiment_id"].nunique() > 1:
        raise InputError("The request table holds several experiments; filter it to one `experiment_id`.")
    index = table["index"].to_numpy(np.int64)
    arrival_s = table["arrival_time_us"].to_numpy(np.float64) / US_PER_S
    has_error = table["has_error"].to_numpy(bool) if "has_error" in table.columns else np.zeros(index.size, bool)
    prompt_tokens = table["prompt_tokens"].to_numpy(np.int32)
    has_no_length = (prompt_tokens < 1) & ~has_error
    if has_no_length.any():
        i = int(np.argmax(has_no_length))
        raise InputError(
            f"`prompt_tokens` of request {index[i]} is {prompt_tokens[i]}, though it did not fail; "
            "lengths must be at least 1 token."
        )
    if workload is None:
        return _own_texts(table, index, arrival_s, prompt_tokens, has_error)
    number = index % workload.n_prompts
    lengths = np.where(has_error, _typical_length(number, prompt_tokens, has_error, workload), prompt_tokens)
    # One prompt for each text and length that occurs.
    longest = int(lengths.max(initial=0)) + 1
    keys, prompt = np.unique(number * longest + lengths, return_inverse=True)
    start, content, tokens = workload.segments(keys // longest, keys % longest)
    bounds = np.cumsum([stage.n_requests for stage in workload.stages])
    rank = np.arange(index.size)
    return RequestList(
        arrival_s=arrival_s,
        prompt=prompt.reshape(-1).astype(np.int32),
        prompt_start=start,
        segment_content=content,
        segment_tokens=tokens,
        output_tokens=np.full(index.size, workload.output_len, np.int32),
        priority=workload.priority_of(number) if "priority" not in table.columns else _priority(table),
        stage=np.minimum(np.searchsorted(bounds, rank, side="right"), bounds.size - 1).astype(np.int32),
        index=index,
    )


def _priority(table: pd.DataFrame) -> Int32Array | None:
    return table["priority"].to_numpy(np.int32) if "priority" in table.columns else None


def _typical_length(
    number: np.ndarray, prompt_tokens: Int32Array, has_error: np.ndarray, workload: Workload
) -> Int32Array:
    """Median measured length of each request's prompt, shape (n,)."""
    import pandas as pd

    medians = pd.Series(prompt_tokens[~has_error]).groupby(number[~has_error]).median()
    table = np.full(workload.n_prompts, workload.prompt_len, np.float64)
    table[medians.index.to_numpy()] = medians.to_numpy()
    return table.astype(np.int32)[number]


def _own_texts(
    table: pd.DataFrame, index: np.ndarray, arrival_s: np.ndarray, prompt_tokens: Int32Array, has_error: np.ndarray
) -> RequestList:
    if has_error.any():
        raise InputError(
            f"Request {index[np.argmax(has_error)]} failed, so its lengths are unknown. "
            "Give the workload it came from, or drop it."
        )
    n = index.size
    return RequestList(
        arrival_s=arrival_s,
        prompt=np.arange(n, dtype=np.int32),
        prompt_start=np.arange(n + 1),
        segment_content=np.arange(n),
        segment_tokens=prompt_tokens.astype(np.int64),
        output_tokens=table["output_tokens"].to_numpy(np.int32),
        index=index,
        priority=_priority(table),
    )


def replay_trace(table: pd.DataFrame, *, block_tokens: int = 512) -> RequestList:
    """Requests of a trace that has arrivals and lengths only, such as a public one.

    Parameters
    ----------
    table : DataFrame
        Columns `index`, `arrival_time_us`, `prompt_tokens`, `output_tokens` and optionally `priority`, sorted by arrival.
        With a column `blocks`,
        lists of ids, each id is a piece of text of `block_tokens` tokens (the last one of a prompt what is left), and
        prompts that begin with the same ids share that prefix. Without, every prompt is its own text.
    block_tokens : int

    Returns
    -------
    RequestList
    """
    index = table["index"].to_numpy(np.int64)
    arrival_s = table["arrival_time_us"].to_numpy(np.float64) / US_PER_S
    prompt_tokens = table["prompt_tokens"].to_numpy(np.int64)
    if "blocks" not in table.columns:
        no_error = np.zeros(index.size, bool)
        return _own_texts(table, index, arrival_s, prompt_tokens.astype(np.int32), no_error)
    counts = np.array([len(ids) for ids in table["blocks"]], dtype=np.int64)
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in table["blocks"]])
    start = np.concatenate(([0], np.cumsum(counts)))
    tokens = np.full(ids.size, block_tokens, dtype=np.int64)
    tokens[start[1:] - 1] = prompt_tokens - (counts - 1) * block_tokens
    return RequestList(
        arrival_s=arrival_s,
        prompt=np.arange(index.size, dtype=np.int32),
        prompt_start=start,
        segment_content=np.unique(ids, return_inverse=True)[1].reshape(-1).astype(np.int64),
        segment_tokens=tokens,
        output_tokens=table["output_tokens"].to_numpy(np.int32),
        index=index,
        priority=_priority(table),
    )
