"""What a server must keep: limits on percentiles of latencies, or a share of requests that keep all limits (goodput)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepcal.errors import InputError
from stepcal.units import FloatArray

METRICS = ("ttft", "tpot", "e2e")
_PATTERN = re.compile(
    r"^(ttft|tpot|e2e)(?:[.: ](mean|p\d{1,2}(?:\.\d+)?))?\s*(?:<=|<|=|\s)\s*(\d+(?:\.\d+)?)\s*(ms|s)$"
)
_MS = {"ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Target:
    """A limit on one statistic.

    Attributes
    ----------
    metric : {"ttft", "tpot", "e2e"}
    statistic : str
        ``mean`` or a percentile, ``p90``.
    limit_ms : float
    """

    metric: str
    statistic: str
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``ttft.p90<=500ms``; without a statistic it is the mean.

        Raises
        ------
        InputError
            If the text is no target.

        Examples
        --------
        >>> Target.parse("ttft.p90<=0.5s")
        Target(metric='ttft', statistic='p90', limit_ms=500.0)
        """
        match = _PATTERN.match(text.strip().lower())
        if match is None or float(match[3]) <= 0:
            raise InputError(
                f"`--target {text}` is no target. It reads METRIC.STATISTIC<=LIMIT, such as `ttft.p90<=500ms` or "
                f"`tpot.mean<=30ms`; metrics: {', '.join(METRICS)}."
            )
        return cls(match[1], match[2] or "mean", float(match[3]) * _MS[match[4]])

    def value_ms(self, latencies_ms: FloatArray) -> float:
        """Statistic of latencies, over the requests that have one."""
        latencies_ms = latencies_ms[~np.isnan(latencies_ms)]
        if self.statistic == "mean":
            return float(latencies_ms.mean())
        return float(np.quantile(latencies_ms, float(self.statistic[1:]) / 100.0))

    def __str__(self) -> str:
        return f"{self.metric}.{self.statistic}<={self.limit_ms:g}ms"


@dataclass(frozen=True)
class Goal:
    """Targets that all hold; with a goodput, the share of requests that keep every limit by themselves.

    Attributes
    ----------
    targets : tuple of Target
    goodput : float or None
        Share of requests; statistics of the targets are not used then.
    """

    targets: tuple[Target, ...]
    goodput: float | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise InputError(
                "No `--target` was given: every rate would do. Give one, such as `--target tpot.mean<=30ms`."
            )
        if self.goodput is not None and not 0.0 < self.goodput <= 1.0:
            raise InputError(f"`--goodput` is {self.goodput}; it is a share of requests, above 0 and at most 1.")

    def is_met(self, latencies_ms: Mapping[str, FloatArray]) -> bool:
        """Whether latencies of requests (by metric, all completed) keep the targets; one that did not complete keeps none.

        A request with one output token has no TPOT (NaN): it breaks no limit on it, and is not in its statistics.
        """
        if any(not len(latencies_ms[m]) or np.isnan(latencies_ms[m]).any() for m in ("ttft", "e2e")):
            return False
        if self.goodput is None:
            return all(t.value_ms(latencies_ms[t.metric]) <= t.limit_ms for t in self.targets)
        broken = np.logical_or.reduce([latencies_ms[t.metric] > t.limit_ms for t in self.targets])
        return bool((~broken).mean() >= self.goodput)

    def values_ms(self, latencies_ms: Mapping[str, FloatArray]) -> dict[str, float]:
        """Value of each target's statistic."""
        return {str(t): t.value_ms(latencies_ms[t.metric]) for t in self.targets}


def goal_of(targets: Sequence[str], goodput: float | None = None) -> Goal:
    """Build a goal from texts."""
    return Goal(tuple(Target.parse(t) for t in targets), goodput)
