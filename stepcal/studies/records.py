"""Results that need traces, recorded so that the book can be built without them: ``data/recorded/<study>.json``.

A recording holds the study's tables, the content hash of the data behind them, the day and the version. Where the traces
are at hand nothing recorded is read, and a test compares it with what is computed.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.files import write_atomically
from stepcal.locations import data_folder


@dataclass(frozen=True)
class Recording:
    """What one file of ``data/recorded`` holds."""

    tables: dict[str, pd.DataFrame]
    texts: dict[str, str]
    provenance: dict[str, Any]


def record_exists(name: str) -> bool:
    """Whether a study has a recording."""
    return _path(name).is_file()


def read_recorded(name: str) -> Recording:
    """Read the recording of a study.

    Raises
    ------
    InputError
        If the file is not one that `write_recorded` wrote.
    """
    path = _path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tables = {key: _frame(table) for key, table in content["tables"].items()}
        return Recording(tables, content["texts"], content["provenance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a recording of stepcal ({error}). Restore it, or run `stepcal record`."
        ) from None


def write_recorded(name: str, recording: Recording, *, today: datetime.date | None = None) -> Path:
    """Write the recording of a study, replacing an older one at once.

    Parameters
    ----------
    name : str
    recording : Recording
    today : date, optional
        Defaults to the current day. An unchanged result keeps the day on which it was first recorded.

    Returns
    -------
    Path
    """
    path = _path(name)
    day = (today or datetime.date.today()).isoformat()
    content = {
        "provenance": {**recording.provenance, "recorded": day},
        "texts": recording.texts,
        "tables": {key: _plain(table) for key, table in recording.tables.items()},
    }
    if path.is_file():
        older = json.loads(path.read_text(encoding="utf-8"))
        content["provenance"]["recorded"] = older["provenance"]["recorded"]
        if content != older:
            content["provenance"]["recorded"] = day
    write_atomically(path, json.dumps(content, indent=None, separators=(",", ":"), allow_nan=False) + "\n")
    return path


def to_json(tables: dict[str, pd.DataFrame], texts: dict[str, str]) -> str:
    """Return tables and texts as JSON; what is not finite is missing."""
    content = {"texts": texts, "tables": {key: _plain(table) for key, table in tables.items()}}
    return json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n"


def from_json(text: str) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Return the tables and texts that `to_json` wrote."""
    content = json.loads(text)
    return {key: _frame(table) for key, table in content["tables"].items()}, content["texts"]


def _path(name: str) -> Path:
    return data_folder() / "recorded" / f"{name}.json"


def _plain(table: pd.DataFrame) -> dict[str, list[Any]]:
    def value(cell: Any) -> Any:
        cell = cell.item() if hasattr(cell, "item") else cell
        return None if cell is None or (isinstance(cell, float) and math.isnan(cell)) else cell

    return {str(column): [value(cell) for cell in table[column]] for column in table.columns}


def _frame(table: dict[str, list[Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(table)
    for column in frame.columns[[dtype == np.dtype(object) for dtype in frame.dtypes]]:
        # A column of numbers in which every value is missing comes back as objects.
        if frame[column].isna().all():
            frame[column] = frame[column].astype(float)
    return frame
