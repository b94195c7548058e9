"""Evidence for the hypotheses after the repair: H1b and H2b on the 16 experiments, H3 on servers that nobody here has seen.

Every row is a value of one quantity, variant and unit, as ``book/preregistrations/{h1b,h2b,h3}.yaml`` ask for; what cannot
be evaluated has NaN and the reason. The readings that the code follows are those of the frozen files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Run, calibrate, prepare_runs, run_latencies_s
from stepcal.calibration.training_rows import RequestLevel, step_features
from stepcal.datasets import load_stages
from stepcal.datasets.splits import split_starts
from stepcal.evaluation.evaluate import evaluate
from stepcal.evaluation.step_errors import FEWEST_STEPS_FOR_R, POOLED
from stepcal.experiments.experiment import Experiment
from stepcal.experiments.folders import read_supported_runs
from stepcal.metrics import pearson_r
from stepcal.reconstruction.checks import estimate_offset_us
from stepcal.reconstruction.labelled_steps import labelled_steps
from stepcal.reconstruction.labels import stage_starts_ns
from stepcal.reconstruction.timeline import build_timeline, request_lives
from stepcal.step_time.coefficients import DEFAULT, PHYSICAL_DEFAULT, StepTimeModel, frozen_values, load_coefficients
from stepcal.step_time.physical import PhysicalModel
from stepcal.step_time.physical_parameters import STEP_PARAMETERS
from stepcal.studies.published_runs import STUDY_OFFLOAD_GIB, load_experiments
from stepcal.units import PERCENT, FloatArray

Tables = dict[str, pd.DataFrame]

COMPONENTS = {
    "prefill_gemm": ("pure_prefill", "weights_gemm"),
    "prefill_attn": ("pure_prefill", "prefill_attention"),
    "decode_gemm": ("pure_decode", "weights_gemm"),
    "decode_attn": ("pure_decode", "kv"),
}
"""Phase of each component of H1b, and its name in `stepcal.step_time.physical.PhysicalModel.components_us`."""
PHYSICAL_COMPONENTS = "physical_components"
R_POOLED, R_PART = "r_pooled", "r_part"
NOTHING_COMPLETES = "nothing completes in the simulation"
NO_TEST_REQUESTS = "no completed request among the last 20% of arrivals"
LEAVE_OUT_VARIANTS = {
    "stage": "leave_one_stage_out",
    "workload": "leave_one_workload_out",
    "model": "leave_one_model_out",
}
H3_COEFFICIENTS = PHYSICAL_DEFAULT
"""The coefficients that H3 froze."""
SEEDS = range(5)
"""Seeds of the Poisson arrivals of H3, whose mean prediction is judged."""
REPLAYED, POISSON = "measured arrivals, replayed", "Poisson arrivals, mean over seeds 0 to 4"
JUDGED_FILES = frozenset({".yaml", ".yml", ".json", ".csv", ".parquet"})
"""Endings of what a folder of experiments is judged by."""
OVERLOADED_BELOW = 0.9
"""Share of the offered requests below which H3 calls a run overloaded."""
BOARDS = {
    "h100-sxm": "default_h100",
    "h100-nvl": "default_h100",
    "a100-80gb": "default_a100",
    "l40s": "default_l40s",
}
"""Variant of H3's evidence by GPU; H3 speaks of no other."""
CALIBRATION, OTHER_GPU = "calibration", "other_gpu"
"""Variants of runs that H3 does not judge."""
NOTHING_COMPLETES_PERCENT = -PERCENT
"""Error of a prediction in which nothing completes although something did: it must not escape as not evaluable."""
EVIDENCE_COLUMNS = ("quantity", "variant", "unit", "value", "reason")
NAN = float("nan")


