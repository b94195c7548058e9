"""Every step-time model, end to end, on all 16 experiments: the half of H2 that the study never ran.

Models are fitted to the public step traces as on the pages before, then drive the simulator under replayed and under
generated arrivals. Two yardsticks know nothing of steps: the mean latency of an experiment's first arrivals, and a constant
pace taken from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from stepcal.baselines import BATCH_FEATURES, GradientBoosting
from stepcal.clocks import Clock, baseline_clock, correction_clock
from stepcal.coefficients import Coefficients
from stepcal.corrections import Model36
from stepcal.end_to_end import (
    LATENCIES,
    TEST,
    US_PER_S,
    WHOLE,
    Experiment,
    compare,
    judged_error_percent,
    latency_summary,
    load_experiments,
    mean_errors,
    measured_latencies,
    pace_clock,
    predicted_latencies,
    run_experiment,
    served_per_s,
    training_mean,
)
from stepcal.errors import InputError
from stepcal.evidence import NO_FEATURES
from stepcal.hardware import Accelerator, load_accelerator
from stepcal.simulator import SimulationResult
from stepcal.splits import Split, temporal_split
from stepcal.variants import FittedVariant, fit_variant

POOLED_VARIANTS = ("global9", "phase16", "model36")
STEP_BASELINES = ("constant", "bucket", "blackbox")
PROCESSES = ("replayed", "poisson")
TRAINING_MEAN, PACE, BOOSTED = "training_mean", "pace", "xgboost"
BELOW_PERCENT = 10.0
"""The bound of H2 on an experiment's mean E2E error."""


