"""Predict the latencies of measured runs from arrivals alone, and put them beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.evaluation.latency_errors import compare, judged_error_percent, mean_errors
from stepcal.experiments.experiment import Experiment, run_experiment
from stepcal.experiments.latencies import (
    LATENCIES,
    WHOLE,
    latency_summary,
    measured_latencies,
    predicted_latencies,
    served_per_s,
)
from stepcal.simulator import SimulationResult
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.units import US_PER_S

BELOW_PERCENT = 10.0
"""The bound of H2 on an experiment's mean E2E error."""


def evaluate(
    coefficients: StepTimeModel,
    cases: Iterable[Experiment | tuple[Experiment, pd.DataFrame]],
    *,
    process: str | None = None,
    seed: int = 0,
    on_error: Callable[[str, InputError], None] | None = None,
) -> dict[str, Any]:
    """Simulate experiments with given coefficients and put the result beside what was measured, ready for JSON.

    Parameters
    ----------
    coefficients : StepTimeModel
    cases : iterable of Experiment, or of (Experiment, DataFrame)
        The second is what was measured, as `stepcal.experiments.latencies.latency_table` gives it; by default what the
        experiment says of itself.
    process : str, optional
        ``replayed``, or a process that generates arrivals; by default replayed where measured requests are at hand, else
        Poisson.
    seed : int
    on_error : callable, optional
        Told the name and the error of an experiment that cannot be simulated, which is then left out; by default the error
        is raised.

    Returns
    -------
    dict
        `arrivals` (``mixed`` where experiments differ), `per_experiment`, `mean_abs_e2e_error_percent`,
        `n_below_10_percent`, `mspe_percent`. Each experiment has its own `arrivals`, and `notes` on what was assumed of it.
        One that the coefficients say nothing about has null predictions and a `reason`.

    Raises
    ------
    InputError
        If requests cannot be replayed or served; the experiment is named.

    Examples
    --------
    >>> import stepcal
    >>> runs = stepcal.Experiment.read_folder("my-runs")
    >>> result = stepcal.evaluate(stepcal.StepTimeModel.load("default"), runs)
    >>> result["arrivals"], result["n_below_10_percent"]
    ('replayed', 1)
    """
    rows = []
    for case in cases:
        experiment, known = _with_measured(case)
        try:
            rows.append(_evaluate_one(coefficients, experiment, known, process or experiment.default_process, seed))
        except InputError as error:
            if on_error is None:
                raise
            on_error(experiment.experiment_id, error)
    arrivals = {row["arrivals"] for row in rows}
    signed = [row["e2e_error_percent"] for row in rows if row["e2e_error_percent"] is not None]
    judged = [row["judged_error_percent"] for row in rows if row["judged_error_percent"] is not None]
    return {
        "arrivals": arrivals.pop() if len(arrivals) == 1 else "mixed",
        "per_experiment": rows,
        "mean_abs_e2e_error_percent": float(np.mean(np.abs(signed))) if signed else None,
        "n_below_10_percent": sum(error < BELOW_PERCENT for error in judged),
        "mspe_percent": float(np.mean(signed)) if signed else None,
    }


def _with_measured(case: Experiment | tuple[Experiment, pd.DataFrame]) -> tuple[Experiment, pd.DataFrame]:
    if not isinstance(case, Experiment):
        return case
    return case, measured_latencies(case) if case.measured is None else case.measured


def _evaluate_one(
    coefficients: StepTimeModel, experiment: Experiment, known: pd.DataFrame, process: str, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "experiment_id": experiment.experiment_id,
        "arrivals": process,
        "notes": list(experiment.notes),
    }
    row |= {"measured": latency_summary(known, WHOLE)}
    nothing = dict.fromkeys([*(f"{m}_error_percent" for m in LATENCIES), "judged_error_percent"])
    try:
        step_time = coefficients.of_experiment(experiment.experiment_id).compile(experiment.deployment)
    except InputError as error:
        return {**row, "predicted": None, **nothing, "reason": str(error)}
    row["notes"] = [*row["notes"], *coefficients.notes(experiment.deployment)]
    try:
        result = run_experiment(experiment, step_time, process=process, seed=seed, **coefficients.api_overheads_us())
    except InputError as error:
        raise type(error)(f"{experiment.experiment_id}: {error}") from None
    table = compare(predicted_latencies(result, experiment.workload.output_len), known)
    errors = mean_errors(table.assign(experiment_id=experiment.experiment_id, variant="", arrivals=process))
    predicted = result.summary()
    predicted["overall"]["requests_per_s"] = _served_per_s(result, experiment.workload.timeout_s)
    row |= {"predicted": predicted["overall"], "predicted_stages": predicted["stages"]}
    row |= {"overloaded": experiment.overloaded}
    if errors.empty:
        return {**row, **nothing, "reason": "No request completed when it was measured."}
    judged = judged_error_percent(errors, {experiment.experiment_id: experiment.overloaded}).iloc[0]
    found = {f"{m}_error_percent": _number(errors[f"{m}_error_percent"].iloc[0]) for m in LATENCIES}
    return {**row, **found, "judged_error_percent": _number(judged)}


def _served_per_s(result: SimulationResult, timeout_s: float) -> float | None:
    """Completed requests per second, counted as the measured ones are."""
    sent, e2e = result.sent_us / US_PER_S, result.e2e_us() / US_PER_S
    done = ~np.isnan(e2e)
    return served_per_s(sent, sent + np.where(done, e2e, timeout_s), done)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
