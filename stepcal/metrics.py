"""How far predictions are from measurements: one family of functions, one signature, ``metric(predicted, actual)``.

Relative errors are ``(predicted - actual) / actual``, so a positive bias is a prediction that is too long. Intervals come
from a moving-block bootstrap, since neighbouring steps share their batch and are far from independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.units import PERCENT, FloatArray

SMALLEST_PREDICTION_US = 1.0
"""Predictions are floored here before a logarithm is taken, as the study floors its models' output."""
BLOCK_STEPS = 100
"""Sampled steps a bootstrap block holds: about 1,000 real steps, or 15-20 s, several times a request's life."""
BOOTSTRAP_RESAMPLES = 1_000
CONFIDENCE = 0.95

Metric = Callable[[ArrayLike, ArrayLike], float]


class Interval(NamedTuple):
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def relative_errors_percent(predicted: ArrayLike, actual: ArrayLike) -> FloatArray:
    """Signed percentage error of each prediction, shape (n,).

    Raises
    ------
    InputError
        If shapes differ, nothing is given, a value is not finite, or a measured value is not positive.
    """
    predicted, actual = _checked(predicted, actual)
    return PERCENT * (predicted - actual) / actual


def mape_percent(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Mean absolute percentage error. Raises `InputError` as `relative_errors_percent` does."""
    return float(np.mean(np.abs(relative_errors_percent(predicted, actual))))


def mspe_percent(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Mean *signed* percentage error: the bias, positive where predictions are too long.

    Raises `InputError` as `relative_errors_percent` does.
    """
    return float(np.mean(relative_errors_percent(predicted, actual)))


def p99_percent(predicted: ArrayLike, actual: ArrayLike) -> float:
    """99th percentile of the absolute percentage error. Raises `InputError` as `relative_errors_percent` does."""
    return float(np.percentile(np.abs(relative_errors_percent(predicted, actual)), 99))


def log_accuracy_ratio(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Mean absolute logarithm of predicted over actual: 0 is exact, 0.69 is off by a factor of two on average.

    Unlike MAPE it charges a prediction of half as much as one of double. Raises `InputError` as
    `relative_errors_percent` does; predictions below `SMALLEST_PREDICTION_US` count as that.

    References
    ----------
    Tofallis (2015), "A better measure of relative prediction accuracy", JORS 66(8), doi:10.1057/jors.2014.103.
    """
    predicted, actual = _checked(predicted, actual)
    return float(np.mean(np.abs(np.log(np.maximum(predicted, SMALLEST_PREDICTION_US) / actual))))


def pearson_r(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Pearson correlation; NaN where either side is constant, since none is defined there.

    Raises
    ------
    InputError
        If shapes differ, nothing is given or a value is not finite.
    """
    predicted, actual = _checked(predicted, actual, positive=False)
    if predicted.size < 2 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, actual)[0, 1])


STEP_METRICS: dict[str, Metric] = {
    "mape_percent": mape_percent,
    "mspe_percent": mspe_percent,
    "log_accuracy_ratio": log_accuracy_ratio,
    "r": pearson_r,
    "p99_percent": p99_percent,
}
"""The metrics that every step-time model is judged by."""


def block_bootstrap(
    metric: Metric,
    predicted: ArrayLike,
    actual: ArrayLike,
    *,
    block_length: int = BLOCK_STEPS,
    n_resamples: int = BOOTSTRAP_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """A metric with its percentile interval from a circular moving-block bootstrap.

    Parameters
    ----------
    metric : callable
        ``metric(predicted, actual) -> float``.
    predicted, actual : array_like, shape (n,)
        In time order.
    block_length : int
        Consecutive rows that are drawn together; cut to ``n // 2`` for short series.
    n_resamples : int
    confidence : float
        Between 0 and 1.
    seed : int

    Returns
    -------
    Interval
        Bounds are NaN where the metric is.

    Raises
    ------
    InputError
        If an argument is out of range, or as `relative_errors_percent` does.

    References
    ----------
    Politis and Romano (1992), "A circular block-resampling procedure for stationary data".
    """
    predicted, actual = _checked(predicted, actual, positive=False)
    if block_length < 1 or n_resamples < 1 or not 0 < confidence < 1:
        raise InputError(
            f"`block_length={block_length}` and `n_resamples={n_resamples}` must be at least 1 and "
            f"`confidence={confidence}` between 0 and 1."
        )
    value = metric(predicted, actual)
    n = predicted.size
    if not np.isfinite(value) or n < 2:
        return Interval(value, float("nan"), float("nan"))
    length = min(block_length, max(1, n // 2))
    starts = np.random.default_rng(seed).integers(0, n, size=(n_resamples, -(-n // length)))
    resampled = np.empty(n_resamples)
    for i, row in enumerate(starts):
        rows = ((row[:, None] + np.arange(length)) % n).ravel()[:n]
        resampled[i] = metric(predicted[rows], actual[rows])
    tail = PERCENT * (1 - confidence) / 2
    low, high = np.nanpercentile(resampled, [tail, PERCENT - tail])
    return Interval(value, float(low), float(high))


def _checked(predicted: ArrayLike, actual: ArrayLike, *, positive: bool = True) -> tuple[FloatArray, FloatArray]:
    p, a = np.atleast_1d(np.asarray(predicted, dtype=float)), np.atleast_1d(np.asarray(actual, dtype=float))
    if p.shape != a.shape:
        raise InputError(f"`predicted` has shape {p.shape} and `actual` {a.shape}; give one prediction a measurement.")
    if p.size == 0:
        raise InputError("`predicted` and `actual` are empty: there is nothing to score. Check the split.")
    for name, values in (("predicted", p), ("actual", a)):
        if not np.all(np.isfinite(values)):
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"`{name}[{row}]` is {values[row]}; only finite values can be scored.")
    if positive and not np.all(a > 0):
        row = int(np.flatnonzero(~(a > 0))[0])
        raise InputError(f"`actual[{row}]` is {a[row]}; a relative error needs a positive measurement.")
    return p, a
