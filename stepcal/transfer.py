"""Does the calibrated model hold where it was not fitted? Later arrivals, another rate, another workload, another model.

Every figure is closed loop: measured arrivals in, latencies out, ``|mean predicted - mean measured| / mean measured``. Each
fold is fitted anew from the priors; a held-out run is judged whole, for nothing of it was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.calibration import N_STEP, PARAMETERS, Calibration, Run, calibrate, run_latencies_s
from stepcal.end_to_end import (
    compare,
    judged_error_percent,
    latency_table,
    mean_errors,
    measured_latencies,
    training_mean,
)
from stepcal.metrics import CONFIDENCE, PERCENT
from stepcal.physical import PhysicalModel
from stepcal.request_level import RequestLevel, training_rows

FloatArray = NDArray[np.float64]

MS_PER_S = 1e3
LEAVE_OUT = ("stage", "workload", "model")
LOW, HIGH = 0, 1
DETERMINED_SHRINKAGE = 0.5
"""A number whose posterior spread is below this share of its prior's is called determined by the data."""
BOOTSTRAP_RESAMPLES = 1_000
E2E_STEP = 0.01
"""Step of finite differences for the E2E's sensitivity, in the logarithm."""


@dataclass(frozen=True)
class Fold:
    """One split: what is fitted and what is judged.

    Attributes
    ----------
    leave_out, name : str
        Kind (`LEAVE_OUT`) and what is left out.
    train, judged : tuple of str
        Experiments.
    only_stage : int or None
        Stage that is fitted; the other is judged.
    """

    leave_out: str
    name: str
    train: tuple[str, ...]
    judged: tuple[str, ...]
    only_stage: int | None = None


def folds(runs: Sequence[Run], leave_out: str) -> list[Fold]:
    """List the folds of one kind of split.

    Parameters
    ----------
    runs : sequence of Run
    leave_out : str
        ``stage``: one fold, fitted to the low rate of every run that has two. ``workload`` and ``model``: one fold each.

    Returns
    -------
    list of Fold
    """
    names = [run.experiment.experiment_id for run in runs]
    if leave_out == "stage":
        two = tuple(n for n, run in zip(names, runs, strict=True) if len(run.experiment.workload.stages) > 1)
        return [Fold("stage", "high rate", two, two, LOW)]
    key = {run.experiment.experiment_id: group_of(run, leave_out) for run in runs}
    return [
        Fold(
            leave_out,
            group,
            tuple(n for n in names if key[n] != group),
            tuple(n for n in names if key[n] == group),
        )
        for group in dict.fromkeys(key.values())
    ]


def group_of(run: Run, leave_out: str) -> str:
    """Return the model of a run, or its workload (the last word of its name)."""
    return run.experiment.architecture.name if leave_out == "model" else run.experiment.experiment_id.rsplit("-", 1)[-1]


def fit_fold(fold: Fold, runs: Sequence[Run], level: RequestLevel) -> Calibration:
    """Fit the training part of a fold's runs, jointly at both levels, from the priors."""
    chosen = [run for run in runs if run.experiment.experiment_id in fold.train]
    mask = level.rows["experiment_id"].isin(fold.train).to_numpy()
    if fold.only_stage is not None:
        chosen = [replace(r, targets=tuple(t for t in r.targets if t.stage == fold.only_stage)) for r in chosen]
        mask = mask & (level.rows["stage"] == fold.only_stage).to_numpy()
    return fit_joint(chosen, training_rows(level.subset(mask)))


def fit_joint(runs: Sequence[Run], rows: RequestLevel, *, workers: int = 1) -> Calibration:
    """Fit both levels, starting from what the request level alone gives (milliseconds of work), on that many threads."""
    return calibrate(runs=runs, level=rows, start=calibrate(level=rows).theta, workers=workers)


def evaluate(runs: Sequence[Run], theta: FloatArray, variant: str) -> pd.DataFrame:
    """Compare predictions with measurements, closed loop.

    Returns
    -------
    DataFrame
        As `stepcal.end_to_end.compare`, with `experiment_id`, `variant`, `arrivals`.
    """
    parts = []
    for run in runs:
        e2e, ttft = run_latencies_s(run, theta)
        predicted = latency_table(e2e, ttft, run.experiment.workload.output_len, np.asarray(run.requests.stage))
        parts.append(_tagged(compare(predicted, measured_latencies(run.experiment)), run, variant))
    return pd.concat(parts, ignore_index=True)


def baseline(runs: Sequence[Run]) -> pd.DataFrame:
    """Predict every mean by the mean of the run's first 60% of arrivals, in the form of `evaluate`."""
    parts = [
        _tagged(compare(training_mean(r.experiment), measured_latencies(r.experiment)), r, "training_mean")
        for r in runs
    ]
    return pd.concat(parts, ignore_index=True)


