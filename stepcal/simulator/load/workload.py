"""What clients send: arrival times, prompts as sequences of named contents, output lengths.

A prompt is a list of (content, tokens), so that identical prompts, shared system prompts and conversations are the
same text wherever they are the same content, without a token being written down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError, shown
from stepcal.simulator.layout import Int32Array
from stepcal.units import FloatArray, IntArray


def whole_priorities(values: ArrayLike, name: str) -> Int32Array:
    """Return priorities as the engine holds them.

    Raises
    ------
    InputError
        If one is no whole number of 32 bits.
    """
    given, bounds = np.asarray(values), np.iinfo(np.int32)
    if given.dtype.kind not in "iu" or (given.size and not bounds.min <= given.min() <= given.max() <= bounds.max):
        raise InputError(
            f"`{name}` is {shown(values)}; priorities are whole numbers from {bounds.min:,} to {bounds.max:,}."
        )
    return given.astype(np.int32, copy=False)


@dataclass(frozen=True, kw_only=True)
class RequestList:
    """Requests in order of arrival.

    Parameters
    ----------
    arrival_s : ndarray of float, shape (n,)
        When the client sends each request, in seconds. For a follow-up turn: how long the user thinks, from the
        moment the turn before it has been answered.
    prompt : ndarray of int, shape (n,)
        Which prompt each request has.
    prompt_start : ndarray of int, shape (n_prompts + 1,)
        Prompt ``p`` is the segments ``prompt_start[p]`` up to ``prompt_start[p + 1]``.
    segment_content, segment_tokens : ndarray of int, shape (n_segments,)
        Content and tokens of each segment. Token ``i`` of a content is the same wherever it occurs.
    output_tokens : ndarray of int, shape (n,)
        Tokens that each request generates, exactly (`ignore_eos`).
    output_content : ndarray of int, shape (n,), optional
        Content that each request generates, so that a later prompt can contain it; -1 for text that nobody refers to.
    stage : ndarray of int, shape (n,), optional
        Stage of load of each request, from 0.
    follows : ndarray of int, shape (n,), optional
        The request whose answer each request waits for (its position in this list), or -1.
    abort_s : ndarray of float, shape (n,), optional
        When the client gives up, in seconds; infinite for never. In place of one timeout for all.
    index : ndarray of int, shape (n,), optional
        Names of the requests, as in the trace they came from; by default 0, 1, 2 and so on.
    priority : ndarray of int, shape (n,), optional
        The smallest is served first where the server's `scheduling_policy` is ``priority``; by default all are 0.
        Requests of one priority are served in the order of arrival, those of one moment in that of their names as
        texts, as vLLM orders its request ids.

    Raises
    ------
    InputError
        If arrivals are not sorted, a length is not positive, a shape does not fit, or an index occurs twice.
    """

    arrival_s: FloatArray
    prompt: Int32Array
    prompt_start: IntArray
    segment_content: IntArray
    segment_tokens: IntArray
    output_tokens: Int32Array
    output_content: IntArray | None = None
    stage: Int32Array | None = None
    follows: Int32Array | None = None
    abort_s: FloatArray | None = None
    index: IntArray | None = None
    priority: Int32Array | None = None

    def __post_init__(self) -> None:
        n = self.arrival_s.size
        if self.priority is not None:
            object.__setattr__(self, "priority", whole_priorities(self.priority, "priority"))
        for name in ("prompt", "output_tokens", "output_content", "stage", "follows", "abort_s", "index", "priority"):
            values = getattr(self, name)
            if values is not None and values.shape != (n,):
                raise InputError(f"`{name}` has shape {values.shape}; there are {n} arrivals, so it must be ({n},).")
        if not np.isfinite(self.arrival_s).all() or (self.arrival_s < 0).any():
            bad = int(np.argmax(~(np.isfinite(self.arrival_s) & (self.arrival_s >= 0))))
            raise InputError(
                f"`arrival_s` of request {self._name(bad)} is {self.arrival_s[bad]}; arrivals must be finite, from 0."
            )
        n_prompts = self.prompt_start.size - 1
        if n and (self.prompt.min() < 0 or self.prompt.max() >= n_prompts):
            raise InputError(f"`prompt` names prompt {self.prompt.max()}; there are {n_prompts}, numbered from 0.")
        if self.stage is not None and (self.stage < 0).any():
            raise InputError(f"`stage` has the element {self.stage.min()}; stages are numbered from 0.")
        self._check_order()
        self._check_lengths()
        if self.index is not None:
            values, counts = np.unique(self.index, return_counts=True)
            if (counts > 1).any():
                raise InputError(
                    f"Request index {values[np.argmax(counts > 1)]} occurs {counts.max()} times; "
                    "each request needs its own. Filter the trace to one experiment, or number its rows."
                )

    def _name(self, i: int) -> int:
        return i if self.index is None else int(self.index[i])

    def _check_order(self) -> None:
        first_turns = np.arange(self.arrival_s.size) if self.follows is None else np.flatnonzero(self.follows < 0)
        step = np.diff(self.arrival_s[first_turns])
        if (step < 0).any():
            i = int(first_turns[np.argmax(step < 0) + 1])
            raise InputError(
                f"The trace is not sorted: request {self._name(i)} arrives at {self.arrival_s[i]} s, "
                "before the one above it. Sort it by arrival time."
            )
        if self.follows is not None:
            followers = np.flatnonzero(self.follows >= 0)
            if (self.follows[followers] >= followers).any() or np.unique(self.follows[followers]).size < followers.size:
                raise InputError("`follows` must name an earlier request, and each request can have one follower.")

    def _check_lengths(self) -> None:
        for name, values, what in (
            ("output_tokens", self.output_tokens, "request"),
            ("segment_tokens", self.segment_tokens, "prompt segment"),
        ):
            if (values < 1).any():
                i = int(np.argmax(values < 1))
                raise InputError(f"`{name}` of {what} {i} is {values[i]}; lengths must be at least 1 token.")
        if (np.diff(self.prompt_start) < 1).any():
            raise InputError(
                f"Prompt {int(np.argmax(np.diff(self.prompt_start) < 1))} has no tokens; prompts need at least 1."
            )

    def __len__(self) -> int:
        return self.arrival_s.size

    @property
    def prompt_tokens(self) -> Int32Array:
        """Prompt length of each request, shape (n,)."""
        ends = np.concatenate(([0], np.cumsum(self.segment_tokens)))
        return np.diff(ends[self.prompt_start]).astype(np.int32)[self.prompt]

    @property
    def n_stages(self) -> int:
        """Stages of load."""
        return 1 if self.stage is None or not len(self) else int(self.stage.max()) + 1

    def with_arrivals(self, arrival_s: FloatArray) -> "RequestList":
        """The same requests at other times."""
        return replace(self, arrival_s=np.asarray(arrival_s, dtype=np.float64))


def make_requests(
    arrival_s: ArrayLike,
    prompts: Sequence[Sequence[tuple[int, int]]],
    output_tokens: ArrayLike,
    *,
    prompt: ArrayLike | None = None,
    output_content: ArrayLike | None = None,
    stage: ArrayLike | None = None,
    follows: ArrayLike | None = None,
    abort_s: ArrayLike | None = None,
    index: ArrayLike | None = None,
    priority: ArrayLike | None = None,
) -> RequestList:
    """A request list from prompts written out as segments.

    Parameters
    ----------
    arrival_s : array_like of float, shape (n,)
    prompts : sequence of sequences of (content, tokens)
    output_tokens : array_like of int, shape (n,) or scalar
    prompt : array_like of int, shape (n,), optional
        Which prompt each request has; by default they take turns.
    output_content, stage, follows, abort_s, index, priority : array_like, shape (n,), optional
        See `RequestList`.

    Returns
    -------
    RequestList
    """
    arrivals = np.asarray(arrival_s, dtype=np.float64)
    n = arrivals.size
    segments = [segment for segments in prompts for segment in segments]

    def integers(values: ArrayLike | None, dtype: type) -> np.ndarray | None:
        return None if values is None else np.asarray(values, dtype=dtype)

    return RequestList(
        arrival_s=arrivals,
        prompt=(np.arange(n) % max(len(prompts), 1)).astype(np.int32)
        if prompt is None
        else np.asarray(prompt, dtype=np.int32),
        prompt_start=np.cumsum([0] + [len(p) for p in prompts]).astype(np.int64),
        segment_content=np.array([content for content, _ in segments], dtype=np.int64),
        segment_tokens=np.array([tokens for _, tokens in segments], dtype=np.int64),
        output_tokens=np.array(np.broadcast_to(np.asarray(output_tokens), (n,)), dtype=np.int32),
        output_content=integers(output_content, np.int64),
        stage=integers(stage, np.int32),
        follows=integers(follows, np.int32),
        abort_s=None if abort_s is None else np.asarray(abort_s, dtype=np.float64),
        index=integers(index, np.int64),
        priority=None if priority is None else np.asarray(priority),  # checked with the rest
    )
