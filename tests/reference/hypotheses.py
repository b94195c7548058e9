"""Verdicts by brute force: fill the missing units in with every value that matters, and see what comes out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from stepcal.evaluation.preregistration import Criterion

Key = tuple[str, str, int]
"""Quantity, variant, number of the unit."""


def possible_verdicts(
    success: Sequence[Criterion], refuted_if: Sequence[Criterion], values: Mapping[Key, float | None]
) -> set[str]:
    """Verdicts over all completions of the values that are None."""
    missing = [key for key, value in values.items() if value is None]
    thresholds = sorted({c.threshold for c in (*success, *refuted_if)})
    candidates = [*(t + shift for t in thresholds for shift in (-0.25, 0.0, 0.25)), -1000.0, 1000.0]
    found = set()
    for filling in itertools.product(candidates, repeat=len(missing)):
        complete = {**values, **dict(zip(missing, filling, strict=True))}
        found.add(_verdict(success, refuted_if, complete))
    return found


def _verdict(success: Sequence[Criterion], refuted_if: Sequence[Criterion], values: Mapping[Key, float | None]) -> str:
    if all(_met(c, _of(c, values)) for c in success):
        return "Supported"
    return "Refuted" if any(_met(c, _of(c, values)) for c in refuted_if) else "Not supported"


def _of(criterion: Criterion, values: Mapping[Key, float | None]) -> list[float]:
    own = [value for key, value in values.items() if key[:2] == (criterion.quantity, criterion.variant)]
    return [value for value in own if value is not None]


def _met(criterion: Criterion, values: Iterable[float]) -> bool:
    values = list(values)
    if criterion.aggregate == "count":
        n = sum(_passes(v, criterion) for v in values)
        return n >= criterion.at_least if criterion.at_least is not None else n <= (criterion.at_most or 0)
    mean = sum(values) / len(values)
    return _passes(abs(mean) if criterion.aggregate == "absolute_mean" else mean, criterion)


def _passes(value: float, criterion: Criterion) -> bool:
    if criterion.operator == "<":
        return value < criterion.threshold
    if criterion.operator == "<=":
        return value <= criterion.threshold
    if criterion.operator == ">":
        return value > criterion.threshold
    return value >= criterion.threshold
