"""Every step-time model, end to end, on all 16 experiments: the half of H2 that the study never ran.

Models are fitted to the public step traces as on the pages before, then drive the simulator under replayed and under
generated arrivals. Two yardsticks know nothing of steps: the mean latency of an experiment's first arrivals, and a constant
pace taken from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from stepcal.calibration.variants import FittedVariant, fit_variant
from stepcal.datasets.splits import Split, temporal_split
from stepcal.evaluation.latency_errors import compare, judged_error_percent, mean_errors, pace_step_time, training_mean
from stepcal.experiments.experiment import Experiment, run_experiment
from stepcal.experiments.latencies import LATENCIES, TEST, WHOLE, measured_latencies, predicted_latencies
from stepcal.simulator import CompiledStepTime, SimulationResult
from stepcal.specs.hardware import Accelerator, load_accelerator
from stepcal.step_time.baselines import BATCH_FEATURES, GradientBoosting
from stepcal.step_time.compile import AnyStepTime, compile_baseline, compile_corrections
from stepcal.step_time.corrections import Model36
from stepcal.studies.evidence import NO_FEATURES
from stepcal.studies.published_runs import load_experiments
from stepcal.units import MS_PER_S, US_PER_S

POOLED_VARIANTS = ("global9", "phase16", "model36")
STEP_BASELINES = ("constant", "bucket", "blackbox")
PROCESSES = ("replayed", "poisson")
TRAINING_MEAN, PACE, BOOSTED = "training_mean", "pace", "xgboost"


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
        for variant, step_time in _step_times(experiment, fitted, boosted, accelerator):
            for process in PROCESSES:
                result = run_experiment(experiment, step_time, process=process, seed=seed)
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


def _fit_boosted(split: Split) -> dict[str, GradientBoosting]:
    """Trees that see only what a simulator knows before a step runs."""
    valid = dict(iter(split.valid.groupby("experiment_id", observed=True)))
    return {
        str(experiment): GradientBoosting(features=BATCH_FEATURES).fit(train, valid[experiment])
        for experiment, train in split.train.groupby("experiment_id", observed=True)
    }


def _step_times(
    experiment: Experiment,
    fitted: dict[str, FittedVariant],
    boosted: dict[str, GradientBoosting],
    accelerator: Accelerator,
) -> Iterator[tuple[str, AnyStepTime]]:
    """Yield each model that says anything about an experiment, compiled for it."""
    deployment = replace(experiment.deployment, accelerator=accelerator)
    yield PACE, pace_step_time(experiment)
    for name in POOLED_VARIANTS:
        found = fitted[name].fit
        if found is None or (
            isinstance(found.model, Model36) and experiment.architecture.name not in found.model.families
        ):
            continue
        yield name, compile_corrections(found.model, found.theta, deployment)
    baselines = {n: fitted[n].baselines.get(experiment.experiment_id) for n in ("raw", *STEP_BASELINES)}
    if baselines["raw"] is None:
        baselines["raw"] = next(iter(fitted["raw"].baselines.values()))
    baselines[BOOSTED] = boosted.get(experiment.experiment_id)
    for name, baseline in baselines.items():
        if baseline is not None:
            yield name, compile_baseline(baseline, deployment)


def run_with_pace(experiment: Experiment, *, kv_blocks: int | None = None, seed: int = 0) -> SimulationResult:
    """Simulate an experiment at its measured mean time per output token, with generated arrivals and all steps recorded.

    Parameters
    ----------
    experiment : Experiment
    kv_blocks : int, optional
        Another number of KV blocks than the server had.
    seed : int
    """
    known = measured_latencies(experiment).set_index(["split", "metric", "statistic"])["value"]
    pace = CompiledStepTime(constant_us=float(known[WHOLE, "tpot", "mean"]) * US_PER_S / MS_PER_S)
    if kv_blocks is not None:
        experiment = experiment.with_server(kv_blocks=kv_blocks)
    return run_experiment(experiment, pace, process="poisson", seed=seed, record_steps=1.0)