def _tagged(table: pd.DataFrame, run: Run, variant: str) -> pd.DataFrame:
    return table.assign(experiment_id=run.experiment.experiment_id, variant=variant, arrivals="replayed")


def errors_by_run(comparisons: pd.DataFrame, runs: Sequence[Run], split: str) -> pd.DataFrame:
    """Return the errors of the means on one split, with `judged_percent`, which is what a criterion sees."""
    table = mean_errors(comparisons, split)
    overloaded = {run.experiment.experiment_id: run.experiment.overloaded for run in runs}
    return table.assign(
        judged_percent=judged_error_percent(table, overloaded),
        overloaded=table["experiment_id"].map(overloaded),
        split=split,
    )


def cross_validate(runs: Sequence[Run], level: RequestLevel, *, workers: int = 2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit and judge every fold of every kind.

    Parameters
    ----------
    runs : sequence of Run
    level : RequestLevel
        All requests; each fold takes its own training rows.
    workers : int
        Processes; 1 stays in this one.

    Returns
    -------
    scores : DataFrame
        A row a fold and judged run: signed errors of mean E2E, TTFT and TPOT, `judged_percent`, and
        `baseline_percent`, the error of predicting the median of the means of the fitted runs that share the workload
        (model left out) or the model (workload left out), or the low rate's mean (stage).
    values : DataFrame
        Each fold's learned numbers.
    """
    every = [fold for kind in LEAVE_OUT for fold in folds(runs, kind)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(_judge_fold, every, [list(runs)] * len(every), [level] * len(every)))
    else:
        results = [_judge_fold(fold, runs, level) for fold in every]
    return pd.concat([r[0] for r in results], ignore_index=True), pd.concat([r[1] for r in results], ignore_index=True)


def _judge_fold(fold: Fold, runs: Sequence[Run], level: RequestLevel) -> tuple[pd.DataFrame, pd.DataFrame]:
    fitted = fit_fold(fold, runs, level)
    judged = [run for run in runs if run.experiment.experiment_id in fold.judged]
    split = f"stage {HIGH}" if fold.only_stage is not None else "whole"
    scores = errors_by_run(evaluate(judged, fitted.theta, "default"), judged, split)
    scores["baseline_percent"] = [_fold_baseline_percent(fold, runs, name) for name in scores["experiment_id"]]
    values = pd.DataFrame(list(fitted.values.items()), columns=["name", "value"])
    tags = {"leave_out": fold.leave_out, "fold": fold.name}
    return scores.assign(**tags), values.assign(**tags)


def _fold_baseline_percent(fold: Fold, runs: Sequence[Run], judged: str) -> float:
    """Signed error of the mean E2E of the fitted runs that are most alike."""
    by_name = {run.experiment.experiment_id: run for run in runs}
    own = by_name[judged]
    if fold.only_stage is not None:
        return PERCENT * (_mean_e2e(own, fold.only_stage) / _mean_e2e(own, HIGH) - 1.0)
    shared = "workload" if fold.leave_out == "model" else "model"
    alike = [by_name[n] for n in fold.train if group_of(by_name[n], shared) == group_of(own, shared)]
    return PERCENT * (float(np.median([_mean_e2e(r) for r in alike])) / _mean_e2e(own) - 1.0)


def _mean_e2e(run: Run, stage: int | None = None) -> float:
    table = run.experiment.requests
    if table is None:  # `prepare_runs` refuses such a run
        return float("nan")
    chosen = ~table["has_error"].to_numpy(dtype=bool)
    if stage is not None:
        chosen &= np.asarray(run.requests.stage) == stage
    return float(table["e2e_s"].to_numpy(dtype=float)[chosen].mean())


def first_requests(runs: Sequence[Run], theta: FloatArray) -> pd.DataFrame:
    """Compare the start of each run with its rest: TTFT measured and predicted, and how much of the difference is predicted.

    The first requests, as many as the workload has texts, bring prompts that no cache holds yet, which the simulator
    computes; what it does not know is a server that warms up. The rest is that of the first stage of load.

    Parameters
    ----------
    runs : sequence of Run
        Overloaded ones are left out: their TTFT is a queue's.
    theta : ndarray

    Returns
    -------
    DataFrame
        `experiment_id`, `n_first`, `first_ttft_ms`, `first_predicted_ms`, `later_ttft_ms`, `later_predicted_ms`,
        `explained_percent` (predicted share of the measured difference), `first_e2e_percent`, `later_e2e_percent` (signed
        errors of mean E2E).
    """
    rows = []
    for run in runs:
        workload, table = run.experiment.workload, run.experiment.requests
        if run.experiment.overloaded or table is None:
            continue
        n_texts = workload.n_groups * workload.n_prompts_per_group
        e2e, ttft = run_latencies_s(run, theta)
        row: dict[str, object] = {"experiment_id": run.experiment.experiment_id, "n_first": n_texts}
        position, stage = np.arange(len(table)), np.asarray(run.requests.stage)
        for name, part in (("first", position < n_texts), ("later", (position >= n_texts) & (stage == LOW))):
            known = table[part]
            row[f"{name}_ttft_ms"] = known["ttft_s"].mean() * MS_PER_S
            row[f"{name}_predicted_ms"] = float(np.nanmean(ttft[part])) * MS_PER_S
            row[f"{name}_e2e_percent"] = PERCENT * (float(np.nanmean(e2e[part])) / known["e2e_s"].mean() - 1.0)
        rows.append(row)
    result = pd.DataFrame(rows)
    predicted = result["first_predicted_ms"] - result["later_predicted_ms"]
    explained = PERCENT * predicted / (result["first_ttft_ms"] - result["later_ttft_ms"])
    return result.assign(explained_percent=explained)


def request_scores(level: RequestLevel, theta: FloatArray) -> pd.DataFrame:
    """Return MAPE and bias of the decode interval by experiment and split (rebuilt batch: diagnosis, not a verdict).

    Parameters
    ----------
    level : RequestLevel
    theta : ndarray

    Returns
    -------
    DataFrame
        `experiment_id`, `split`, `n`, `mape_percent`, `mspe_percent`.
    """
    predicted = PhysicalModel().predict_us(theta[:N_STEP], level.features)
    error = PERCENT * (predicted / level.rows["interval_us"].to_numpy(dtype=float) - 1.0)
    grouped = level.rows.assign(error=error, size=np.abs(error)).groupby(["experiment_id", "split"], sort=True)
    table = grouped.agg(n=("error", "size"), mape_percent=("size", "mean"), mspe_percent=("error", "mean"))
    return table.reset_index()


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
        Of ``log(theta)``.
    """
    n = len(fitted.labels)
    data, priors = fitted.jacobian[:n], fitted.jacobian[n:]
    names, cluster = np.unique(np.array(fitted.labels), return_inverse=True)
    hessians = np.stack([data[cluster == k].T @ data[cluster == k] for k in range(len(names))])
    scores = np.stack([data[cluster == k].T @ fitted.residuals[:n][cluster == k] for k in range(len(names))])
    prior_hessian, prior_score = priors.T @ priors, priors.T @ fitted.residuals[n:]
    posterior = np.sqrt(np.diag(np.linalg.inv(hessians.sum(axis=0) + prior_hessian)))
    rng = np.random.default_rng(seed)
    low, high = np.log([[p.low for p in PARAMETERS], [p.high for p in PARAMETERS]])
    draws = np.empty((BOOTSTRAP_RESAMPLES, data.shape[1]))
    for i in range(BOOTSTRAP_RESAMPLES):
        weights = rng.multinomial(len(names), np.full(len(names), 1.0 / len(names))).astype(float)
        hessian = np.tensordot(weights, hessians, axes=1) + prior_hessian
        draws[i] = np.log(fitted.theta) - np.linalg.solve(hessian, weights @ scores + prior_score)
    draws = np.clip(draws, low, high)
    tail = PERCENT * (1 - CONFIDENCE) / 2
    bounds = np.exp(np.percentile(draws, [tail, PERCENT - tail], axis=0))
    rows = []
    for j, p in enumerate(PARAMETERS):
        shrinkage = posterior[j] / p.prior_log_sd
        at_bound = "at its lower bound" if fitted.theta[j] <= p.low * 1.001 else ""
        reason = at_bound or ("" if shrinkage < DETERMINED_SHRINKAGE else "the prior holds it more than the data")
        rows.append(
            {
                "name": p.name,
                "unit": p.unit,
                "value": float(fitted.theta[j]),
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
    """Return the singular values of the whitened data Jacobian by ``log(theta)``: below 1, the prior weighs more."""
    data = fitted.jacobian[: len(fitted.labels)]
    _, values, vectors = np.linalg.svd(data, full_matrices=False)
    leading = [PARAMETERS[int(np.argmax(np.abs(v)))].name for v in vectors]
    return pd.DataFrame({"rank": np.arange(1, len(values) + 1), "singular_value": values, "mostly": leading})


def e2e_intervals(runs: Sequence[Run], theta: FloatArray, draws: FloatArray) -> pd.DataFrame:
    """Return each run's predicted mean E2E with the interval that the learned numbers' uncertainty gives it.

    Linear in the logarithms, so too narrow where a queue amplifies errors.
    """

    def log_means(numbers: FloatArray) -> FloatArray:
        return np.array([np.log(np.nanmean(run_latencies_s(run, numbers)[0])) for run in runs])

    base, x = log_means(theta), np.log(theta)
    slopes = np.column_stack(
        [(log_means(np.exp(x + E2E_STEP * np.eye(x.size)[j])) - base) / E2E_STEP for j in range(x.size)]
    )
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
