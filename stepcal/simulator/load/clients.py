"""How clients send a list of requests: at its times, or only as fast as answers come back.

A load generator has a limited number of connections, a closed loop a fixed number of users. Then a request of the list
is sent when its time has come *and* a client is free; what it waits for a client is outside its latency. Clients take
requests in the order of the list.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.simulator.load.arrivals import LoadStage
from stepcal.simulator.load.workload import RequestList
from stepcal.units import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Who sends the requests of a list; by default as many clients as it takes to send each at its time.

    Parameters
    ----------
    max_in_flight : int, optional
        Clients, each with one request at a time. With arrivals all at 0 this is a closed loop of fixed concurrency.
    think_s : array_like of float, shape (n,) or scalar
        How long a client waits before it sends a request, from the moment it got the answer to the one before, or gave
        it up. A client's first request, in each stage that drains, is sent at once.
    stage_starts_s : array_like of float, shape (n_stages,), optional
        When each stage of load would begin by the times of the list. Given, stages drain: the next begins
        `stage_interval_s` after all requests of the one before have ended, and its requests keep their distance from
        the stage's begin.
    stage_interval_s : float

    Raises
    ------
    InputError
        If a number is not positive, a time is negative or not finite, or a think time is given without a limit.

    Examples
    --------
    >>> Clients(max_in_flight=8, think_s=0.5).max_in_flight
    8
    """

    max_in_flight: int | None = None
    think_s: ArrayLike = 0.0
    stage_starts_s: ArrayLike | None = None
    stage_interval_s: float = 0.0

    def __post_init__(self) -> None:
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise InputError(f"`max_in_flight` is {self.max_in_flight}; it must be at least 1, or None for no limit.")
        think_s = np.asarray(self.think_s, dtype=np.float64)
        for name, values in (("think_s", think_s), ("stage_interval_s", np.asarray(self.stage_interval_s))):
            is_wrong = ~(np.isfinite(values) & (values >= 0.0))
            if is_wrong.any():
                raise InputError(f"`{name}` has the value {values[is_wrong].flat[0]}; it must be finite, from 0.")
        if self.max_in_flight is None and (think_s > 0.0).any():
            raise InputError(
                "`think_s` is given without `max_in_flight`: without a limit, every request has a client of its own, "
                "which has no request before it. Give the number of clients."
            )
        if self.stage_starts_s is None and self.stage_interval_s:
            raise InputError(
                f"`stage_interval_s` is {self.stage_interval_s} without `stage_starts_s`: only stages that drain wait for "
                "each other. Give `stage_starts_s` (`stage_starts` makes it)."
            )

    @property
    def waits(self) -> bool:
        """Whether a request can wait for the end of others."""
        return self.max_in_flight is not None or self.stage_starts_s is not None

    def check(self, requests: RequestList) -> None:
        """Refuse a list that these clients cannot send.

        Raises
        ------
        InputError
            If a shape does not fit, stages are not in order, a request comes before its stage begins, or the list has
            sessions or abort times of its own.
        """
        if not self.waits:
            return
        for name, what in (("follows", "sessions whose turns wait for answers"), ("abort_s", "abort times")):
            if getattr(requests, name) is not None:
                raise InputError(
                    f"The request list has {what} (`{name}`), and the clients wait for free places or for stages: "
                    "together they are not modelled. Drop one of the two; for aborts, give `timeout_s`."
                )
        if np.ndim(self.think_s) and np.shape(self.think_s) != (len(requests),):
            raise InputError(f"`think_s` has shape {np.shape(self.think_s)}; there are {len(requests)} requests.")
        if self.stage_starts_s is not None:
            self._check_stages(requests, np.asarray(self.stage_starts_s, dtype=np.float64))

    def _check_stages(self, requests: RequestList, starts_s: FloatArray) -> None:
        if starts_s.ndim != 1 or starts_s.size < requests.n_stages:
            raise InputError(
                f"`stage_starts_s` has shape {starts_s.shape}; the list has {requests.n_stages} stages, and each needs "
                "its begin."
            )
        if requests.stage is None:
            return
        if (np.diff(requests.stage) < 0).any():
            raise InputError("Stages that drain need requests in the order of their stages; sort the list by `stage`.")
        early = requests.arrival_s < starts_s[requests.stage]
        if early.any():
            i = int(np.argmax(early))
            raise InputError(
                f"Request {requests._name(i)} arrives at {requests.arrival_s[i]} s, before its stage "
                f"{requests.stage[i]} begins ({starts_s[requests.stage[i]]} s in `stage_starts_s`)."
            )

    def stage_offsets_s(self, requests: RequestList) -> FloatArray:
        """When each request's stage begins by the times of the list, shape (n,); 0 where stages do not drain."""
        if self.stage_starts_s is None or requests.stage is None:
            return np.zeros(len(requests))
        return np.asarray(self.stage_starts_s, dtype=np.float64)[requests.stage]

    def stage_firsts(self, requests: RequestList) -> IntArray:
        """Where each stage begins in the list, and the list's end, shape (n_stages + 1,); empty without draining."""
        if self.stage_starts_s is None:
            return np.zeros(0, np.int64)
        if requests.stage is None:
            return np.array([0, len(requests)])
        return np.searchsorted(requests.stage, np.arange(requests.n_stages + 1)).astype(np.int64)

    def first_sent(self, requests: RequestList) -> int:
        """How many requests of the list can be sent from the start: all, or those of the first stage that has any."""
        firsts = self.stage_firsts(requests)
        return int(firsts[firsts > 0].min(initial=len(requests))) if firsts.size else len(requests)

    def first_begin_s(self, requests: RequestList) -> float:
        """When the first stage that has requests begins: an empty one ends where it begins."""
        starts_s = np.atleast_1d(np.asarray(self.stage_starts_s, dtype=np.float64))
        n_empty = int((self.stage_firsts(requests)[1:] == 0).sum()) if len(requests) else 0
        return float(starts_s[0]) + n_empty * self.stage_interval_s

    def think_times_s(self, requests: RequestList) -> FloatArray:
        """Think time before each request, shape (n,), or (0,) where clients do not think."""
        think_s = np.asarray(self.think_s, dtype=np.float64)
        if not self.waits or not (think_s > 0.0).any():
            return np.zeros(0)
        return np.broadcast_to(think_s, (len(requests),))


def stage_starts(stages: Iterable[LoadStage]) -> FloatArray:
    """When each stage begins by the times of `generate_arrivals`, shape (n_stages,), in seconds."""
    durations = np.array([stage.duration_s for stage in stages])
    return np.concatenate(([0.0], np.cumsum(durations)[:-1]))
