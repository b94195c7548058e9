"""The study ``kernel_model``: a few scales of the kernel model learned on the 16 runs, closed loop, and what they are worth.

Everything else comes from kernel tables and datasheets. ``python -m stepcal.studies.kernels.kernel_model`` fits and prints
the coefficient file; freezing it is a decision of the maintainer's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Calibration, Run, calibrate, prepare_runs, run_latencies_s
from stepcal.calibration.uncertainty import parameter_table
from stepcal.evaluation.cross_validation import errors_by_run, folds
from stepcal.evaluation.latency_errors import compare
from stepcal.experiments.latencies import latency_table, measured_latencies
from stepcal.step_time.coefficients import DEFAULT, load_coefficients
from stepcal.step_time.learned import KERNELS
from stepcal.studies.published_runs import load_experiments
from stepcal.studies.study import Tables

DIGITS = 6
"""Significant digits of frozen parameters."""
SPLITS = ("whole", "test")
DESCRIPTION = (
    "Step time from measured kernels (stepcal.step_time.kernel_model); scales learned closed loop, stage means of the first "
    "60% of arrivals of the 16 experiments (H100 SXM, vLLM 0.15.1); everything else from data/hardware/kernels.csv"
)


def fit_kernel_model(runs: Sequence[Run], *, workers: int = 1) -> Calibration:
    """Fit the kernel model's parameters to the training targets of runs, from their priors."""
    return calibrate(runs=runs, model=KERNELS, workers=workers)


def coefficient_file(fitted: Calibration, *, frozen: str, seed: int = 0) -> dict[str, Any]:
    """Return a calibration of the kernel model as the content of a coefficient file.

    Parameters
    ----------
    fitted : Calibration
    frozen : str
        Day.
    seed : int
        Of the bootstrap behind the intervals.
    """
    table, _ = parameter_table(fitted, seed=seed)

    def digits(value: float) -> float:
        return float(f"{value:.{DIGITS}g}")

    parameters = [
        {
            "name": row["name"],
            "value": digits(row["value"]),
            "unit": row["unit"],
            "low": digits(row["low"]),
            "high": digits(row["high"]),
            "identified": bool(row["identified"]),
        }
        for row in table.to_dict("records")
    ]
    return {"variant": KERNELS.variant, "description": DESCRIPTION, "frozen": frozen, "parameters": parameters}


def run_kernel_model(requests: pd.DataFrame, *, workers: int = 2, seed: int = 0) -> tuple[Tables, dict[str, str]]:
    """Fit the kernel model to the 16 runs again, judge the frozen one on them, and leave each model out.

    Parameters
    ----------
    requests : DataFrame
        Measured requests of the 16 runs.
    workers : int
        Threads that simulate.
    seed : int
        Of the bootstrap.

    Returns
    -------
    tables : dict
        ``parameters`` (each learned parameter with its interval, prior and source), ``errors`` (of the means by run and
        split, frozen coefficients), ``percentiles``, ``folds`` (each model left out).
    texts : dict
        ``reproduced``: the largest relative difference between the frozen parameters and those fitted now.
    """
    runs = prepare_runs(load_experiments(requests))
    fitted, frozen = fit_kernel_model(runs, workers=workers), load_coefficients(DEFAULT).values
    parameters, _ = parameter_table(fitted, seed=seed)
    comparisons = compare_kernel_runs(runs, frozen)
    is_tail = comparisons["statistic"].isin(["p50", "p90", "p99"]) & (comparisons["split"] == "whole")
    left_out = []
    for fold in folds(runs, "model"):
        train = [run for run in runs if run.experiment.experiment_id in fold.train]
        judged = [run for run in runs if run.experiment.experiment_id in fold.judged]
        values = fit_kernel_model(train, workers=workers).values
        left_out.append(errors_by_run(compare_kernel_runs(judged, values), judged, "whole").assign(fold=fold.name))
    tables = {
        "parameters": parameters.assign(frozen=[frozen[name] for name in parameters["name"]]),
        "errors": pd.concat([errors_by_run(comparisons, runs, split) for split in SPLITS], ignore_index=True),
        "percentiles": comparisons[is_tail].reset_index(drop=True),
        "folds": pd.concat(left_out, ignore_index=True),
    }
    moved = max(abs(fitted.values[name] / frozen[name] - 1.0) for name in fitted.values)
    return tables, {"reproduced": f"{moved:.1e}"}


def compare_kernel_runs(runs: Sequence[Run], values: dict[str, float]) -> pd.DataFrame:
    """Compare the kernel model's predictions with the measurements of some of the 16 runs, at measured arrivals."""
    parts = []
    for run in runs:
        e2e, ttft = run_latencies_s(run, values, KERNELS)
        predicted = latency_table(e2e, ttft, run.experiment.workload.output_len, np.asarray(run.requests.stage))
        table = compare(predicted, measured_latencies(run.experiment))
        about = {"experiment_id": run.experiment.experiment_id, "variant": KERNELS.variant, "arrivals": "replayed"}
        parts.append(table.assign(**about))
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    """Fit to the traces that STEPCAL_DATA names and print the coefficient file."""
    import datetime

    from stepcal.datasets import load_requests

    fitted = fit_kernel_model(prepare_runs(load_experiments(load_requests())), workers=2)
    print(json.dumps(coefficient_file(fitted, frozen=datetime.date.today().isoformat()), indent=1))


if __name__ == "__main__":
    main()
