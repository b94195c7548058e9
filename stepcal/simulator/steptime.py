"""The clock of the simulator is a plug-in: how long a step takes, given its batch, its KV tokens and the queue.

Two kinds are accepted. `CompiledStepTime` is ``constant + tokens[T] + requests[B] + kv KV + waiting W`` and so on:
any function of tokens or requests as a table, and affine in KV tokens, so that runs of decode steps have a closed
form. Anything else (gradient boosting, tables in several variables) is a callable that gets a `StepBatch` and is
asked at every step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.simulator.config import KvGroup, ServerConfig
from stepcal.simulator.layout import Int32Array, Times
from stepcal.units import FloatArray


@dataclass(frozen=True)
class StepBatch:
    """What a step computes. Context lengths include the tokens of the step itself.

    Parameters
    ----------
    prefill_chunk_tokens, prefill_kv_lens : ndarray of int, shape (n_prefill,)
        Prompt tokens computed for each prefilling request, and its context up to their end.
    decode_kv_lens : ndarray of int, shape (n_decode,)
        Context of each decoding request.
    waiting : int
        Requests left in the queue.
    rejected : float
        Requests whose blocks the offload pool has no room for, see `stepcal.simulator.offload`.
    windows : tuple of KvGroup
        Windows of the layers that have one. What such a layer reads is the mean over them.
    """

    prefill_chunk_tokens: Int32Array
    prefill_kv_lens: Int32Array
    decode_kv_lens: Int32Array
    waiting: int
    rejected: float = 0.0
    windows: tuple[KvGroup, ...] = ()

    def _mean(self, tokens: Callable[[KvGroup], int]) -> float:
        """Mean over the layers with a window, 0 where there are none."""
        layers = sum(window.layers for window in self.windows)
        return float(sum(tokens(window) * window.layers for window in self.windows) / layers) if layers else 0.0

    @property
    def window_kv_tokens(self) -> float:
        """What a layer with a window reads for the decoding requests."""
        return self._mean(lambda window: int(window.tokens_read(self.decode_kv_lens.astype(np.int64)).sum()))

    @property
    def prefill_window_kv_tokens(self) -> float:
        """What a layer with a window reads for the prefilling requests."""
        chunk, kv = self.prefill_chunk_tokens.astype(np.int64), self.prefill_kv_lens.astype(np.int64)
        return self._mean(lambda window: int(np.minimum(kv, chunk - 1 + window.tokens_read(kv - chunk + 1)).sum()))

    @property
    def window_pairs(self) -> float:
        """Query-context pairs of the prefilling requests in a layer with a window."""
        chunks = list(zip(self.prefill_chunk_tokens.tolist(), self.prefill_kv_lens.tolist(), strict=True))
        return self._mean(
            lambda window: sum(int(window.tokens_read(np.arange(kv - chunk + 1, kv + 1)).sum()) for chunk, kv in chunks)
        )

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed."""
        return int(self.prefill_chunk_tokens.sum())

    @property
    def decode_tokens(self) -> int:
        """Output tokens computed, one for each decoding request."""
        return self.decode_kv_lens.size

    @property
    def requests(self) -> int:
        """Requests in the batch."""
        return self.prefill_chunk_tokens.size + self.decode_kv_lens.size

    @property
    def decode_kv_tokens(self) -> int:
        """Context of the decoding requests, summed."""
        return int(self.decode_kv_lens.sum())

    @property
    def prefill_kv_tokens(self) -> int:
        """Context of the prefilling requests, summed."""
        return int(self.prefill_kv_lens.sum())

    @property
    def prefill_pairs(self) -> int:
        """Query-context pairs of the prefilling requests: each prompt token attends to all before it and to itself."""
        chunk, context = self.prefill_chunk_tokens.astype(np.int64), self.prefill_kv_lens.astype(np.int64)
        return int((chunk * (context - chunk) + chunk * (chunk + 1) // 2).sum())


class StepTime(Protocol):
    """A step time that is asked at every step."""

    def __call__(self, batch: StepBatch) -> float | Mapping[str, float]:
        """Microseconds of a step, or the microseconds of its components by name, which are added up."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompiledStepTime:
    """A step time affine in KV tokens, with tables over tokens and requests. All in microseconds.

    The GPU takes ``constant + tokens[T] + prefill_tokens[P] + requests[B] + decode_requests[D] + batch[P, D] + kv * decode
    KV tokens + prefill_kv * prefill KV tokens + prefill_pair * pairs + waiting * W``, the host ``host_constant +
    host_requests[B] + host_waiting * W + host_rejected * R``, for a step of P prefill tokens and D decoding requests, T =
    P + D tokens, B requests, W left waiting and R that the offload pool rejects.

    Parameters
    ----------
    constant_us : float
    tokens_us, prefill_tokens_us : array_like of float, shape (max_num_batched_tokens + 1,), or scalar
        Time by the number of tokens; element 0 of `prefill_tokens_us` is not used. A scalar is a time per token.
    requests_us, decode_requests_us, host_requests_us : array_like of float, shape (max_num_seqs + 1,), or scalar
        Time by the number of requests. A scalar is a time per request.
    batch_us : array_like of float, shape (max_num_batched_tokens + 1, max_num_seqs + 1), or 0
        Time by prefill tokens and decoding requests together, for what is no sum of the two.
    kv_us, prefill_kv_us : float
        Per context token of the decoding and of the prefilling requests.
    prefill_pair_us : float
        Per query-context pair of prefill attention.
    window_kv_us, prefill_window_kv_us, window_pair_us : float
        The same three for what layers with a window read; those above are then for the other layers. See `with_windows`.
    waiting_us, host_waiting_us : float
        Per request that waits.
    host_rejected_us : float
        Per request that the offload pool rejects (`stepcal.simulator.offload`).
    host_constant_us : float
    combine : {"sum", "max"}
        Whether host and GPU take turns or overlap. Only asynchronous scheduling can overlap them; without it they
        take turns.
    floor_us : float
        No step is shorter.
    """

    constant_us: float = 0.0
    tokens_us: ArrayLike = 0.0
    prefill_tokens_us: ArrayLike = 0.0
    requests_us: ArrayLike = 0.0
    decode_requests_us: ArrayLike = 0.0
    batch_us: ArrayLike = 0.0
    kv_us: float = 0.0
    prefill_kv_us: float = 0.0
    prefill_pair_us: float = 0.0
    window_kv_us: float = 0.0
    prefill_window_kv_us: float = 0.0
    window_pair_us: float = 0.0
    waiting_us: float = 0.0
    host_constant_us: float = 0.0
    host_requests_us: ArrayLike = 0.0
    host_waiting_us: float = 0.0
    host_rejected_us: float = 0.0
    combine: str = "sum"
    floor_us: float = 0.0

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "max"):
            raise InputError(
                f'`combine` is {self.combine!r}; it must be "sum" (host and GPU take turns) or "max" (they overlap).'
            )
        for field in fields(self):
            if field.name != "combine":
                self._check(field.name, np.asarray(getattr(self, field.name), dtype=np.float64))

    def with_windows(self, share: float) -> "CompiledStepTime":
        """The step time of a model of which a share of the layers has a window, and reads that much of a context.

        Every layer is taken to cost the same per token that it reads.

        Raises
        ------
        InputError
            If `share` is not between 0 and 1.
        """
        if not 0.0 <= share <= 1.0:
            raise InputError(f"`share` is {share}; the share of layers with a window lies between 0 and 1.")
        return replace(
            self,
            kv_us=self.kv_us * (1.0 - share),
            prefill_kv_us=self.prefill_kv_us * (1.0 - share),
            prefill_pair_us=self.prefill_pair_us * (1.0 - share),
            window_kv_us=self.kv_us * share,
            prefill_window_kv_us=self.prefill_kv_us * share,
            window_pair_us=self.prefill_pair_us * share,
        )

    def same_as(self, other: "CompiledStepTime") -> bool:
        """Whether all terms are equal to the last bit, so that a simulation is the same with either."""
        return all(np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    def _check(self, name: str, values: FloatArray) -> None:
        most = 2 if name == "batch_us" else 1
        if values.ndim > most:
            raise InputError(
                f"`{name}` has {values.ndim} dimensions; it must be a number or a table of {most} dimension(s)."
            )
        if name == "batch_us" and values.ndim < most and (values.ndim or values != 0.0):
            raise InputError(
                f"`batch_us` has {values.ndim} dimension(s); it must be 0 or a table of prefill tokens by decoding requests."
            )
        is_wrong = ~np.isfinite(values) | ((values < 0) & (self.floor_us <= 0.0))
        if is_wrong.any():
            where = "" if values.ndim == 0 else f" at {int(np.argmax(is_wrong))}"
            raise InputError(
                f"Step-time component `{name}` is {values.reshape(-1)[np.argmax(is_wrong)]}{where}; it must be finite, "
                "and at least 0 unless `floor_us` bounds the step from below."
            )

    def bind(self, server: ServerConfig) -> Times:
        """The tables in the sizes that a server needs.

        Raises
        ------
        InputError
            If a table is too short for the server's limits (named: which).
        """
        n_tokens, n_requests = server.max_num_batched_tokens + 1, server.max_num_seqs + 1
        overlap = self.combine == "max" and server.async_scheduling
        return Times(
            float(self.constant_us),
            self._table("tokens_us", n_tokens, "max_num_batched_tokens"),
            self._table("prefill_tokens_us", n_tokens, "max_num_batched_tokens"),
            self._table("requests_us", n_requests, "max_num_seqs"),
            self._table("decode_requests_us", n_requests, "max_num_seqs"),
            self._batch_table(n_tokens, n_requests),
            float(self.kv_us),
            float(self.prefill_kv_us),
            float(self.prefill_pair_us),
            float(self.window_kv_us),
            float(self.prefill_window_kv_us),
            float(self.window_pair_us),
            float(self.waiting_us),
            float(self.host_constant_us),
            self._table("host_requests_us", n_requests, "max_num_seqs"),
            float(self.host_waiting_us),
            float(self.host_rejected_us),
            float(self.floor_us),
            int(overlap),
        )

    def _table(self, name: str, size: int, limit: str) -> FloatArray:
        values = np.asarray(getattr(self, name), dtype=np.float64)
        if values.ndim == 0:
            return values * np.arange(size)
        if values.size < size:
            raise InputError(
                f"Step-time component `{name}` has {values.size} elements; "
                f"the server's `{limit}` needs {size} (0 to {size - 1})."
            )
        return np.ascontiguousarray(values[:size])

    def _batch_time(self, batch: StepBatch) -> float:
        values = np.asarray(self.batch_us, dtype=np.float64)
        return float(values if values.ndim == 0 else values[batch.prefill_tokens, batch.decode_tokens])

    def _batch_table(self, n_tokens: int, n_requests: int) -> FloatArray:
        values = np.asarray(self.batch_us, dtype=np.float64)
        if values.ndim == 0 and values == 0.0:
            return np.zeros((1, 1))
        if values.ndim != 2 or values.shape[0] < n_tokens or values.shape[1] < n_requests:
            raise InputError(
                f"Step-time component `batch_us` has shape {values.shape}; the server's `max_num_batched_tokens` and "
                f"`max_num_seqs` need ({n_tokens}, {n_requests})."
            )
        return np.ascontiguousarray(values[:n_tokens, :n_requests])

    def __call__(self, batch: StepBatch) -> dict[str, float]:
        """The same time, asked step by step (slower; scheduling asynchronously if `combine` is "max")."""
        n_tokens = batch.prefill_tokens + batch.decode_tokens

        def at(name: str, i: int) -> float:
            values = np.asarray(getattr(self, name), dtype=np.float64)
            return float(values * i if values.ndim == 0 else values[i])

        gpu = {
            "constant_us": self.constant_us,
            "tokens_us": at("tokens_us", n_tokens),
            "prefill_tokens_us": at("prefill_tokens_us", batch.prefill_tokens) if batch.prefill_tokens else 0.0,
            "requests_us": at("requests_us", batch.requests),
            "decode_requests_us": at("decode_requests_us", batch.decode_tokens),
            "batch_us": self._batch_time(batch),
            "kv_us": self.kv_us * batch.decode_kv_tokens,
            "prefill_kv_us": self.prefill_kv_us * batch.prefill_kv_tokens,
            "prefill_pair_us": self.prefill_pair_us * batch.prefill_pairs,
            "window_kv_us": self.window_kv_us * batch.window_kv_tokens,
            "prefill_window_kv_us": self.prefill_window_kv_us * batch.prefill_window_kv_tokens,
            "window_pair_us": self.window_pair_us * batch.window_pairs,
            "waiting_us": self.waiting_us * batch.waiting,
        }
        host = self.host_constant_us + at("host_requests_us", batch.requests) + self.host_waiting_us * batch.waiting
        host += self.host_rejected_us * batch.rejected
        busy = sum(gpu.values())
        total = max(self.floor_us, max(busy, host) if self.combine == "max" else busy + host)
        return {**gpu, "host and floor": total - busy}


def add_components(duration: float | Mapping[str, float]) -> float:
    """Microseconds of a step from what a `StepTime` answered.

    Raises
    ------
    InputError
        If a time is not finite, or the step's is negative; the component is named where the answer has names.
    """
    if isinstance(duration, Mapping):
        for name, value in duration.items():
            if not np.isfinite(value):
                raise InputError(f"Step-time component `{name}` is {value}; every component must be finite.")
        total = float(sum(duration.values()))
        if total < 0.0:
            name = min(duration, key=lambda key: duration[key])
            raise InputError(
                f"The step time is {total} µs; it must not be negative. "
                f"Its smallest component is `{name}` ({duration[name]} µs)."
            )
        return total
    if not np.isfinite(duration) or duration < 0.0:
        raise InputError(f"The step time is {duration} µs; it must be finite and not negative.")
    return float(duration)


def dummy_times() -> Times:
    """Tables for a run whose durations come from outside."""
    one = np.zeros(1)
    no_kv = (0.0,) * 6
    return Times(0.0, one, one, one, one, np.zeros((1, 1)), *no_kv, 0.0, 0.0, one, 0.0, 0.0, 0.0, 0)
