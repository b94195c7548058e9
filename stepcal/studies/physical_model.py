"""The study ``physical_model``: the physical model calibrated, judged, cross-validated, and what its numbers are worth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.calibration.closed_loop import Calibration, Run, fit_joint, fit_steps, prepare_runs, run_latencies_s
from stepcal.calibration.optimal_design import rank_next_experiments
from stepcal.calibration.training_rows import RequestLevel, request_level, step_features, training_rows
from stepcal.calibration.uncertainty import e2e_intervals, parameter_table, singular_values
from stepcal.errors import InputError
from stepcal.evaluation.cross_validation import LOW, baseline, compare_runs, cross_validate, errors_by_run
from stepcal.experiments.experiment import Experiment
from stepcal.metrics import mape_percent, mspe_percent
from stepcal.reconstruction.labelled_steps import (
    GAP_MEAN,
    LABELS,
    SAMPLED_STEP,
    gap_means,
    labelled_steps,
    rebuilt_steps,
)
from stepcal.reconstruction.timeline import decode_intervals
from stepcal.step_time.coefficients import DEFAULT, frozen_values
from stepcal.step_time.physical import PhysicalModel
from stepcal.step_time.physical_parameters import PARAMETERS, as_array
from stepcal.studies.published_runs import load_experiments
from stepcal.units import MS_PER_S, PERCENT, BoolArray, FloatArray

Tables = dict[str, pd.DataFrame]
SPLITS = ("whole", "test", "stage 0", "stage 1")


def run_physical_model(
    steps: pd.DataFrame,
    requests: pd.DataFrame,
    runs_table: pd.DataFrame,
    *,
    stage_starts_ns: Mapping[str, Sequence[float]] | None = None,
    workers: int = 2,
    seed: int = 0,
) -> tuple[Tables, dict[str, str]]:
    """Calibrate, cross-validate and judge, closed loop.

    Judged is the frozen default; the calibration is run again for its intervals, and to see how far apart the two are.

    Parameters
    ----------
    steps, requests : DataFrame
        Measured step rows and requests.
    runs_table : DataFrame
        ``experiments.csv``.
    stage_starts_ns : mapping, optional
        See `stepcal.reconstruction.labels.step_intervals`.
    workers : int
        Threads of the calibration, then processes for the folds.
    seed : int
        Of the bootstrap.

    Returns
    -------
    tables : dict
        ``parameters``, ``singular_values``, ``errors`` (means by run, variant and split), ``percentiles``, ``requests``
        (decode intervals), ``first_requests``, ``steps``, ``folds``, ``fold_values``, ``e2e_intervals``,
        ``next_experiments``.
    texts : dict
        ``reproduced``: the largest distance of a frozen parameter from the one calibrated now, in standard deviations of the
        latter.
    """
    experiments = load_experiments(requests)
    level = request_level(decode_intervals(requests, runs_table), experiments)
    runs = prepare_runs(experiments)
    fitted = fit_joint(runs, training_rows(level), workers=workers)
    frozen = frozen_values()
    parameters, draws = parameter_table(fitted, seed=seed)
    folds, values = cross_validate(runs, level, workers=workers)
    without = values[values["leave_out"] == "model"].pivot(index="fold", columns="name", values="value")
    values_without = {str(model): {p.name: float(row[p.name]) for p in PARAMETERS} for model, row in without.iterrows()}
    labelled = labelled_steps(steps, requests, runs_table, stage_starts_ns=stage_starts_ns)
    tables = {
        "parameters": parameters.assign(frozen=as_array(frozen)),
        "singular_values": singular_values(fitted),
        **_closed_loop_errors(runs, frozen),
        "requests": request_scores(level, frozen),
        "first_requests": first_requests(runs, frozen),
        "steps": step_scores(
            labelled, experiments, frozen, values_without, rebuilt=rebuilt_steps(steps, requests, runs_table)
        ),
        "folds": folds,
        "fold_values": values,
        "e2e_intervals": e2e_intervals(runs, frozen, draws),
        "next_experiments": rank_next_experiments(fitted),
    }
    return tables, {"reproduced": f"{distance_from_frozen(fitted):.1f}"}


def _closed_loop_errors(runs: Sequence[Run], values: Mapping[str, float]) -> Tables:
    comparisons = pd.concat([compare_runs(runs, values, DEFAULT), baseline(runs)], ignore_index=True)
    errors = pd.concat([errors_by_run(comparisons, runs, split) for split in SPLITS], ignore_index=True)
    wanted = (comparisons["variant"] == DEFAULT) & (comparisons["split"] == "whole")
    shown = comparisons[wanted & comparisons["statistic"].isin(["p50", "p90", "p99"])]
    return {"errors": errors, "percentiles": shown.reset_index(drop=True)}


def distance_from_frozen(fitted: Calibration) -> float:
    """Return the largest distance of a frozen parameter from a calibration's, in the latter's standard deviations."""
    spread = np.sqrt(np.diag(np.linalg.inv(fitted.jacobian.T @ fitted.jacobian)))
    return float(np.max(np.abs(fitted.log_values - np.log(as_array(frozen_values()))) / spread))


def main() -> None:
    """Print the study's tables: ``python -m stepcal.studies.physical_model``, on the traces that STEPCAL_DATA names."""
    from stepcal.datasets import experiments, load_requests, load_steps

    started = time.perf_counter()
    tables, texts = run_physical_model(load_steps(), load_requests(), experiments())
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(float_format='{:.4g}'.format)}")
    print(
        f"\nfrozen parameters within {texts['reproduced']} standard deviations; {time.perf_counter() - started:.0f} s"
    )


