"""Computes every study that needs traces and records it, or compares the recordings with what is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from stepcal.datasets import have_traces
from stepcal.errors import InputError, MissingDataError
from stepcal.files import write_atomically
from stepcal.locations import data_folder
from stepcal.step_time.coefficients import SHIPPED_VARIANTS
from stepcal.studies.registry import STUDIES, load_study
from stepcal.studies.results.records import Recording, read_recorded, record_exists, write_recorded
from stepcal.studies.results.tolerances import Difference, difference, tolerances_of
from stepcal.studies.study import Study

NEVER_RECORDED = Difference("", "", -1, np.inf, "was never recorded")
"""What a study without a recording differs by: nothing is computed for it."""


def record_all(data: Path | str | None = None, *, only: Sequence[str] = ()) -> list[Path]:
    """Record studies.

    Parameters
    ----------
    data : path, optional
        Folder of the public layout; defaults to `STEPCAL_DATA`.
    only : sequence of str
        Studies; all by default.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError
        If a study is unknown.
    MissingDataError
        If the traces are not at hand: there is nothing to compute.
    """
    paths = []
    for name in _selected(data, only):
        study = load_study(name, data=data, recompute=True)
        provenance = {k: v for k, v in asdict(study.provenance).items() if k not in ("kind", "recorded")}
        recording = Recording(study.tables, study.texts, {"kind": "measured", **provenance})
        paths.append(write_recorded(study.name, recording))
        if study.name == "h2":
            paths += [write_variant_coefficients(variant) for variant in SHIPPED_VARIANTS]
    return paths


def check_all(data: Path | str | None = None, *, only: Sequence[str] = ()) -> Iterator[tuple[str, list[Difference]]]:
    """Compute studies anew and compare them with their recordings, one after the other.

    Parameters and errors are those of `record_all`, and those of `compare_with_recording`.

    Yields
    ------
    name : str
    differences : list of Difference
        The largest of each table; a size above 1 is a finding.
    """
    for name in _selected(data, only):
        if not record_exists(name):
            yield name, [NEVER_RECORDED]
        else:
            yield name, compare_with_recording(load_study(name, data=data, recompute=True))


def _selected(data: Path | str | None, only: Sequence[str]) -> Sequence[str]:
    """Names of the studies to compute, all by default; refuses an unknown one, and a machine without traces."""
    unknown = [name for name in only if name not in STUDIES]
    if unknown:
        raise InputError(f"Unknown study `{unknown[0]}`. Studies: {', '.join(STUDIES)}.")
    if not have_traces(data):
        raise MissingDataError(
            "Recording needs the step traces. Set STEPCAL_DATA to their folder (see data/README.md)."
        )
    return only or list(STUDIES)


def write_variant_coefficients(variant: str) -> Path:
    """Write the recorded fit of one of the study's variants as a coefficient file, ``data/coefficients/<variant>.json``."""
    recording = read_recorded("h2")
    table = recording.tables["parameters"]
    own = table[table["variant"] == variant]
    content = {
        "variant": variant,
        "description": f"The study's variant {variant}, fitted to the training steps of its public traces",
        "data_sha256": recording.provenance["data_sha256"],
        "parameters": [
            {"name": str(name), "value": float(value), "unit": str(unit), "identified": bool(identified)}
            for name, value, unit, identified in zip(
                own["name"], own["value"], own["unit"], own["identified"], strict=True
            )
        ],
    }
    path = data_folder() / "coefficients" / f"{variant}.json"
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def differences(study: Study) -> list[str]:
    """Compare a study that was computed with its recording; an empty list if they agree within the declared tolerances."""
    return [str(found) for found in compare_with_recording(study) if found.size > 1.0]


def compare_with_recording(study: Study) -> list[Difference]:
    """Return each table's largest difference from its recording, in units of its declared tolerance.

    Raises
    ------
    InputError
        If a table declares no tolerance.
    """
    if not record_exists(study.name):
        return [NEVER_RECORDED]
    recording = read_recorded(study.name)
    if recording.provenance["data_sha256"] != study.provenance.data_sha256:
        return [Difference("", "", -1, np.inf, "was recorded from other data")]
    if set(recording.tables) != set(study.tables):
        others = sorted(set(recording.tables) ^ set(study.tables))
        return [Difference("", "", -1, np.inf, f"has other tables: {others}")]
    declared = tolerances_of(study.name)
    return [difference(key, table, recording.tables[key], declared) for key, table in study.tables.items()]