def run_physical_evidence(
    steps: pd.DataFrame, requests: pd.DataFrame, runs_table: pd.DataFrame
) -> tuple[Tables, dict[str, str]]:
    """Compute what H1b and H2b ask for beyond the tables of `stepcal.studies.physical_model.run_physical_model`.

    Parameters
    ----------
    steps, requests : DataFrame
        Measured step rows and requests.
    runs_table : DataFrame
        ``experiments.csv``.

    Returns
    -------
    tables : dict
        ``components`` (of `component_correlations`), ``component_fit`` (numbers fitted to the training steps),
        ``intervals`` (of `closed_loop_intervals`).
    texts : dict
        Empty.
    """
    experiments = load_experiments(requests)
    offsets = {}
    for name, own in steps.groupby("experiment_id", observed=True):
        lives = request_lives(requests[requests["experiment_id"] == name], runs_table)
        offsets[str(name)] = estimate_offset_us(own, build_timeline(lives))
    starts = stage_starts_ns(requests, load_stages(), offsets)
    labelled = labelled_steps(steps, requests, runs_table, stage_starts_ns=starts)
    components, values = component_correlations(labelled, experiments)
    fitted = [{"name": p.name, "unit": p.unit, "value": values[p.name]} for p in STEP_PARAMETERS]
    intervals = closed_loop_intervals(prepare_runs(experiments), frozen_values())
    return {"components": components, "component_fit": pd.DataFrame(fitted), "intervals": intervals}, {}