def first_requests(runs: Sequence[Run], values: Mapping[str, float]) -> pd.DataFrame:
    """Compare the start of each run with its rest: TTFT measured and predicted, and how much of the difference is predicted.

    The first requests, as many as the workload has texts, bring prompts that no cache holds yet, which the simulator
    computes; what it does not know is a server that warms up. The rest is that of the first stage of load.

    Parameters
    ----------
    runs : sequence of Run
        Overloaded ones are left out: their TTFT is a queue's.
    values : mapping of str to float
        Parameters by name.

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
        e2e, ttft = run_latencies_s(run, values)
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


def request_scores(level: RequestLevel, values: Mapping[str, float]) -> pd.DataFrame:
    """Return MAPE and bias of the decode interval by experiment and split (rebuilt batch: diagnosis, not a verdict).

    Parameters
    ----------
    level : RequestLevel
    values : mapping of str to float
        Parameters by name.

    Returns
    -------
    DataFrame
        `experiment_id`, `split`, `n`, `mape_percent`, `mspe_percent`.
    """
    predicted = PhysicalModel().predict_us(values, level.features)
    error = PERCENT * (predicted / level.rows["interval_us"].to_numpy(dtype=float) - 1.0)
    grouped = level.rows.assign(error=error, size=np.abs(error)).groupby(["experiment_id", "split"], sort=True)
    table = grouped.agg(n=("error", "size"), mape_percent=("size", "mean"), mspe_percent=("error", "mean"))
    return table.reset_index()


def step_scores(
    table: pd.DataFrame,
    experiments: Sequence[Experiment],
    values: Mapping[str, float],
    values_without: Mapping[str, Mapping[str, float]] | None = None,
    *,
    rebuilt: pd.DataFrame | None = None,
    split: str = "test",
) -> pd.DataFrame:
    """Score the physical model and baselines per step on one split.

    Parameters
    ----------
    table : DataFrame
        Of `labelled_steps`.
    experiments : sequence of Experiment
    values : mapping of str to float
        The calibrated parameters, which saw decode intervals and latencies of the training arrivals, no step.
    values_without : mapping of str to mapping, optional
        By model, parameters fitted without it; adds the physical rows of ``other models``.
    rebuilt : DataFrame, optional
        Of `rebuilt_steps`; adds the rows whose features are the gap's means, of the corrected label.
    split : str
        Which steps are judged: ``train``, ``valid`` or ``test``.

    Returns
    -------
    DataFrame
        `experiment_id`, `label` (corrected, published), `features` (of `FEATURES`), `trained_on` (``own run``,
        ``other models``; ``all runs``: `values`; ``steps of all runs``: `fit_steps`), `variant` (constant, blackbox,
        physical), `mape_percent`, `mspe_percent`, `n`.

    Raises
    ------
    InputError
        As `gap_means` and `fit_steps`, or if no step is of the split.
    """
    if not (table["split"] == split).any():
        raise InputError(f"`table` has no step of `split={split!r}`; it has {sorted(table['split'].unique())}.")
    kinds: list[tuple[str, pd.DataFrame, pd.DataFrame | None]] = [(SAMPLED_STEP, table, None)]
    if rebuilt is not None:
        kinds.append((GAP_MEAN, gap_means(table, rebuilt), rebuilt))
    rows = []
    for kind, counts, every in kinds:
        features = step_features(table, experiments, every)
        everywhere = {"all runs": values, "steps of all runs": fit_steps(table, features, experiments).values}
        for name in table["experiment_id"].unique():
            own = (table["experiment_id"] == name).to_numpy()
            judged = own & (table["split"] == split).to_numpy()
            family = _families(table)[own][0]
            left_out = (values_without or {}).get(family)
            learned = everywhere | ({} if left_out is None else {"other models": left_out})
            physical = {
                (trained_on, "physical"): PhysicalModel().predict_us(own_values, features.rows(judged))
                for trained_on, own_values in learned.items()
            }
            for label, column in LABELS.items():
                if kind == GAP_MEAN and label == "published":
                    continue  # It is of the sampled step alone.
                actual = table[column].to_numpy(dtype=float)
                predictions = _baselines(counts, actual, own, judged, _families(table) != family)
                predictions |= physical if label == "corrected" else {}
                about = {"experiment_id": name, "label": label, "features": kind}
                rows += [about | _scored(who, p, actual[judged]) for who, p in predictions.items()]
    return pd.DataFrame(rows)


def _baselines(
    table: pd.DataFrame, actual: FloatArray, own: BoolArray, judged: BoolArray, others: BoolArray
) -> dict[tuple[str, str], FloatArray]:
    """What a constant and a line predict, fitted to the training steps of the run or of other models."""
    train = (table["split"] == "train").to_numpy()
    predictions = {}
    for trained_on, chosen in (("own run", own & train), ("other models", others & train)):
        if chosen.any():
            predictions[trained_on, "constant"] = np.full(int(judged.sum()), np.median(actual[chosen]))
            predictions[trained_on, "blackbox"] = _relative_line(table, actual, chosen, judged)
    return predictions


def _relative_line(table: pd.DataFrame, actual: FloatArray, chosen: BoolArray, judged: BoolArray) -> FloatArray:
    """Least squares of relative errors on an intercept, prefill and decode tokens: the study's two features."""
    x = np.column_stack([np.ones(len(table)), table["prefill_tokens"], table["decode_tokens"]]).astype(float)
    weighted = x[chosen] / actual[chosen, None]
    line = np.linalg.lstsq(weighted, np.ones(int(chosen.sum())), rcond=None)[0]
    return np.maximum(x[judged] @ line, 1.0)


def _scored(who: tuple[str, str], predicted: FloatArray, actual: FloatArray) -> dict[str, object]:
    return {
        "trained_on": who[0],
        "variant": who[1],
        "mape_percent": mape_percent(predicted, actual),
        "mspe_percent": mspe_percent(predicted, actual),
        "n": int(actual.size),
    }


def _families(table: pd.DataFrame) -> NDArray[np.object_]:
    """Name of each row's model, whichever copy of its weights was served."""
    return table["model"].astype(str).str.removesuffix("-hf").to_numpy(dtype=object)


if __name__ == "__main__":
    main()
