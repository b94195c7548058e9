"""The study ``ablations``: the numbers learned at other levels, from less data, for each model or phase alone.

Every fit sees the first 60% of arrivals, but the one from shipped summaries, which are of whole runs. All are judged as
`stepcal.studies.ablation_scores` does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Calibration, Run, Target, calibrate, fit_joint, fit_steps, prepare_runs
from stepcal.calibration.training_rows import RequestLevel, request_level, step_features, training_rows
from stepcal.datasets import experiments as experiments_table
from stepcal.datasets import load_requests, load_steps, measured
from stepcal.datasets.lifecycle import WHOLE_RUN
from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.reconstruction.labelled_steps import labelled_steps, rebuilt_steps
from stepcal.reconstruction.timeline import decode_intervals
from stepcal.step_time.coefficients import frozen_values
from stepcal.step_time.physical_parameters import API_PARAMETERS, PARAMETERS, priors
from stepcal.studies.ablation_scores import Fitted, choose, errors_of, summarise
from stepcal.studies.diagnosis.controlled import sums_against_requests
from stepcal.studies.model_forms import FORMS, PHASES, compare_forms, fit_form
from stepcal.studies.published_runs import load_experiments
from stepcal.units import MS_PER_S, BoolArray, FloatArray

Tables = dict[str, pd.DataFrame]

STEP, REQUEST, WORKLOAD, JOINT = "step", "request", "workload", "joint"
WORKLOAD_AGAIN = "workload, started at request"
SUMMARIES = "shipped summaries"
LEVELS = [STEP, REQUEST, WORKLOAD, WORKLOAD_AGAIN, JOINT, SUMMARIES]
"""What the same numbers are learned from, in the order of a table."""
BY_MODEL, BY_MODEL_REQUEST, BY_PHASE = "per model, joint", "per model, request", "per phase, request"
PAIRS = ((BY_MODEL, JOINT), (BY_MODEL_REQUEST, REQUEST), (BY_PHASE, REQUEST))
"""Variants with more numbers, and the global fit of their level."""
AGREES_SIGMAS = 2.0
"""Two levels agree on a number if their logarithms differ by at most so many standard deviations of both together."""


def run_ablations(steps: pd.DataFrame, requests: pd.DataFrame, *, workers: int = 2) -> tuple[Tables, dict[str, str]]:
    """Fit and judge all variants, and compare forms of the step time.

    Parameters
    ----------
    steps, requests : DataFrame
        Measured step rows and requests.
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    tables : dict
        ``numbers`` (a row a level and number), ``fits`` (a row a variant: numbers and objective), ``errors`` (signed, a row
        a variant, experiment and split), ``scores`` (their summary), ``choice`` (each variant with more numbers against the
        global one of its level), ``model_numbers``, ``forms``, ``form_values``, ``sums``.
    texts : dict
        Empty.
    """
    experiments, runs_table = load_experiments(requests), experiments_table()
    level = request_level(decode_intervals(requests, runs_table), experiments)
    rows, runs = training_rows(level), prepare_runs(experiments)
    labelled, every = labelled_steps(steps, requests, runs_table), rebuilt_steps(steps, requests, runs_table)
    at_request = calibrate(level=rows)
    fits = {
        STEP: fit_steps(labelled, step_features(labelled, experiments, every), experiments),
        REQUEST: at_request,
        WORKLOAD: calibrate(runs=runs, workers=workers),
        WORKLOAD_AGAIN: calibrate(runs=runs, start=at_request.values, workers=workers),
        JOINT: fit_joint(runs, rows, workers=workers),
        SUMMARIES: calibrate(runs=summary_runs(load_experiments()), workers=workers),
    }
    models = list(dict.fromkeys(run.experiment.architecture.name for run in runs))
    own = {model: fit_model(model, runs, level, workers=workers) for model in models}
    own_request = {model: calibrate(level=_rows_of(model, level)) for model in models}
    variants = [_global_variant(name, fit, models) for name, fit in fits.items()]
    variants += [
        _model_variant(BY_MODEL, own),
        _model_variant(BY_MODEL_REQUEST, own_request),
        _phase_variant(rows, models),
        Fitted("shipped default", "frozen", len(PARAMETERS), dict.fromkeys(models, frozen_values())),
    ]
    errors = pd.concat([errors_of(variant, runs, level) for variant in variants], ignore_index=True)
    scores = summarise(errors)
    forms, form_values = compare_forms(level, (*FORMS, PHASES))
    tables = {
        "numbers": numbers_table(fits),
        "fits": fits_table(fits, variants),
        "errors": errors,
        "scores": scores,
        "choice": choose(scores, {v.name: v.n_numbers for v in variants}, PAIRS),
        "model_numbers": numbers_table({JOINT: fits[JOINT], **own}),
        "forms": forms,
        "form_values": form_values,
        "sums": sums_against_requests([e for e in experiments if e.experiment_id.endswith("-general")]),
    }
    return tables, {}


def summary_runs(experiments: Sequence[Experiment], *, seed: int = 0) -> list[Run]:
    """Build runs from what ships: stage means as targets, Poisson arrivals of the rate asked for; no trace is needed.

    Prompts are as long as the median that ships, for the tokeniser makes more of them than was asked for. Stage means are of
    whole stages, so a fit of them has seen everything: it cannot be judged on later arrivals.

    Parameters
    ----------
    experiments : sequence of Experiment
        Of the 16; their measured requests, if any, are not used.
    seed : int
        Of the arrivals.

    Returns
    -------
    list of Run
        For `stepcal.calibration.closed_loop.calibrate`, workload level.

    Raises
    ------
    InputError
        If nothing ships about an experiment.
    """
    table = measured()
    return [_summary_run(experiment, table, seed) for experiment in experiments]


def _summary_run(experiment: Experiment, table: pd.DataFrame, seed: int) -> Run:
    own = table[table["experiment_id"] == experiment.experiment_id]
    known = own.set_index(["stage", "metric", "statistic"])["value"]
    if known.empty:
        raise InputError(
            f"measured.csv has no figures of `{experiment.experiment_id}`. It holds those of the 16 experiments only."
        )
    workload = experiment.workload
    workload = workload.with_prompt_len(float(known[WHOLE_RUN, "prompt_len", "p50"]))
    experiment = replace(experiment, requests=None, workload=workload)
    requests = experiment.arrivals("poisson", seed=seed)
    stages, targets = np.asarray(requests.stage), []
    for stage in np.unique(stages):
        chosen = stages == stage
        e2e, ttft = (float(known[int(stage), name, "mean"]) / MS_PER_S for name in ("e2e", "ttft"))
        counts = known[int(stage)]["requests"]
        values = {
            "e2e": e2e,
            "ttft": ttft,
            "tpot": (e2e - ttft) / (experiment.workload.output_len - 1),
            "completed": float(counts["completed"] / counts["requested"] * chosen.sum()),
        }
        targets.append(Target(int(stage), chosen, values))
    return Run(experiment, requests, tuple(targets))


def fit_model(model: str, runs: Sequence[Run], level: RequestLevel, *, workers: int = 1) -> Calibration:
    """Fit one model's runs alone, jointly at both levels; priors and objective as in the default."""
    own = [run for run in runs if run.experiment.architecture.name == model]
    return fit_joint(own, _rows_of(model, level), workers=workers)


