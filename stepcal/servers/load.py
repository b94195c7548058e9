"""A load to predict and plan with: lengths as given or as logged, Poisson arrivals whose gaps are the same at every rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.log import ServedLog
from stepcal.simulator import RequestList
from stepcal.units import FloatArray, IntArray

REQUESTS = 2_000
"""Requests of a simulated load: enough for a 99th percentile of twenty."""
WARM_UP_SHARE = 0.1
"""First requests that are sent but not judged: the server starts empty."""


@dataclass(frozen=True)
class PlannedLoad:
    """Requests without a rate. At rate ``r`` each gap is the same unit gap over ``r`` (common random numbers).

    Attributes
    ----------
    unit_gaps : ndarray, shape (n_requests,)
        Exponential with mean 1.
    prompt_tokens, output_tokens : ndarray of int, shape (n_requests,)
    shared_prefix_tokens : int
        Start of every prompt that is the same text.
    """

    unit_gaps: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    shared_prefix_tokens: int = 0

    @classmethod
    def of_lengths(
        cls,
        prompt_tokens: int,
        output_tokens: int,
        *,
        n_requests: int = REQUESTS,
        shared_prefix_tokens: int = 0,
        seed: int = 0,
    ) -> PlannedLoad:
        """Build from one length for all.

        Raises
        ------
        InputError
            If a length is below one token, or the shared prefix as long as the prompt.
        """
        for name, value in (("input-len", prompt_tokens), ("output-len", output_tokens)):
            if value < 1:
                raise InputError(f"`--{name}` is {value}; a request has at least 1 token.")
        if not 0 <= shared_prefix_tokens < prompt_tokens:
            raise InputError(
                f"`--prefix-len` is {shared_prefix_tokens}; it must be from 0 to below the prompt's {prompt_tokens}."
            )
        rng = np.random.Generator(np.random.PCG64(seed))
        gaps = rng.exponential(size=n_requests)
        full = np.ones(n_requests, dtype=np.int64)
        return cls(gaps, prompt_tokens * full, output_tokens * full, shared_prefix_tokens)

    @classmethod
    def like(cls, log: ServedLog, *, n_requests: int = REQUESTS, seed: int = 0) -> PlannedLoad:
        """Draw lengths, prompt and output together, from a log's requests."""
        rng = np.random.Generator(np.random.PCG64(seed))
        gaps = rng.exponential(size=n_requests)
        chosen = rng.integers(0, len(log.requests), n_requests)
        prompt = np.asarray(log.requests.prompt_tokens, dtype=np.int64)[chosen]
        return cls(gaps, prompt, np.asarray(log.requests.output_tokens, dtype=np.int64)[chosen])

    def __len__(self) -> int:
        return len(self.unit_gaps)

    @property
    def judged(self) -> slice:
        """Requests after the warm-up."""
        return slice(round(WARM_UP_SHARE * len(self)), None)

    def at_rate(self, rate_per_s: float) -> RequestList:
        """Return the requests at a rate."""
        n, order = len(self), np.arange(len(self), dtype=np.int64)
        arrival_s = (np.cumsum(self.unit_gaps) - self.unit_gaps[0]) / rate_per_s
        shared = self.shared_prefix_tokens
        if shared:
            content = np.column_stack([np.zeros(n, dtype=np.int64), order + 1]).ravel()
            tokens = np.column_stack([np.full(n, shared), self.prompt_tokens - shared]).ravel()
            start = 2 * np.arange(n + 1)
        else:
            content, tokens, start = order, self.prompt_tokens, np.arange(n + 1)
        return RequestList(
            arrival_s=arrival_s,
            prompt=order.astype(np.int32),
            prompt_start=start,
            segment_content=content,
            segment_tokens=tokens.astype(np.int64),
            output_tokens=self.output_tokens.astype(np.int32),
        )
