"""Does the calibrated model hold where it was not fitted? Later arrivals, another rate, another workload, another model.

Every figure is closed loop: measured arrivals in, latencies out, ``|mean predicted - mean measured| / mean measured``. Each
fold is fitted anew from the priors; a held-out run is judged whole, for nothing of it was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Calibration, Run, _mean_e2e, fit_joint, run_latencies_s
from stepcal.calibration.training_rows import RequestLevel, training_rows
from stepcal.evaluation.latency_errors import compare, judged_error_percent, mean_errors, training_mean
from stepcal.experiments.latencies import latency_table, measured_latencies
from stepcal.units import PERCENT

LEAVE_OUT = ("stage", "workload", "model")
LOW, HIGH = 0, 1


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


def compare_runs(runs: Sequence[Run], values: Mapping[str, float], variant: str) -> pd.DataFrame:
    """Compare predictions with measurements, closed loop.

    Returns
    -------
    DataFrame
        As `stepcal.evaluation.latency_errors.compare`, with `experiment_id`, `variant`, `arrivals`.
    """
    parts = []
    for run in runs:
        e2e, ttft = run_latencies_s(run, values)
        predicted = latency_table(e2e, ttft, run.experiment.workload.output_len, np.asarray(run.requests.stage))
        parts.append(_tagged(compare(predicted, measured_latencies(run.experiment)), run, variant))
    return pd.concat(parts, ignore_index=True)


def baseline(runs: Sequence[Run]) -> pd.DataFrame:
    """Predict every mean by the mean of the run's first 60% of arrivals, in the form of `compare_runs`."""
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
    scores = errors_by_run(compare_runs(judged, fitted.values, "default"), judged, split)
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