def run_end_to_end(
    steps: pd.DataFrame, requests: pd.DataFrame, *, seed: int = 0
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Fit all variants to step traces and simulate the 16 experiments with each.

    Parameters
    ----------
    steps, requests : DataFrame
        Validated step and request rows.
    seed : int
        Of the generated arrivals.

    Returns
    -------
    tables : dict
        ``errors`` (of each mean, by split, variant and arrivals), ``latencies`` (predicted and measured mean and
        percentiles of whole runs and stages, replayed arrivals), ``runs`` (steps, preemptions, failures), ``evidence``
        (what H2's end-to-end criteria look at).
    texts : dict
        Empty.
    """
    split, accelerator = temporal_split(steps), load_accelerator("h100-sxm")
    fitted = {name: fit_variant(name, split, accelerator) for name in (*POOLED_VARIANTS, "raw", *STEP_BASELINES)}
    boosted = _fit_boosted(split)
    comparisons, runs = [], []
    cases = load_experiments(requests)
    for experiment in cases:
        known = measured_latencies(experiment)
        about: dict[str, Any] = {"experiment_id": experiment.experiment_id}
        yardstick = compare(training_mean(experiment), known)
        comparisons.append(yardstick.assign(**about, variant=TRAINING_MEAN, arrivals="replayed"))
        for variant, clock in _clocks(experiment, fitted, boosted, accelerator):
            for process in PROCESSES:
                result = run_experiment(experiment, clock, process=process, seed=seed)
                table = compare(predicted_latencies(result, experiment.workload.output_len), known)
                comparisons.append(table.assign(**about, variant=variant, arrivals=process))
                failed = len(result.requests) - int(result.is_finished.sum())
                counts = {"steps": result.steps, "preemptions": result.preemptions, "failed": failed}
                runs.append({**about, "variant": variant, "arrivals": process, **counts})
    everything = pd.concat(comparisons, ignore_index=True)
    errors = pd.concat([mean_errors(everything, s).assign(split=s) for s in (WHOLE, TEST)], ignore_index=True)
    shown = everything[(everything["arrivals"] == "replayed") & (everything["split"] != TEST)]
    trained = {str(m) for m in steps["model"].unique()}
    tables = {
        "errors": errors,
        "latencies": shown[shown["metric"].isin(LATENCIES)].drop(columns=["arrivals"]).reset_index(drop=True),
        "runs": pd.DataFrame(runs),
        "evidence": e2e_evidence(errors, cases, trained),
    }
    return tables, {}


def e2e_evidence(errors: pd.DataFrame, cases: list[Experiment], trained_models: set[str]) -> pd.DataFrame:
    """Return the E2E error of each pooled variant and experiment, NaN where the model has no public training features.

    Parameters
    ----------
    errors : DataFrame
        Of `run_end_to_end`.
    cases : list of Experiment
    trained_models : set of str
        Models whose step traces took part in the fit.

    Returns
    -------
    DataFrame
        `variant`, `experiment_id`, `value` (percent), `reason`.
    """
    whole = errors[(errors["split"] == WHOLE) & (errors["arrivals"] == "replayed")]
    overloaded = {c.experiment_id: c.overloaded for c in cases}
    judged = whole.assign(value=judged_error_percent(whole, overloaded))
    value = judged.set_index(["variant", "experiment_id"])["value"]
    rows = []
    for variant in POOLED_VARIANTS:
        for case in cases:
            known = case.architecture.name in trained_models
            rows.append(
                {
                    "variant": variant,
                    "experiment_id": case.experiment_id,
                    "value": float(value.get((variant, case.experiment_id), np.nan)) if known else np.nan,
                    "reason": "" if known else NO_FEATURES,
                }
            )
    return pd.DataFrame(rows)


def evaluate(
    coefficients: Coefficients,
    cases: list[tuple[Experiment, pd.DataFrame]],
    *,
    process: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Simulate experiments with given coefficients and put the result beside what was measured, ready for JSON.

    Parameters
    ----------
    coefficients : Coefficients
    cases : list of (Experiment, DataFrame)
        The second is what was measured, as `stepcal.end_to_end.latency_table` gives it.
    process : str, optional
        ``replayed``, or a process that generates arrivals; by default replayed where measured requests are at hand, else
        Poisson.
    seed : int

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
    """
    rows = [
        _evaluate_one(coefficients, experiment, known, process or experiment.default_process, seed)
        for experiment, known in cases
    ]
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


def _evaluate_one(
    coefficients: Coefficients, experiment: Experiment, known: pd.DataFrame, process: str, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "experiment_id": experiment.experiment_id,
        "arrivals": process,
        "notes": list(experiment.notes),
    }
    row |= {"measured": latency_summary(known, WHOLE)}
    nothing = dict.fromkeys([*(f"{m}_error_percent" for m in LATENCIES), "judged_error_percent"])
    try:
        clock = coefficients.of_experiment(experiment.experiment_id).clock(
            experiment.architecture,
            experiment.accelerator,
            experiment.server,
            tensor_parallel=experiment.tensor_parallel,
        )
    except InputError as error:
        return {**row, "predicted": None, **nothing, "reason": str(error)}
    try:
        result = run_experiment(experiment, clock, process=process, seed=seed, **coefficients.api_overheads_us())
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


def _fit_boosted(split: Split) -> dict[str, GradientBoosting]:
    """Trees that see only what a simulator knows before a step runs."""
    valid = dict(iter(split.valid.groupby("experiment_id", observed=True)))
    return {
        str(experiment): GradientBoosting(features=BATCH_FEATURES).fit(train, valid[experiment])
        for experiment, train in split.train.groupby("experiment_id", observed=True)
    }


def _clocks(
    experiment: Experiment,
    fitted: dict[str, FittedVariant],
    boosted: dict[str, GradientBoosting],
    accelerator: Accelerator,
) -> Iterator[tuple[str, Clock]]:
    """Yield each model that says anything about an experiment, as a clock."""
    server, architecture = experiment.server, experiment.architecture
    degree = experiment.tensor_parallel
    yield PACE, pace_clock(experiment)
    for name in POOLED_VARIANTS:
        found = fitted[name].fit
        if found is None or (isinstance(found.model, Model36) and architecture.name not in found.model.families):
            continue
        clock = correction_clock(found.model, found.theta, architecture, accelerator, server, tensor_parallel=degree)
        yield name, clock
    baselines = {n: fitted[n].baselines.get(experiment.experiment_id) for n in ("raw", *STEP_BASELINES)}
    if baselines["raw"] is None:
        baselines["raw"] = next(iter(fitted["raw"].baselines.values()))
    baselines[BOOSTED] = boosted.get(experiment.experiment_id)
    for name, baseline in baselines.items():
        if baseline is not None:
            yield name, baseline_clock(baseline, architecture, accelerator, server, tensor_parallel=degree)
