"""The acceptance table, ``tests/acceptance.csv``: every figure that was asked for, its target, and what was measured.

A page may cite a row only if the row holds; what was not run says so in place of a figure.
"""

from __future__ import annotations

import pandas as pd

from stepcal.errors import InputError
from stepcal.locations import shipped_folder

COLUMNS = ("id", "issue", "what", "target", "command", "measured", "date", "holds")
NOT_MEASURED = "not measured"
UNVERIFIED = "unverified format"
"""Words that stand for a figure: what was not run, and a format that was tested on an invented fixture only."""
HOLDS, MISSED, OPEN = "yes", "no", "open"


def load() -> pd.DataFrame:
    """Read the table.

    Raises
    ------
    InputError
        If a column is missing, an id occurs twice, or a row without a figure claims to hold.
    """
    path = shipped_folder() / "tests" / "acceptance.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(table.columns) != COLUMNS:
        raise InputError(f"{path} has the columns {', '.join(table.columns)}; it needs {', '.join(COLUMNS)}.")
    twice = table["id"][table["id"].duplicated()]
    if len(twice):
        raise InputError(f"{path} has the id `{twice.iloc[0]}` twice.")
    open_rows = table["measured"].isin([NOT_MEASURED, UNVERIFIED])
    wrong = table[(open_rows != (table["holds"] == OPEN)) | ~table["holds"].isin([HOLDS, MISSED, OPEN])]
    if len(wrong):
        row = wrong.iloc[0]
        raise InputError(
            f"{path}: `{row['id']}` holds `{row['holds']}` with the figure `{row['measured']}`. Rows without a figure are "
            f"`{OPEN}`, the others `{HOLDS}` or `{MISSED}`."
        )
    return table.astype({"issue": int})


def cite(identifier: str) -> pd.Series:
    """Return a row that holds, for a page to cite.

    Raises
    ------
    InputError
        If there is no such row, or it does not hold.
    """
    table = load()
    found = table[table["id"] == identifier]
    if found.empty:
        raise InputError(f"The acceptance table has no row `{identifier}`.")
    row = found.iloc[0]
    if row["holds"] != HOLDS:
        raise InputError(f"`{identifier}` does not hold ({row['measured']}); no page may cite it.")
    return row
