"""Results that need traces, recorded so that the book can be built without them: ``data/recorded/<study>.json``.

A recording holds the study's tables, the content hash of the data behind them, the day and the version. Where the traces
are at hand nothing recorded is read, and a test compares it with what is computed.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass, replace
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
        return from_json(path.read_text(encoding="utf-8"))
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
    text = to_json(replace(recording, provenance={**recording.provenance, "recorded": day}))
    if path.is_file():
        older = path.read_text(encoding="utf-8")
        kept = {**recording.provenance, "recorded": json.loads(older)["provenance"]["recorded"]}
        same = to_json(replace(recording, provenance=kept))
        text = same if same == older else text
    write_atomically(path, text)
    return path


def to_json(recording: Recording, *, allow_nan: bool = False) -> str:
    """Return a recording as JSON; missing values are null, and infinite ones are refused unless `allow_nan`."""
    content = {
        "provenance": recording.provenance,
        "texts": recording.texts,
        "tables": {key: _plain(table) for key, table in recording.tables.items()},
    }
    return json.dumps(content, indent=None, separators=(",", ":"), allow_nan=allow_nan) + "\n"


def from_json(text: str) -> Recording:
    """Return the recording that `to_json` wrote.

    Raises
    ------
    ValueError, KeyError, TypeError
        If it is none.
    """
    content = json.loads(text)
    tables = {key: _frame(table) for key, table in content["tables"].items()}
    return Recording(tables, content["texts"], content["provenance"])


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
