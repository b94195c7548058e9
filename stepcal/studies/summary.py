"""What the first page shows: every run that was judged, in and out of sample, and where each hypothesis stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stepcal.datasets import experiments
from stepcal.errors import InputError
from stepcal.evaluation.preregistration import load_preregistration
from stepcal.evaluation.verdict import NOT_EVALUATED
from stepcal.simulator.steptime import StepBatch
from stepcal.step_time.coefficients import load_coefficients
from stepcal.step_time.kernel_model import kernel_components_us
from stepcal.studies.kernels.kernel_transfer import H100_16_BIT, group_summary
from stepcal.studies.kernels.transfer import errors_by_run
from stepcal.studies.published_runs import load_experiments
from stepcal.studies.registry import (
    END_TO_END,
    KERNEL_MODEL,
    KERNEL_TRANSFER,
    PHYSICAL_MODEL,
    RECONSTRUCTION,
    load_study,
)
from stepcal.studies.verdicts import verdict_of
from stepcal.units import PERCENT, US_PER_MS

IN_SAMPLE = "bytes, in sample"
LEFT_OUT = "bytes, model left out"
NEVER_SEEN = "bytes, never seen (H3)"
MEASURED_KERNELS = "measured kernels, post hoc"
FIRST_PAGE = {
    "h1": "FLOP components follow the step",
    "h2": "factors on them predict latency",
    "h2b": "one physical model predicts latency",
    "h3": "it carries over to unseen servers",
    "h4": "measured kernels carry over",
}
"""Hypotheses with a badge, in a few words each; their files have the statements."""


@dataclass(frozen=True)
class Badge:
    """Where a hypothesis stands.

    Attributes
    ----------
    id, words : str
    verdict : str
        Of the engine, or *Not evaluated* where there is nothing to judge yet.
    status : str
        What it can show: see `standing`.
    """

    id: str
    words: str
    verdict: str
    status: str


def badges(data: Path | str | None = None) -> list[Badge]:
    """Return where each hypothesis of the first page stands, by the verdict engine."""
    found = []
    for name, words in FIRST_PAGE.items():
        registered = load_preregistration(name)
        try:
            verdict = verdict_of(name, data=data if name in {"h1", "h2", "h2b"} else None)[0].verdict
        except InputError:
            # Frozen, and its model or its runs are still to come.
            verdict = NOT_EVALUATED
        found.append(Badge(name[:1].upper() + name[1:], words, verdict, registered.standing))
    return found


def judged_runs(data: Path | str | None = None) -> pd.DataFrame:
    """Return measured and predicted mean E2E of every run that a physical model was judged on.

    Returns
    -------
    DataFrame
        `name`, `measured_ms`, `predicted_ms`, `low_ms`, `high_ms` (95% interval; NaN where there is none), `sample`, and
        `overloaded`. A run that was predicted in more than one way has a row for each.
    """
    study = load_study(PHYSICAL_MODEL, data=data)
    own = study["e2e_intervals"].set_index("experiment_id")
    overloaded = experiments().set_index("experiment_id")["overloaded"]
    inside = own.reset_index().assign(sample=IN_SAMPLE)
    folds = study["folds"].query("leave_out == 'model'").set_index("experiment_id")
    outside = pd.DataFrame({"measured_ms": own["measured_ms"].reindex(folds.index)})
    outside["predicted_ms"] = outside["measured_ms"] * (1 + folds["e2e_error_percent"] / PERCENT)
    runs = errors_by_run(load_study("transfer").tables).set_index("experiment_id")
    unseen = pd.DataFrame({"measured_ms": runs["e2e_measured_ms"], "predicted_ms": runs["e2e_predicted_ms"]})
    errors = load_study("kernel_transfer")["errors"].query(
        "split == 'whole' and metric == 'e2e' and statistic == 'mean'"
    )
    kernels = errors[["experiment_id"]].assign(measured_ms=errors["measured"], predicted_ms=errors["predicted"])
    table = pd.concat(
        [
            inside,
            outside.reset_index().assign(sample=LEFT_OUT),
            unseen.reset_index().assign(sample=NEVER_SEEN),
            kernels.assign(sample=MEASURED_KERNELS),
        ],
        ignore_index=True,
    )
    table["overloaded"] = table["experiment_id"].map(overloaded).eq(True)
    return table.rename(columns={"experiment_id": "name"})


def summary_facts(
    runs: pd.DataFrame, *, limit_percent: float = 10.0, data: Path | str | None = None
) -> dict[str, object]:
    """Return what the first page cites.

    Parameters
    ----------
    runs : DataFrame
        From `judged_runs`.
    limit_percent : float
        Error that counts as good.
    data : path, optional

    Returns
    -------
    dict
        Errors in percent, mean absolute over runs unless the name says otherwise.
    """
    error = PERCENT * (runs["predicted_ms"] / runs["measured_ms"] - 1)
    size = error.abs()
    inside, outside = runs["sample"] == IN_SAMPLE, runs["sample"] == LEFT_OUT
    unseen, full = runs["sample"] == NEVER_SEEN, runs["overloaded"]
    kernels = load_study(KERNEL_MODEL)
    kernels_in = kernels["errors"].query("split == 'whole' and overloaded")
    kernels_out = kernels["folds"].query("not overloaded")
    groups = group_summary(load_study(KERNEL_TRANSFER).tables).set_index("group")
    replayed = load_study(END_TO_END, data=data)["errors"].query(
        "variant == 'model36' and split == 'whole' and arrivals == 'replayed'"
    )
    verdicts = {b.id: b.verdict.lower() for b in badges(data)}
    return {
        "h2_lower": verdicts["H2"],
        "h3_lower": verdicts["H3"],
        "label_error": float(replayed["e2e_error_percent"].abs().mean()),
        "n_calm": int((inside & ~full).sum()),
        "calm_in": float(size[inside & ~full].mean()),
        "calm_out": float(size[outside & ~full].mean()),
        "n_full": int((inside & full).sum()),
        "full_in": float(size[inside & full].mean()),
        "full_out": float(size[outside & full].mean()),
        "n_unseen": int(unseen.sum()),
        "n_good": int((size[unseen] < limit_percent).sum()),
        "limit": limit_percent,
        "unseen": float(size[unseen].mean()),
        "unseen_bias": float(error[unseen].mean()),
        "kernels": float(size[runs["sample"] == MEASURED_KERNELS].mean()),
        "kernels_bias": float(error[runs["sample"] == MEASURED_KERNELS].mean()),
        "kernels_out": float(kernels_out["e2e_error_percent"].abs().mean()),
        "kernels_completed": float(kernels_in["completed_error_percent"].abs().max()),
        "ttft_p99": float(groups["ttft_p99"][H100_16_BIT]),
    }


def step_parts(data: Path | str | None = None) -> pd.DataFrame:
    """Return the time of a decode step by component, at the mean batch and context of each of the 16 runs.

    Batches are rebuilt from measured latencies: this shows where time goes and judges nothing.

    Returns
    -------
    DataFrame
        A row a run (index: its id), a column a component of the shipped model (ms), and ``measured``, the mean decode
        interval (ms).
    """
    model = load_coefficients("default")
    runs = load_study(RECONSTRUCTION, data=data)["runs"].set_index("experiment_id")
    rows = {}
    for experiment in load_experiments():
        run = runs.loc[experiment.experiment_id]
        batch = max(1, round(run["batch"]))
        contexts = np.full(batch, round(run["kv_tokens"] / batch), dtype=np.int32)
        none = np.zeros(0, dtype=np.int32)
        parts = kernel_components_us(model.values, experiment.deployment, StepBatch(none, none, contexts, 0))
        measured = run["interval_us"] / US_PER_MS
        rows[experiment.experiment_id] = {k: v / US_PER_MS for k, v in parts.items() if v} | {"measured": measured}
    table = pd.DataFrame.from_dict(rows, orient="index").fillna(0.0)
    return table.sort_values("measured")
