"""The verdict on each of the report's hypotheses, from its evidence and its frozen rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from stepcal.datasets import content_sha256, experiments, published_h1, published_h2, transfer_runs
from stepcal.errors import InputError
from stepcal.evaluation.preregistration import load_preregistration
from stepcal.evaluation.verdict import Verdict, judge
from stepcal.studies.evidence import h1_evidence, h2_evidence, published_h1_evidence, published_h2_evidence
from stepcal.studies.registry import END_TO_END, PHYSICAL_EVIDENCE, PHYSICAL_MODEL, TRANSFER, load_study
from stepcal.studies.results.provenance import MEASURED, NO_EVIDENCE, Provenance

TAKE_RUNS = ("h3", "h4")
"""Hypotheses about runs that are still to come."""


def verdict_of(
    hypothesis: str, *, data: Path | str | None = None, published: bool = False, accelerator: str | None = None
) -> tuple[Verdict, Provenance]:
    """Judge a hypothesis on our evidence, or on the study's published figures.

    Parameters
    ----------
    hypothesis : str
        ``h1``, ``h2``, ``h2_step``, ``h1b``, ``h2b``, ``h3`` or ``h4``.
    data : path, optional
        Folder of the public layout; defaults to `STEPCAL_DATA`, and to the recorded evidence without it. For ``h3`` a folder
        of new experiments (`stepcal.experiments.folders`), in place of the 31 runs of ``data/transfer/``. For ``h4`` the
        same; without one it is not evaluated.
    published : bool
        Judge the published per-experiment figures instead of our own.
    accelerator : str, optional
        GPU of the new experiments of ``h3`` or ``h4`` that do not name theirs.

    Returns
    -------
    Verdict
    Provenance

    Raises
    ------
    InputError
        If the hypothesis is unknown, its pre-registration was changed, it has no published figures, or `accelerator` is
        given for another than ``h3`` and ``h4``.
    """
    registered = load_preregistration(hypothesis)
    if accelerator is not None and registered.id not in TAKE_RUNS:
        raise InputError(
            f"`--accelerator` is for the new experiments of h3 and h4; `{registered.id}` takes none. Leave it out."
        )
    if registered.id in _OURS:
        if published:
            raise InputError(
                f"`{registered.id}` is ours and has no published figures; `--published` knows h1, h2, h2_step. Leave it out."
            )
        evidence, provenance = _OURS[registered.id](data, accelerator)
        return judge(registered, evidence), provenance
    if registered.id == "h1":
        if published:
            table = published_h1()
            return judge(registered, published_h1_evidence(table)), _published_provenance(table)
        study = load_study("h1", data=data)
        return judge(registered, h1_evidence(study["correlations"])), study.provenance
    if published:
        table = published_h2()
        return judge(registered, published_h2_evidence(table)), _published_provenance(table)
    study, end_to_end = load_study("h2", data=data), load_study(END_TO_END, data=data)
    evidence = h2_evidence(study["scores"], experiments()["experiment_id"], end_to_end["evidence"])
    return judge(registered, evidence), end_to_end.provenance


def _h1b(data: Path | str | None, _: str | None) -> tuple[pd.DataFrame, Provenance]:
    from stepcal.studies.evidence_physical import h1b_evidence

    study = load_study(PHYSICAL_EVIDENCE, data=data)
    return h1b_evidence(study["components"]), study.provenance


def _h2b(data: Path | str | None, _: str | None) -> tuple[pd.DataFrame, Provenance]:
    from stepcal.studies.evidence_physical import h2b_evidence

    physical, more = load_study(PHYSICAL_MODEL, data=data), load_study(PHYSICAL_EVIDENCE, data=data)
    return h2b_evidence(physical["errors"], physical["folds"], more["intervals"]), physical.provenance


def _h3(data: Path | str | None, accelerator: str | None) -> tuple[pd.DataFrame, Provenance]:
    """Judge the 31 runs that ship, or the runs of a folder; `STEPCAL_DATA` has nothing to say here."""
    if data is None:
        study = load_study(TRANSFER)
        return study["evidence"], study.provenance
    from stepcal.studies.evidence_physical import folder_sha256, h3_evidence

    folder = Path(data)
    evidence = h3_evidence(folder, set(experiments()["experiment_id"]), accelerator=accelerator)
    n_runs = evidence["unit"].nunique()
    return evidence, Provenance(MEASURED, folder_sha256(folder), n_runs, n_runs)


def _published_provenance(table: pd.DataFrame) -> Provenance:
    n_steps = int(table["n_test"].sum()) if "n_test" in table else int(table["n_steps"].max())
    return Provenance("published", content_sha256(table), n_steps, len(experiments()))


def _h4(data: Path | str | None, accelerator: str | None) -> tuple[pd.DataFrame, Provenance]:
    """Judge the runs of a folder that had not been seen when H4 was frozen; nothing else is confirmatory."""
    from stepcal.studies.evidence_physical import folder_sha256
    from stepcal.studies.kernels.evidence_kernels import h4_evidence

    if data is None:
        return h4_evidence(None, set()), Provenance(NO_EVIDENCE, "", 0, 0)
    folder = Path(data)
    seen = set(experiments()["experiment_id"]) | set(transfer_runs()["experiment_id"])
    evidence = h4_evidence(folder, seen, accelerator=accelerator)
    n_runs = evidence["unit"].nunique()
    return evidence, Provenance(MEASURED, folder_sha256(folder), n_runs, n_runs)


_OURS: dict[str, Callable[[Path | str | None, str | None], tuple[pd.DataFrame, Provenance]]] = {
    "h1b": _h1b,
    "h2b": _h2b,
    "h3": _h3,
    "h4": _h4,
}
"""Evidence of our own hypotheses."""
