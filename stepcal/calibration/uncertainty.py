"""What a calibration is worth: intervals, what the data determine, intervals of end-to-end latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Calibration, Run, _mean_e2e, run_latencies_s
from stepcal.metrics import CONFIDENCE
from stepcal.step_time.physical_parameters import as_array, by_name
from stepcal.units import MS_PER_S, PERCENT, FloatArray

DETERMINED_SHRINKAGE = 0.5
"""A number whose posterior spread is below this share of its prior's is called determined by the data."""
BOOTSTRAP_RESAMPLES = 1_000
E2E_STEP = 0.01
"""Step of finite differences for the E2E's sensitivity, in the logarithm."""


def parameter_table(fitted: Calibration, *, seed: int = 0) -> tuple[pd.DataFrame, FloatArray]:
    """Return each number's value, interval and whether the data determine it.

    The interval is a one-step bootstrap over experiments: their weights are drawn anew and the linearised fit solved, priors
    kept, so it holds what varies between runs rather than the noise of requests.

    Parameters
    ----------
    fitted : Calibration
    seed : int

    Returns
    -------
    table : DataFrame
        `name`, `unit`, `value`, `low`, `high`, `prior`, `prior_log_sd`, `posterior_log_sd`, `identified`, `reason`,
        `source`.
    draws : ndarray, shape (n_resamples, n_parameters)
        Of the logarithms of the values, in the order of the calibration's parameters.
    """
    n = len(fitted.labels)
    data, priors = fitted.jacobian[:n], fitted.jacobian[n:]
    names, cluster = np.unique(np.array(fitted.labels), return_inverse=True)
    hessians = np.stack([data[cluster == k].T @ data[cluster == k] for k in range(len(names))])
    scores = np.stack([data[cluster == k].T @ fitted.residuals[:n][cluster == k] for k in range(len(names))])
    prior_hessian, prior_score = priors.T @ priors, priors.T @ fitted.residuals[n:]
    posterior = np.sqrt(np.diag(np.linalg.inv(hessians.sum(axis=0) + prior_hessian)))
    rng = np.random.default_rng(seed)
    low, high = np.log([[p.low for p in fitted.parameters], [p.high for p in fitted.parameters]])
    draws = np.empty((BOOTSTRAP_RESAMPLES, data.shape[1]))
    for i in range(BOOTSTRAP_RESAMPLES):
        weights = rng.multinomial(len(names), np.full(len(names), 1.0 / len(names))).astype(float)
        hessian = np.tensordot(weights, hessians, axes=1) + prior_hessian
        draws[i] = fitted.log_values - np.linalg.solve(hessian, weights @ scores + prior_score)
    draws = np.clip(draws, low, high)
    tail = PERCENT * (1 - CONFIDENCE) / 2
    bounds = np.exp(np.percentile(draws, [tail, PERCENT - tail], axis=0))
    rows = []
    for j, p in enumerate(fitted.parameters):
        shrinkage = posterior[j] / p.prior_log_sd
        at_bound = "at its lower bound" if fitted.values[p.name] <= p.low * 1.001 else ""
        reason = at_bound or ("" if shrinkage < DETERMINED_SHRINKAGE else "the prior holds it more than the data")
        rows.append(
            {
                "name": p.name,
                "unit": p.unit,
                "value": fitted.values[p.name],
                "low": float(bounds[0, j]),
                "high": float(bounds[1, j]),
                "prior": p.start,
                "prior_log_sd": p.prior_log_sd,
                "posterior_log_sd": float(posterior[j]),
                "identified": reason == "",
                "reason": reason,
                "source": p.source,
            }
        )
    return pd.DataFrame(rows), draws


def singular_values(fitted: Calibration) -> pd.DataFrame:
    """Return the singular values of the whitened data Jacobian by log values: below 1, the prior weighs more."""
    data = fitted.jacobian[: len(fitted.labels)]
    _, values, vectors = np.linalg.svd(data, full_matrices=False)
    leading = [fitted.parameters[int(np.argmax(np.abs(v)))].name for v in vectors]
    return pd.DataFrame({"rank": np.arange(1, len(values) + 1), "singular_value": values, "mostly": leading})


def e2e_intervals(runs: Sequence[Run], values: Mapping[str, float], draws: FloatArray) -> pd.DataFrame:
    """Return each run's predicted mean E2E with the interval that the learned numbers' uncertainty gives it.

    Linear in the logarithms, so too narrow where a queue amplifies errors.
    """

    def log_means(x: FloatArray) -> FloatArray:
        own = by_name(np.exp(x))
        return np.array([np.log(np.nanmean(run_latencies_s(run, own)[0])) for run in runs])

    x = np.log(as_array(values))
    base = log_means(x)
    slopes = np.column_stack([(log_means(x + E2E_STEP * np.eye(x.size)[j]) - base) / E2E_STEP for j in range(x.size)])
    spread = base + (draws - x) @ slopes.T
    tail = PERCENT * (1 - CONFIDENCE) / 2
    low, high = np.exp(np.percentile(spread, [tail, PERCENT - tail], axis=0)) * MS_PER_S
    return pd.DataFrame(
        {
            "experiment_id": [run.experiment.experiment_id for run in runs],
            "predicted_ms": np.exp(base) * MS_PER_S,
            "low_ms": low,
            "high_ms": high,
            "measured_ms": [_mean_e2e(run) * MS_PER_S for run in runs],
        }
    )
