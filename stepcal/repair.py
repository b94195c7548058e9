"""The study ``repair``: the physical model calibrated, judged, cross-validated, and what its numbers are worth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stepcal.calibration import PARAMETERS, Calibration, prepare_runs
from stepcal.coefficients import DEFAULT, load_coefficients
from stepcal.end_to_end import load_experiments
from stepcal.next_experiments import rank_next_experiments
from stepcal.reconstruction import decode_intervals
from stepcal.request_level import request_level, training_rows
from stepcal.step_level import labelled_steps, rebuilt_steps, step_scores
from stepcal.transfer import (
    baseline,
    cross_validate,
    e2e_intervals,
    errors_by_run,
    evaluate,
    first_requests,
    fit_joint,
    parameter_table,
    request_scores,
    singular_values,
)

Tables = dict[str, pd.DataFrame]

SPLITS = ("whole", "test", "stage 0", "stage 1")
FROZEN_TOLERANCE = 1e-3
"""How far a recomputed number may be from the frozen one; the optimiser stops at 1e-3 of its objective."""


def run_repair(
    steps: pd.DataFrame,
    requests: pd.DataFrame,
    runs_table: pd.DataFrame,
    *,
    stage_starts_ns: Mapping[str, Sequence[float]] | None = None,
    workers: int = 2,
    seed: int = 0,
) -> tuple[Tables, dict[str, str]]:
    """Calibrate, cross-validate and judge, closed loop.

    Judged is the frozen default; the calibration is run again to show that it gives the same numbers.

    Parameters
    ----------
    steps, requests : DataFrame
        Measured step rows and requests.
    runs_table : DataFrame
        ``experiments.csv``.
    stage_starts_ns : mapping, optional
        See `stepcal.labels.step_intervals`.
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
        ``reproduced``: the largest relative difference between the frozen numbers and those calibrated now.
    """
    experiments = load_experiments(requests)
    level = request_level(decode_intervals(requests, runs_table), experiments)
    runs = prepare_runs(experiments)
    fitted = fit_joint(runs, training_rows(level), workers=workers)
    frozen = frozen_theta()
    parameters, draws = parameter_table(fitted, seed=seed)
    folds, values = cross_validate(runs, level, workers=workers)
    comparisons = pd.concat([evaluate(runs, frozen, DEFAULT), baseline(runs)], ignore_index=True)
    errors = pd.concat([errors_by_run(comparisons, runs, split) for split in SPLITS], ignore_index=True)
    wanted = (comparisons["variant"] == DEFAULT) & (comparisons["split"] == "whole")
    without = values[values["leave_out"] == "model"].pivot(index="fold", columns="name", values="value")
    theta_without = {str(m): row[[p.name for p in PARAMETERS]].to_numpy(dtype=float) for m, row in without.iterrows()}
    labelled = labelled_steps(steps, requests, runs_table, stage_starts_ns=stage_starts_ns)
    tables = {
        "parameters": parameters.assign(frozen=frozen),
        "singular_values": singular_values(fitted),
        "errors": errors,
        "percentiles": comparisons[wanted & comparisons["statistic"].isin(["p50", "p90", "p99"])].reset_index(
            drop=True
        ),
        "requests": request_scores(level, frozen),
        "first_requests": first_requests(runs, frozen),
        "steps": step_scores(
            labelled, experiments, frozen, theta_without, rebuilt=rebuilt_steps(steps, requests, runs_table)
        ),
        "folds": folds,
        "fold_values": values,
        "e2e_intervals": e2e_intervals(runs, frozen, draws),
        "next_experiments": rank_next_experiments(fitted),
    }
    return tables, {"reproduced": f"{reproduction_error(fitted):.1e}"}


def frozen_theta() -> np.ndarray:
    """Return the frozen default in the order of `stepcal.calibration.PARAMETERS`."""
    values = load_coefficients(DEFAULT).values
    return np.array([values[p.name] for p in PARAMETERS])


def reproduction_error(fitted: Calibration) -> float:
    """Return the largest relative difference between a calibration and the frozen default."""
    return float(np.max(np.abs(fitted.theta / frozen_theta() - 1.0)))


def main() -> None:
    """Print the study's tables: ``python -m stepcal.repair``, on the traces that STEPCAL_DATA names."""
    from stepcal.datasets import experiments, load_requests, load_steps

    started = time.perf_counter()
    tables, texts = run_repair(load_steps(), load_requests(), experiments())
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(float_format='{:.4g}'.format)}")
    print(f"\nfrozen numbers reproduced to {texts['reproduced']}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
