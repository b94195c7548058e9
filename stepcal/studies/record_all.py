"""Computes every study that needs traces and records it, or compares the recordings with what is computed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from stepcal.datasets import have_traces
from stepcal.errors import MissingDataError
from stepcal.files import write_atomically
from stepcal.locations import data_folder
from stepcal.step_time.coefficients import SHIPPED_VARIANTS
from stepcal.studies.records import Recording, read_recorded, record_exists, write_recorded
from stepcal.studies.registry import STUDIES, load_study
from stepcal.studies.study import Study

RELATIVE_TOLERANCE = 1e-6
"""How far a recomputed number may be from the recorded one: iterative fits stop at about 1e-8."""


def record_all(data: Path | str | None = None, *, check: bool = False) -> list[str]:
    """Record all studies, or compare them with their recordings.

    Parameters
    ----------
    data : path, optional
        Folder of the public layout; defaults to `STEPCAL_DATA`.
    check : bool
        Write nothing.

    Returns
    -------
    list of str
        Where `check`: the differences found, a line each. Otherwise the files written.

    Raises
    ------
    MissingDataError
        If the traces are not at hand: there is nothing to compute.
    """
    if not have_traces(data):
        raise MissingDataError(
            "Recording needs the step traces. Set STEPCAL_DATA to their folder (see data/README.md)."
        )
    lines = []
    for name in STUDIES:
        if check and not record_exists(name):
            lines.append(f"{name}: was never recorded")
            continue
        study = load_study(name, data=data, recompute=True)
        if check:
            lines += [f"{name}: {difference}" for difference in differences(study)]
        else:
            provenance = {k: v for k, v in asdict(study.provenance).items() if k not in ("kind", "recorded")}
            path = write_recorded(name, Recording(study.tables, study.texts, {"kind": "measured", **provenance}))
            lines.append(f"wrote {path}")
    if not check:
        lines += [f"wrote {write_variant_coefficients(variant)}" for variant in SHIPPED_VARIANTS]
    return lines


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
    """Compare a study that was computed with its recording; an empty list if they agree."""
    if not record_exists(study.name):
        return ["was never recorded"]
    recording = read_recorded(study.name)
    if recording.provenance["data_sha256"] != study.provenance.data_sha256:
        return ["was recorded from other data"]
    if set(recording.tables) != set(study.tables):
        return [f"tables differ: {sorted(set(recording.tables) ^ set(study.tables))}"]
    return [
        f"table `{key}`: {text}"
        for key, table in study.tables.items()
        if (text := _unequal(table, recording.tables[key]))
    ]


def _unequal(computed: pd.DataFrame, recorded: pd.DataFrame) -> str:
    if list(computed.columns) != list(recorded.columns) or len(computed) != len(recorded):
        return "other columns or rows"
    for column in computed.columns:
        a, b = computed[column].to_numpy(), recorded[column].to_numpy()
        if pd.api.types.is_numeric_dtype(computed[column]) and not pd.api.types.is_bool_dtype(computed[column]):
            same = np.isclose(a.astype(float), b.astype(float), rtol=RELATIVE_TOLERANCE, atol=1e-9, equal_nan=True)
        else:
            same = (
                computed[column].astype(object).where(computed[column].notna(), None).to_numpy()
                == recorded[column].astype(object).where(recorded[column].notna(), None).to_numpy()
            )
        if not np.all(same):
            row = int(np.flatnonzero(~np.asarray(same))[0])
            return f"`{column}` in row {row} is {a[row]!r}, recorded {b[row]!r}"
    return ""
