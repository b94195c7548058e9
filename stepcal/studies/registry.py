"""The report's analyses, each a function from step rows to tables; what notebooks show, commands print and files record.

A study runs on measured traces where they are at hand, reads its recorded tables where they are not, and runs on simulated
rows when asked to. Its provenance says which, and travels with the tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from threadpoolctl import threadpool_limits

from stepcal.datasets import (
    content_sha256,
    experiments,
    have_traces,
    load_requests,
    load_stages,
    load_steps,
    load_xgboost_predictions,
    simulated_step_rows,
    transfer_measured,
    transfer_runs,
)
from stepcal.datasets.catalogue import trace_files, traces_folder
from stepcal.datasets.splits import select_experiments
from stepcal.errors import InputError, MissingDataError
from stepcal.studies.ablations import run_ablations
from stepcal.studies.attribution import run_attribution
from stepcal.studies.end_to_end import run_end_to_end
from stepcal.studies.evidence_physical import run_physical_evidence
from stepcal.studies.h1 import run_h1, run_rescored
from stepcal.studies.h2 import run_h2
from stepcal.studies.kernel_model import run_kernel_model
from stepcal.studies.kernel_transfer import run_kernel_transfer
from stepcal.studies.kernel_uncertainty import run_kernel_uncertainty
from stepcal.studies.kv_offloading import run_offloading
from stepcal.studies.label_audit import run_label_audit, run_reconstruction
from stepcal.studies.physical_model import run_physical_model
from stepcal.studies.provenance import MEASURED, RECORDED, SIMULATED, Provenance
from stepcal.studies.records import read_recorded, record_exists
from stepcal.studies.result_cache import cached_study, result_key
from stepcal.studies.silicon import run_silicon, silicon_rows_that_ship
from stepcal.studies.study import Study, StudyKind
from stepcal.studies.transfer import run_transfer

SOURCES = (MEASURED, SIMULATED)
RESCORED = "published_predictions"
END_TO_END = "end_to_end"
LABEL_AUDIT, RECONSTRUCTION = "label_audit", "reconstruction"
ATTRIBUTION, OFFLOADING = "attribution", "offloading"
TRANSFER = "transfer"
SILICON = "silicon"
KERNEL_MODEL, KERNEL_TRANSFER, KERNEL_UNCERTAINTY = "kernel_model", "kernel_transfer", "kernel_uncertainty"
PHYSICAL_MODEL, PHYSICAL_EVIDENCE, ABLATIONS = "physical_model", "physical_evidence", "ablations"
_TRANSFER_TABLES: tuple[Callable[[Path | str | None], pd.DataFrame], ...] = (
    lambda _: transfer_runs(),
    lambda _: transfer_measured(),
)
STUDIES: dict[str, StudyKind] = {
    "h1": StudyKind(run_h1),
    "h2": StudyKind(run_h2),
    RESCORED: StudyKind(run_rescored, (load_xgboost_predictions,), simulates=False),
    END_TO_END: StudyKind(run_end_to_end, (load_steps, load_requests), simulates=False),
    LABEL_AUDIT: StudyKind(
        lambda steps, requests, predictions: run_label_audit(
            steps, requests, predictions, experiments(), load_stages()
        ),
        (load_steps, load_requests, load_xgboost_predictions),
        simulates=False,
    ),
    RECONSTRUCTION: StudyKind(
        lambda steps, requests: run_reconstruction(steps, requests, experiments()),
        (load_steps, load_requests),
        simulates=False,
    ),
    OFFLOADING: StudyKind(
        lambda steps, requests, predictions: run_offloading(steps, requests, predictions, experiments()),
        (load_steps, load_requests, load_xgboost_predictions),
        simulates=False,
    ),
    ATTRIBUTION: StudyKind(run_attribution, (load_steps, load_requests), simulates=False),
    PHYSICAL_MODEL: StudyKind(
        lambda steps, requests: run_physical_model(steps, requests, experiments()),
        (load_steps, load_requests),
        simulates=False,
        costly=True,
    ),
    PHYSICAL_EVIDENCE: StudyKind(
        lambda steps, requests: run_physical_evidence(steps, requests, experiments()),
        (load_steps, load_requests),
        simulates=False,
    ),
    ABLATIONS: StudyKind(run_ablations, (load_steps, load_requests), simulates=False, costly=True),
    TRANSFER: StudyKind(run_transfer, _TRANSFER_TABLES, simulates=False, costly=True),
    SILICON: StudyKind(run_silicon, (lambda _: silicon_rows_that_ship(),), simulates=False, costly=True),
    KERNEL_MODEL: StudyKind(run_kernel_model, (load_requests,), simulates=False, costly=True),
    KERNEL_TRANSFER: StudyKind(run_kernel_transfer, _TRANSFER_TABLES, simulates=False, costly=True),
    KERNEL_UNCERTAINTY: StudyKind(
        run_kernel_uncertainty, (load_requests, *_TRANSFER_TABLES), simulates=False, costly=True
    ),
}
"""All studies by name."""


# One thread adds in one order: a result is the same on one core and on two, and small systems are faster so.
@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def load_study(
    name: str,
    *,
    source: str = MEASURED,
    data: Path | str | None = None,
    only_experiments: Sequence[str] = (),
    recompute: bool = False,
    **options: object,
) -> Study:
    """Run a study on measured or simulated rows, or read its recording where the traces are missing.

    What was computed is kept in the user's cache (`stepcal.studies.result_cache`).

    Parameters
    ----------
    name : str
        One of `STUDIES`.
    source : str
        ``measured`` or ``simulated``. A study that has no use for simulated rows stays measured or recorded.
    data : path, optional
        Folder of the public layout; defaults to `STEPCAL_DATA`.
    only_experiments : sequence of str
        Restrict the study to these; all by default.
    recompute : bool
        Compute anew, although the cache, or a costly study's recording, has the result of the same data.
    **options
        Passed to the study (`run_h1`, `run_h2`).

    Returns
    -------
    Study

    Raises
    ------
    InputError
        If a name, a source or an experiment is unknown.
    MissingDataError
        If the traces are missing and options differ from the recorded ones.
    """
    if name not in STUDIES:
        raise InputError(f"Unknown study `{name}`. Studies: {', '.join(STUDIES)}.")
    if source not in SOURCES:
        raise InputError(f"`source={source!r}` is unknown; it is one of {', '.join(SOURCES)}.")
    kind = STUDIES[name]
    traces_folder(data)  # a folder that is named and does not exist is a slip, not a machine without traces
    if source == SIMULATED and kind.simulates:
        traces: list[Path] = []
    elif data is not None or have_traces(data):
        source, traces = MEASURED, trace_files(data)
    else:
        return _recorded_study(name, bool(only_experiments or options))

    def compute() -> Study:
        if source == SIMULATED:
            tables = [simulated_step_rows(seed=int(str(options.get("seed", 0))))]
        else:
            tables = [load(data) for load in kind.loaders]
        tables = [select_experiments(table, only_experiments) for table in tables]
        provenance = _provenance(source, tables)
        if kind.costly and not (recompute or options or only_experiments) and record_exists(name):
            recorded = _recorded_study(name, False)
            if recorded.provenance.data_sha256 == provenance.data_sha256:
                return recorded
        results, texts = kind.run(*tables, **options)
        return Study(name, results, provenance, texts)

    if recompute:
        return compute()
    return cached_study(name, result_key(name, source, traces, only_experiments, options), compute)


def _provenance(kind: str, tables: Sequence[pd.DataFrame]) -> Provenance:
    hashes = [content_sha256(table) for table in tables]
    combined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    n_experiments = max(table["experiment_id"].nunique() for table in tables)
    return Provenance(kind, combined, sum(map(len, tables)), n_experiments)


def _recorded_study(name: str, changed: bool) -> Study:
    if changed or not record_exists(name):
        why = "was asked for with other options than the recorded ones" if changed else "was never recorded"
        raise MissingDataError(
            f"The study `{name}` {why}, and the step traces are not at hand. Set STEPCAL_DATA to a folder with the traces "
            "(see data/README.md), or choose source='simulated'."
        )
    content = read_recorded(name)
    try:
        provenance = Provenance(**{**content.provenance, "kind": RECORDED})
    except TypeError as error:
        raise InputError(
            f"The recording of `{name}` was written by another version: {error}. Record it again."
        ) from None
    return Study(name, content.tables, provenance, content.texts)