def component_correlations(
    labelled: pd.DataFrame, experiments: list[Experiment]
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Fit the physical model to the training steps and correlate its components with the test steps of their pure phase.

    Parameters
    ----------
    labelled : DataFrame
        Of `stepcal.reconstruction.labelled_steps.labelled_steps`.
    experiments : list of Experiment

    Returns
    -------
    correlations : DataFrame
        `quantity` (``r_pooled``: with the step time; ``r_part``: with the step time less all other components),
        `component`, `phase`, `scope` (``pooled`` or an experiment), `r`, `n_steps`, `reason` where r is NaN.
    values : dict
        Parameters by name as fitted to the training steps.
    """
    features = step_features(labelled, experiments)
    train = (labelled["split"] == "train").to_numpy()
    rows = labelled.loc[train, ["experiment_id", "interval_us"]].reset_index(drop=True)
    overloaded = {e.experiment_id: e.overloaded for e in experiments}
    level = RequestLevel(rows.assign(overloaded=rows["experiment_id"].map(overloaded)), features.rows(train))
    values = calibrate(level=level).values
    parts = PhysicalModel().components_us(values, features)
    return correlate_parts(labelled, parts), values


def correlate_parts(labelled: pd.DataFrame, parts: Mapping[str, FloatArray]) -> pd.DataFrame:
    """Return Pearson's r of each component on the test steps of its phase; see `component_correlations`.

    Parameters
    ----------
    labelled : DataFrame
        `experiment_id`, `split`, `interval_us`, `prefill_tokens`, `decode_tokens`.
    parts : mapping of str to ndarray
        All components of the step time, which add up to it.
    """
    actual = labelled["interval_us"].to_numpy(dtype=float)
    total = np.sum(list(parts.values()), axis=0)
    prefill, decode = (labelled[c].to_numpy() > 0 for c in ("prefill_tokens", "decode_tokens"))
    phases = {"pure_prefill": prefill & ~decode, "pure_decode": decode & ~prefill}
    test = (labelled["split"] == "test").to_numpy()
    names = labelled["experiment_id"].astype(str).to_numpy()
    scopes = {POOLED: test} | {name: test & (names == name) for name in sorted(set(names))}
    rows = []
    for component, (phase, part) in COMPONENTS.items():
        own = np.asarray(parts[part], dtype=float)
        for quantity, label in ((R_POOLED, actual), (R_PART, actual - (total - own))):
            for scope, in_scope in scopes.items():
                chosen = in_scope & phases[phase]
                about = {"quantity": quantity, "component": component, "phase": phase, "scope": scope}
                rows.append(about | _correlation(own[chosen], label[chosen]))
    return pd.DataFrame(rows)


def h1b_evidence(components: pd.DataFrame) -> pd.DataFrame:
    """Evidence for H1b: both correlations of the four components over the pooled test steps.

    Parameters
    ----------
    components : DataFrame
        Of `component_correlations`.
    """
    pooled = components[components["scope"] == POOLED]
    rows = [
        evidence_row(r["quantity"], PHYSICAL_COMPONENTS, r["component"], r["r"], f"{r['phase']}: {r['reason']}")
        for r in pooled.to_dict("records")
    ]
    return evidence_table(rows)


def closed_loop_intervals(runs: list[Run], values: Mapping[str, float]) -> pd.DataFrame:
    """Compare the decode interval of each test request, simulated from arrivals alone, with the measured one.

    Parameters
    ----------
    runs : list of Run
    values : mapping of str to float
        Parameters by name, API overheads included.

    Returns
    -------
    DataFrame
        `experiment_id`, `mspe_percent` (mean over requests of the signed percentage error), `mape_percent`, `n` (requests
        of the test split that completed in both), `n_measured` (that completed when measured), `reason` where NaN.
    """
    rows = []
    for run in runs:
        table = run.experiment.requests
        if table is None:  # `prepare_runs` refuses such a run
            continue
        e2e, ttft = run_latencies_s(run, values)
        known = (table["e2e_s"] - table["ttft_s"]).to_numpy(dtype=float)
        in_test = np.arange(len(table)) >= split_starts(len(table))[1]
        measured = ~table["has_error"].to_numpy(dtype=bool) & in_test
        both = measured & ~np.isnan(e2e)
        errors = PERCENT * ((e2e - ttft)[both] / known[both] - 1.0)
        reason = "" if both.any() else NOTHING_COMPLETES if measured.any() else NO_TEST_REQUESTS
        rows.append(
            {
                "experiment_id": run.experiment.experiment_id,
                "mspe_percent": float(errors.mean()) if both.any() else NAN,
                "mape_percent": float(np.abs(errors).mean()) if both.any() else NAN,
                "n": int(both.sum()),
                "n_measured": int(measured.sum()),
                "reason": reason,
            }
        )
    return pd.DataFrame(rows)


def h2b_evidence(errors: pd.DataFrame, folds: pd.DataFrame, intervals: pd.DataFrame) -> pd.DataFrame:
    """Evidence for H2b.

    Parameters
    ----------
    errors, folds : DataFrame
        Tables of `stepcal.studies.physical_model.run_physical_model`: errors of the means by run, variant and split, and of
        left-out runs.
    intervals : DataFrame
        Of `closed_loop_intervals`.

    Returns
    -------
    DataFrame
        Columns of evidence. Runs without a completed request in the test split have no rows there: the criteria speak of
        the others.
    """
    has_test = set(intervals.loc[intervals["n_measured"] > 0, "experiment_id"])
    own = errors[errors["variant"] == DEFAULT]
    rows = []
    for quantity, split in (("e2e_error_percent", "whole"), ("e2e_test_error_percent", "test")):
        chosen = own[(own["split"] == split) & ((split == "whole") | own["experiment_id"].isin(has_test))]
        rows += [
            evidence_row(quantity, DEFAULT, r["experiment_id"], r["judged_percent"], NOTHING_COMPLETES)
            for r in chosen.to_dict("records")
        ]
    rows += [
        evidence_row("mspe_percent", DEFAULT, r["experiment_id"], r["mspe_percent"], r["reason"])
        for r in intervals[intervals["experiment_id"].isin(has_test)].to_dict("records")
    ]
    for r in folds.to_dict("records"):
        variant = LEAVE_OUT_VARIANTS[str(r["leave_out"])]
        rows.append(
            evidence_row("e2e_error_percent", variant, r["experiment_id"], r["judged_percent"], NOTHING_COMPLETES)
        )
    return evidence_table(rows)


def h3_evidence(folder: Path | None, calibration_ids: set[str], *, accelerator: str | None = None) -> pd.DataFrame:
    """Evidence for H3: every run of a folder of new experiments, simulated with the coefficients that it froze.

    Servers whose settings do not name their KV offloading are taken to have had the pool of the study's.

    Parameters
    ----------
    folder : Path or None
        A folder for each run; None as long as there are none, which gives no rows.
    calibration_ids : set of str
        The 16 experiments of the calibration; they do not count.
    accelerator : str, optional
        GPU of runs that do not name theirs; see `stepcal.experiments.folders`.

    Returns
    -------
    DataFrame
        Columns of evidence, and a `note` on each run: which arrivals were simulated, and what was assumed. Runs that do not
        count, and runs on GPUs that H3 does not speak of, have rows of the variants ``calibration`` and ``other_gpu``, which
        no criterion looks at.

    Raises
    ------
    InputError
        If the coefficients are not the frozen ones, or the folder cannot be read.
    """
    coefficients = load_coefficients(H3_COEFFICIENTS)  # refuses a file of another hash
    if folder is None:
        return evidence_table([])
    cases, refused = read_supported_runs(folder, accelerator=accelerator, kv_offloading_gib=STUDY_OFFLOAD_GIB)
    rows, notes = [], {}
    for experiment, known in cases:
        if experiment.experiment_id in calibration_ids:
            rows.append(
                evidence_row(
                    "e2e_error_percent", CALIBRATION, experiment.experiment_id, NAN, "a run of the calibration"
                )
            )
            continue
        error, reason = transfer_error(coefficients, experiment, known)
        arrivals = POISSON if experiment.requests is None else REPLAYED
        notes[experiment.experiment_id] = "; ".join((arrivals, *(note.rstrip(".") for note in experiment.notes)))
        variant = BOARDS.get(experiment.deployment.accelerator.name, OTHER_GPU)
        rows.append(evidence_row("e2e_error_percent", variant, experiment.experiment_id, error["judged"], reason))
        rows.append(evidence_row("mspe_percent", variant, experiment.experiment_id, error["signed"], reason))
    for run in refused:
        variant = BOARDS.get(run.accelerator, OTHER_GPU)
        reason = f"{run.experiment_id}: {run.reason}"
        rows += [
            evidence_row(q, variant, run.experiment_id, NAN, reason) for q in ("e2e_error_percent", "mspe_percent")
        ]
    evidence = evidence_table(rows)
    return evidence.assign(note=evidence["unit"].map(notes).fillna(""))


def folder_sha256(folder: Path) -> str:
    """Return a hash of the files that a folder of experiments is judged by, names included."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in JUDGED_FILES):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def transfer_error(
    coefficients: StepTimeModel, experiment: Experiment, known: pd.DataFrame
) -> tuple[dict[str, float], str]:
    """Signed error of the mean E2E (%), averaged over seeds where arrivals are generated, and what a criterion sees."""
    results: list[dict[str, Any]] = [
        evaluate(coefficients, [(experiment, known)], seed=seed)["per_experiment"][0]
        for seed in (SEEDS if experiment.requests is None else [0])
    ]
    first = results[0]
    nothing = {"signed": NAN, "judged": NAN}
    if first["predicted"] is None or not first["measured"]["completed"]:
        return (
            nothing,
            f"{experiment.experiment_id}: {first.get('reason', 'no request completed when it was measured')}",
        )
    errors = [r["e2e_error_percent"] for r in results]
    signed = float(np.mean([NOTHING_COMPLETES_PERCENT if e is None else e for e in errors]))
    done = float(first["measured"]["completed"])
    offered = sum(stage.n_requests for stage in experiment.workload.stages)
    if done >= OVERLOADED_BELOW * offered:
        return {"signed": signed, "judged": abs(signed)}, ""
    completed = PERCENT * (float(np.mean([r["predicted"]["completed"] for r in results])) / done - 1.0)
    return {"signed": signed, "judged": max(abs(signed), abs(completed))}, ""


def _correlation(values: FloatArray, label: FloatArray) -> dict[str, float | int | str]:
    n = len(values)
    if n < FEWEST_STEPS_FOR_R:
        return {"r": NAN, "n_steps": n, "reason": f"{n} test steps, fewer than {FEWEST_STEPS_FOR_R}"}
    if np.ptp(values) <= 1e-9 * np.abs(values).max() or np.ptp(label) == 0.0:
        return {"r": NAN, "n_steps": n, "reason": "the component does not vary"}
    return {"r": pearson_r(values, label), "n_steps": n, "reason": ""}


def evidence_row(quantity: object, variant: str, unit: object, value: float, reason: str) -> dict[str, str | float]:
    """One row of evidence; the reason stands only where there is no value."""
    about: dict[str, str | float] = {"quantity": str(quantity), "variant": variant, "unit": str(unit)}
    return {**about, "value": float(value), "reason": reason if math.isnan(value) else ""}


def evidence_table(rows: list[dict[str, str | float]]) -> pd.DataFrame:
    """Return rows of evidence as the table that a judge takes."""
    return pd.DataFrame(rows, columns=list(EVIDENCE_COLUMNS)).astype({"value": float})
