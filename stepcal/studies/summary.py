"""What the first page shows: every run that was judged, in and out of sample, and where each hypothesis stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stepcal.datasets import experiments
from stepcal.errors import InputError
from stepcal.evaluation.preregistration import load_preregistration
from stepcal.evaluation.verdict import NOT_EVALUATED
from stepcal.studies.registry import END_TO_END, PHYSICAL_MODEL, load_study
from stepcal.studies.transfer import errors_by_run
from stepcal.studies.verdicts import verdict_of
from stepcal.units import PERCENT

IN_SAMPLE = "in sample"
LEFT_OUT = "model left out"
NEVER_SEEN = "never seen (H3)"
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
    """Return measured and predicted mean E2E of every run that the physical model was judged on.

    Returns
    -------
    DataFrame
        `name`, `measured_ms`, `predicted_ms`, `low_ms`, `high_ms` (95% interval; NaN where there is none), `sample`, and
        `overloaded`. A run that was predicted in and out of sample has a row for each.
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
    table = pd.concat(
        [
            inside,
            outside.reset_index().assign(sample=LEFT_OUT),
            unseen.reset_index().assign(sample=NEVER_SEEN),
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
    study = load_study(PHYSICAL_MODEL, data=data)
    default = study["errors"].query("variant == 'default' and split == 'whole' and overloaded")
    left_out = study["folds"].query("leave_out == 'model' and overloaded")
    tails = study["percentiles"].query("metric == 'ttft' and statistic == 'p99'")
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
        "completed_in": float(default["completed_error_percent"].abs().max()),
        "completed_out": float(left_out["completed_error_percent"].abs().max()),
        "n_unseen": int(unseen.sum()),
        "n_good": int((size[unseen] < limit_percent).sum()),
        "limit": limit_percent,
        "unseen": float(size[unseen].mean()),
        "unseen_bias": float(error[unseen].mean()),
        "ttft_p99": float(tails["error_percent"].abs().mean()),
    }
