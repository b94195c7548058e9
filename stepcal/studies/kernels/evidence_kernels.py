"""Evidence for H4: runs that arrived after its freeze, simulated with the kernel model, beside what H3's coefficients say.

The readings that the code follows are those of ``book/preregistrations/h4.yaml``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stepcal.experiments.folders import read_supported_runs
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import DEFAULT, PHYSICAL_DEFAULT, load_coefficients
from stepcal.step_time.kernel_model import kernel_notes
from stepcal.studies.evidence_physical import (
    NAN,
    OTHER_GPU,
    POISSON,
    REPLAYED,
    evidence_row,
    evidence_table,
    transfer_error,
)
from stepcal.studies.kernels.kernel_transfer import H4_VARIANTS, group_of

SEEN = "seen"
"""Variant of runs that H4 does not judge: those that were fitted, and those that its form was suggested by."""
NO_TABLES = "no_tables"
"""Variant of runs on a GPU, or in a precision, that has no kernel tables."""
GAIN = "kernel_against_predecessor"


def h4_variant(deployment: Deployment) -> str:
    """Return the variant of H4's evidence that a run belongs to."""
    if kernel_notes(deployment):
        return NO_TABLES
    return H4_VARIANTS.get(group_of(deployment), "kernel_other_gpu")


def h4_evidence(folder: Path | None, seen_ids: set[str], *, accelerator: str | None = None) -> pd.DataFrame:
    """Evidence for H4: every run of a folder of new experiments, simulated with the frozen kernel model.

    Parameters
    ----------
    folder : Path or None
        A folder for each run; None gives no rows.
    seen_ids : set of str
        Runs that do not count.
    accelerator : str, optional
        GPU of runs that do not name theirs.

    Returns
    -------
    DataFrame
        Columns of evidence, and a `note` on each run. Runs that do not count have rows of the variants ``seen`` and
        ``no_tables``, which no criterion looks at.

    Raises
    ------
    InputError
        If the coefficients or the kernels are not the frozen ones, or the folder cannot be read.
    """
    kernels, predecessor = load_coefficients(DEFAULT), load_coefficients(PHYSICAL_DEFAULT)
    if folder is None:
        return evidence_table([])
    cases, refused = read_supported_runs(folder, accelerator=accelerator)
    rows, notes = [], {}
    for experiment, known in cases:
        name = experiment.experiment_id
        if name in seen_ids:
            rows.append(evidence_row("e2e_error_percent", SEEN, name, NAN, "a run that had been seen"))
            continue
        error, reason = transfer_error(kernels, experiment, known)
        before, _ = transfer_error(predecessor, experiment, known)
        arrivals = POISSON if experiment.requests is None else REPLAYED
        said = (*experiment.notes, *kernel_notes(experiment.deployment))
        notes[name] = "; ".join((arrivals, *(note.rstrip(".") for note in said)))
        variant = h4_variant(experiment.deployment)
        rows.append(evidence_row("e2e_error_percent", variant, name, error["judged"], reason))
        rows.append(evidence_row("mspe_percent", variant, name, error["signed"], reason))
        rows.append(evidence_row("e2e_error_gain_points", GAIN, name, before["judged"] - error["judged"], reason))
    for run in refused:
        reason = f"{run.experiment_id}: {run.reason}"
        variant = "kernel_h100" if run.accelerator.startswith("h100") else OTHER_GPU
        rows += [
            evidence_row(quantity, variant, run.experiment_id, NAN, reason)
            for quantity in ("e2e_error_percent", "mspe_percent")
        ]
    evidence = evidence_table(rows)
    return evidence.assign(note=evidence["unit"].map(notes).fillna(""))
