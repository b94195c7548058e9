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
    have_traces,
    load_requests,
    load_steps,
    load_xgboost_predictions,
    simulated_step_rows,
    transfer_measured,
    transfer_runs,
)
from stepcal.datasets.catalogue import trace_files, traces_folder
from stepcal.datasets.splits import select_experiments
from stepcal.errors import InputError, MissingDataError
from stepcal.studies import runs
from stepcal.studies.results.provenance import MEASURED, RECORDED, SIMULATED, Provenance
from stepcal.studies.results.records import read_recorded, record_exists
from stepcal.studies.results.result_cache import cached_study, result_key
from stepcal.studies.study import Study, StudyKind

SOURCES = (MEASURED, SIMULATED)
RESCORED = "published_predictions"
END_TO_END = "end_to_end"
LABEL_AUDIT, RECONSTRUCTION = "label_audit", "reconstruction"
ATTRIBUTION, OFFLOADING = "attribution", "offloading"
TRANSFER = "transfer"
SILICON = "silicon"
KERNEL_MODEL, KERNEL_TRANSFER, KERNEL_UNCERTAINTY = "kernel_model", "kernel_transfer", "kernel_uncertainty"
PHYSICAL_MODEL, PHYSICAL_EVIDENCE, ABLATIONS = "physical_model", "physical_evidence", "ablations"
_STEPS, _BOTH = (load_steps,), (load_steps, load_requests)
_ALL = (*_BOTH, load_xgboost_predictions)
_TRANSFER: tuple[Callable[[Path | str | None], pd.DataFrame], ...] = (
    lambda _: transfer_runs(),
    lambda _: transfer_measured(),
)
STUDIES: dict[str, StudyKind] = {
    "h1": StudyKind(runs.h1, _STEPS),
    "h2": StudyKind(runs.h2, _STEPS),
    RESCORED: StudyKind(runs.rescored, (load_xgboost_predictions,), simulates=False),
    END_TO_END: StudyKind(runs.end_to_end, _BOTH, simulates=False),
    LABEL_AUDIT: StudyKind(runs.label_audit, _ALL, simulates=False),
    RECONSTRUCTION: StudyKind(runs.reconstruction, _BOTH, simulates=False),
    OFFLOADING: StudyKind(runs.offloading, _ALL, simulates=False),
    ATTRIBUTION: StudyKind(runs.attribution, _BOTH, simulates=False),
    PHYSICAL_MODEL: StudyKind(runs.physical_model, _BOTH, simulates=False, costly=True),
    PHYSICAL_EVIDENCE: StudyKind(runs.physical_evidence, _BOTH, simulates=False),
    ABLATIONS: StudyKind(runs.ablations, _BOTH, simulates=False, costly=True),
    TRANSFER: StudyKind(runs.transfer, _TRANSFER, simulates=False, costly=True),
    SILICON: StudyKind(runs.silicon, (lambda _: runs.silicon_rows(),), simulates=False, costly=True),
    KERNEL_MODEL: StudyKind(runs.kernel_model, (load_requests,), simulates=False, costly=True),
    KERNEL_TRANSFER: StudyKind(runs.kernel_transfer, _TRANSFER, simulates=False, costly=True),
    KERNEL_UNCERTAINTY: StudyKind(runs.kernel_uncertainty, (load_requests, *_TRANSFER), simulates=False, costly=True),
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

    What was computed is kept in the user's cache (`stepcal.studies.results.result_cache`).

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
