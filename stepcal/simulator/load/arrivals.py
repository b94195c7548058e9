"""When requests arrive (constant, Poisson and bursty processes in stages of load), and how long they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.simulator.layout import Int32Array
from stepcal.units import FloatArray

MOST_REQUESTS = 20_000_000
"""Requests of a workload that fit into memory: 3 GB at about 150 bytes each."""
# Coefficient of variation of the gaps between arrivals, by the name of the process.
PROCESSES = {"constant": 0.0, "poisson": 1.0}


@dataclass(frozen=True)
class LoadStage:
    """A stage of load.

    Parameters
    ----------
    rate : float
        Requests per second.
    duration_s : float

    Raises
    ------
    InputError
        If either is not positive and finite, or both make more than `MOST_REQUESTS`.
    """

    rate: float
    duration_s: float

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("duration_s", self.duration_s)):
            if not 0.0 < value < np.inf:
                raise InputError(f"`{name}` of a load stage is {value}; it must be positive and finite.")
        if self.rate * self.duration_s > MOST_REQUESTS:
            raise InputError(
                f"`rate` times `duration` of a load stage is {self.rate * self.duration_s:.3g} requests; at most "
                f"{MOST_REQUESTS:,} can be simulated."
            )

    @property
    def n_requests(self) -> int:
        """Requests sent in this stage: as in inference-perf, rate times duration, cut off."""
        return int(self.rate * self.duration_s)


def generate_arrivals(
    stages: Sequence[LoadStage], process: str = "poisson", *, cv: float | None = None, seed: int = 0
) -> tuple[FloatArray, Int32Array]:
    """Arrival times of a load in stages.

    Each stage has ``rate * duration`` requests, cut off to a whole number. Gaps between them are gamma-distributed with
    the given coefficient of variation, and scaled so that they fill the stage; a coefficient of 1 gives a Poisson process
    with that number of requests.

    Parameters
    ----------
    stages : sequence of LoadStage
    process : {"poisson", "constant", "gamma"}
        inference-perf calls its load `constant`, but measured arrivals are Poisson.
    cv : float, optional
        Coefficient of variation of the gaps, for "gamma": 0 is constant, 1 Poisson, above 1 comes in bursts.
    seed : int

    Returns
    -------
    arrival_s : ndarray of float, shape (n,)
    stage : ndarray of int, shape (n,)

    Raises
    ------
    InputError
        If the process is unknown, or `cv` is missing, negative, or given for another process than "gamma".
    """
    if process not in (*PROCESSES, "gamma"):
        raise InputError(f"`process` is {process!r}; it must be one of {', '.join(sorted((*PROCESSES, 'gamma')))}.")
    if (process == "gamma") != (cv is not None):
        raise InputError(f"`cv` is {cv} for the process {process!r}; it belongs to `gamma`, which needs it.")
    cv = PROCESSES[process] if cv is None else cv
    if not 0.0 <= cv < np.inf:
        raise InputError(f"`cv` is {cv}; a coefficient of variation must be finite and not negative.")
    rng = np.random.Generator(np.random.PCG64(seed))
    start, arrivals, numbers = 0.0, [np.zeros(0)], [np.zeros(0, np.int32)]
    for number, stage in enumerate(stages):
        n = stage.n_requests
        if cv == 0.0:
            offsets = np.arange(n) / stage.rate
        else:
            gaps = rng.gamma(cv**-2, size=n + 1)
            offsets = np.cumsum(gaps)[:-1] / gaps.sum() * stage.duration_s
        arrivals.append(start + offsets)
        numbers.append(np.full(n, number, np.int32))
        start += stage.duration_s
    return np.concatenate(arrivals), np.concatenate(numbers)


def fixed_lengths(n: int, tokens: int) -> Int32Array:
    """The same length for all `n` requests, shape (n,)."""
    if tokens < 1:
        raise InputError(f"`tokens` is {tokens}; lengths must be at least 1 token.")
    return np.full(n, tokens, np.int32)


def empirical_lengths(n: int, tokens: ArrayLike, *, weights: ArrayLike | None = None, seed: int = 0) -> Int32Array:
    """Lengths drawn, with replacement, from observed ones.

    Parameters
    ----------
    n : int
    tokens : array_like of int, shape (n_observed,)
    weights : array_like of float, shape (n_observed,), optional
        Relative frequencies; by default equal.
    seed : int

    Returns
    -------
    ndarray of int, shape (n,)

    Raises
    ------
    InputError
        If a length is not positive, or the weights are negative or all zero.
    """
    observed = np.asarray(tokens, dtype=np.int32)
    if observed.size == 0 or (observed < 1).any():
        raise InputError(f"`tokens` needs lengths of at least 1 token; its smallest is {observed.min(initial=0)}.")
    probabilities = None
    if weights is not None:
        weight = np.asarray(weights, dtype=np.float64)
        if not np.isfinite(weight).all() or (weight < 0.0).any() or weight.sum() == 0.0:
            raise InputError("`weights` must be finite, not negative, and not all zero.")
        probabilities = weight / weight.sum()
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.choice(observed, size=n, p=probabilities).astype(np.int32)