def _rows_of(model: str, level: RequestLevel) -> RequestLevel:
    return training_rows(level.subset((level.rows["model"] == model).to_numpy()))


def is_informed_by_data(fitted: Calibration) -> BoolArray:
    """Which numbers the data say anything about, shape (n_parameters,); the others are left where the prior has them."""
    return np.any(fitted.jacobian[: len(fitted.labels)] != 0, axis=0)


def _global_variant(name: str, fitted: Calibration, models: Sequence[str]) -> Fitted:
    return Fitted(name, f"global, {name}", int(is_informed_by_data(fitted).sum()), dict.fromkeys(models, fitted.values))


def _model_variant(name: str, fits: Mapping[str, Calibration]) -> Fitted:
    n_numbers = int(sum(is_informed_by_data(fitted).sum() for fitted in fits.values()))
    return Fitted(name, "each model alone", n_numbers, {model: fitted.values for model, fitted in fits.items()})


def _phase_variant(rows: RequestLevel, models: Sequence[str]) -> Fitted:
    values = priors(API_PARAMETERS) | fit_form(PHASES, rows).values
    return Fitted(BY_PHASE, PHASES.what, len(PHASES.parameters), dict.fromkeys(models, values), PHASES)


def posterior_log_sd(fitted: Calibration) -> FloatArray:
    """Standard deviation of each number's logarithm, priors included, in the linearised fit; shape (n_parameters,)."""
    return np.sqrt(np.diag(np.linalg.inv(fitted.jacobian.T @ fitted.jacobian)))


def numbers_table(fits: Mapping[str, Calibration]) -> pd.DataFrame:
    """Put the numbers of several fits under each other.

    Returns
    -------
    DataFrame
        `fit`, `name`, `unit`, `value`, `log_sd` (`posterior_log_sd`), `told` (whether data say anything about it), `sigmas`
        (how far it is from the joint fit's, in standard deviations of both together) and `agrees`.
    """
    rows, base = [], fits[JOINT]
    base_sd = posterior_log_sd(base)
    for fit, fitted in fits.items():
        sd, known = posterior_log_sd(fitted), is_informed_by_data(fitted)
        sigmas = (fitted.log_values - base.log_values) / np.hypot(sd, base_sd)
        rows += [
            {
                "fit": fit,
                "name": p.name,
                "unit": p.unit,
                "value": fitted.values[p.name],
                "log_sd": float(sd[j]),
                "told": bool(known[j]),
                "sigmas": float(sigmas[j]),
                "agrees": bool(abs(sigmas[j]) <= AGREES_SIGMAS),
            }
            for j, p in enumerate(PARAMETERS)
        ]
    return pd.DataFrame(rows)


def fits_table(fits: Mapping[str, Calibration], variants: Sequence[Fitted]) -> pd.DataFrame:
    """Return what each variant is: `fit`, `what`, `n_numbers`, and of single fits `objective` and `n_evaluations`."""
    rows = []
    for variant in variants:
        fitted = fits.get(variant.name)
        objective = float(np.sum(fitted.residuals**2)) if fitted else np.nan
        evaluations = float(fitted.n_evaluations) if fitted else np.nan
        about = {"fit": variant.name, "what": variant.what, "n_numbers": variant.n_numbers}
        rows.append({**about, "objective": objective, "n_evaluations": evaluations})
    return pd.DataFrame(rows)


def main() -> None:
    """Print the study's tables: ``python -m stepcal.studies.ablations``, on the traces that STEPCAL_DATA names."""
    started = time.perf_counter()
    tables, _ = run_ablations(load_steps(), load_requests())
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(float_format='{:.4g}'.format)}")
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
