"""The largest rate that one server serves within its targets: a bisection over a grid of rates, on common random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.load import PlannedLoad
from stepcal.servers.targets import METRICS, Goal
from stepcal.simulator import CompiledStepTime, StepBatch, simulate
from stepcal.simulator.steptime import add_components
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.units import MS_PER_S, FloatArray

LOWEST_RATE_PER_S, GRID_RATIO, GRID_SIZE = 0.02, 1.02, 640
"""Rates that are asked for: 0.02 to 6,000 a second, each 2% above the last."""
LOOK_BACK = 3
"""Rates below an answer that are asked for as well: a percentile is not quite monotone in the rate."""
NORMAL_95 = 1.959964
"""Half-width of a 95% interval of a normal distribution, in standard deviations."""
US_PER_MS = 1e3
STEADY_SHARE = 5.0
"""Requests of a sample for each one in flight, below which a rate is that of a burst. A sample that ends before the queue of
an overload has grown keeps targets that the load would not: of n requests with N in flight, by up to N / n of the rate."""
LARGEST_GROWTH = 10
"""Most times as many requests that a user is told to ask with next."""
AT_LEAST, AT_MOST, UNKNOWN = "at least", "at most", "unknown"
"""What a rate is where it is not the answer: the end of the search, that of a burst, or both."""


def rates_per_s() -> FloatArray:
    """Return the grid of rates, shape (GRID_SIZE,)."""
    return np.asarray(LOWEST_RATE_PER_S * GRID_RATIO ** np.arange(GRID_SIZE), dtype=np.float64)


@dataclass(frozen=True)
class Server:
    """A deployment on a step-time model, ready to be asked at many rates.

    Attributes
    ----------
    deployment : Deployment
    step_time : CompiledStepTime or callable
    overheads_us : dict
        `api_before_us` and `api_after_us`.
    """

    deployment: Deployment
    step_time: Any
    overheads_us: dict[str, float]

    @classmethod
    def of(cls, coefficients: StepTimeModel, deployment: Deployment) -> Server:
        """Compile coefficients for a deployment."""
        return cls(deployment, coefficients.compile(deployment), coefficients.api_overheads_us())

    def slower(self, factor: float) -> Server:
        """Return the same server with every step time multiplied."""
        return replace(self, step_time=scaled(self.step_time, factor))

    def latencies_ms(self, load: PlannedLoad, rate_per_s: float) -> dict[str, FloatArray]:
        """Latencies by metric of the judged requests at a rate; NaN for one that does not complete.

        The time per output token of a request with one output token is NaN as well: it has none.
        """
        result = simulate(
            load.at_rate(rate_per_s),
            self.deployment.limits,
            self.step_time,
            api_before_us=self.overheads_us.get("api_before_us", 0.0),
            api_after_us=self.overheads_us.get("api_after_us", 0.0),
        )
        e2e, ttft = result.e2e_us()[load.judged] / US_PER_MS, result.ttft_us()[load.judged] / US_PER_MS
        gaps = np.asarray(load.output_tokens[load.judged] - 1, dtype=np.float64)
        tpot = (e2e - ttft) / np.where(gaps > 0, gaps, np.nan)
        return dict(zip(METRICS, (ttft, tpot, e2e), strict=True))

    def is_met(self, load: PlannedLoad, rate_per_s: float, goal: Goal) -> bool:
        """Whether targets are kept at a rate."""
        return goal.is_met(self.latencies_ms(load, rate_per_s))


def scaled(step_time: Any, factor: float) -> Any:
    """Multiply a step time."""
    if isinstance(step_time, CompiledStepTime):
        names = [f.name for f in fields(step_time) if f.name != "combine"]
        terms: dict[str, Any] = {n: np.asarray(getattr(step_time, n), dtype=float) * factor for n in names}
        return replace(step_time, **terms)

    def slower(batch: StepBatch) -> float:
        return factor * add_components(step_time(batch))

    return slower


def check_goal(goal: Goal, load: PlannedLoad) -> None:
    """Refuse a target on the time per output token of a load whose requests have none.

    Raises
    ------
    InputError
        If all judged requests have one output token, and a target is on TPOT.
    """
    own = [str(target) for target in goal.targets if target.metric == "tpot"]
    if own and int(load.output_tokens[load.judged].max()) < 2:
        raise InputError(
            f"`--target {own[0]}` is on the time per output token, and all requests have 1 output token, so none has one. "
            "Give `--output-len` 2 or more, or targets on `ttft` and `e2e`."
        )


def largest_rate(server: Server, load: PlannedLoad, goal: Goal) -> float:
    """Find the largest rate of the grid up to which the targets are kept.

    Parameters
    ----------
    server : Server
    load : PlannedLoad
    goal : Goal

    Returns
    -------
    float
        Requests a second; 0 where not even the lowest rate keeps them.

    Raises
    ------
    InputError
        If no request of the load has what a target is on.
    """
    check_goal(goal, load)
    rates = rates_per_s()
    k = last_true(lambda i: server.is_met(load, float(rates[i]), goal), len(rates))
    return 0.0 if k < 0 else float(rates[k])


def last_true(holds: Callable[[int], bool], n: int) -> int:
    """Find the last of ``0 ... n - 1`` up to which a condition holds, -1 for none, by bisection and a look back.

    Examples
    --------
    >>> last_true(lambda i: i < 7, 100)
    6
    """
    known: dict[int, bool] = {}

    def ask(i: int) -> bool:
        if i not in known:
            known[i] = holds(i)
        return known[i]

    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        if ask(middle):
            low = middle
        else:
            high = middle
    # A percentile may fail at a rate and hold at the next: the answer is below the first rate that fails.
    first = low
    while first > 0 and any(not ask(i) for i in range(max(first - LOOK_BACK, 0), first)):
        first = next(i for i in range(max(first - LOOK_BACK, 0), first) if not ask(i)) - 1
    return first


@dataclass(frozen=True)
class Capacity:
    """Largest rate of one server, with the interval that the model's error gives it.

    Attributes
    ----------
    rate_per_s, low_per_s, high_per_s : float
    bound, low_bound, high_bound : {"at least", "at most", "unknown"} or None
        What each rate is where it is not the answer: ``at least`` is the end of the search. ``at most`` is the rate of a
        burst: the sample is too short for it, and a load that lasts keeps the targets at a lower one. Both are ``unknown``.
    more_requests : int or None
        Requests to ask with next where one is of a burst.
    """

    rate_per_s: float
    low_per_s: float
    high_per_s: float
    bound: str | None = None
    low_bound: str | None = None
    high_bound: str | None = None
    more_requests: int | None = None

    @property
    def is_bound(self) -> bool:
        """Whether any of the rates is not the answer."""
        return any((self.bound, self.low_bound, self.high_bound))


def capacity(server: Server, load: PlannedLoad, goal: Goal, *, log_sd: float) -> Capacity:
    """Find the largest rate, and those with every step slower and faster by 1.96 `log_sd`, the model's error.

    Raises
    ------
    InputError
        If no request of the load has what a target is on.
    """
    factor = float(np.exp(NORMAL_95 * log_sd))
    servers = (server, server.slower(factor), server.slower(1.0 / factor))
    rates = [largest_rate(s, load, goal) for s in servers]
    in_flight = [requests_in_flight(s, load, rate) for s, rate in zip(servers, rates, strict=True)]
    bounds = [_bound(rate, n, len(load)) for rate, n in zip(rates, in_flight, strict=True)]
    is_burst = any(bound in (AT_MOST, UNKNOWN) for bound in bounds)
    # Not at once as many as the burst would need: a longer sample has a lower rate, and needs fewer.
    wanted = int(np.clip(STEADY_SHARE * max(in_flight), 2 * len(load), LARGEST_GROWTH * len(load)))
    (rate, low, high), (bound, low_bound, high_bound) = rates, bounds
    return Capacity(
        rate, low, high, bound, low_bound, high_bound, more_requests=-(-wanted // 100) * 100 if is_burst else None
    )


def requests_in_flight(server: Server, load: PlannedLoad, rate_per_s: float) -> float:
    """Requests in flight at a rate that lasts, by Little's law."""
    return rate_per_s * float(server.latencies_ms(load, rate_per_s)["e2e"].mean()) / MS_PER_S if rate_per_s else 0.0


def _bound(rate_per_s: float, in_flight: float, n_requests: int) -> str | None:
    """What a rate is where it is not the answer."""
    is_burst = STEADY_SHARE * in_flight > n_requests
    if rate_per_s >= float(rates_per_s()[-1]):
        return UNKNOWN if is_burst else AT_LEAST
    return AT_MOST if is_burst else None
