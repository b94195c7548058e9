"""How far a table that is computed anew may be from its recording: ``data/recorded/tolerances.csv``, stated in the book.

Machines differ in the last bits of logarithms, sums and linear algebra. Each table declares what that may amount to: a
share of a value's interval, or of the last place that a page shows of it. Whole numbers and words have to be the same,
but where a column is declared too; rows of a ranking are compared by what they name, in any order of equals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.locations import data_folder
from stepcal.units import FloatArray

INTERVAL, SPREAD, DECIMALS, DIGITS, RANKING = "interval", "spread", "decimals", "digits", "ranking"
KINDS = (INTERVAL, SPREAD, DECIMALS, DIGITS, RANKING)
EVERY = "*"
"""Column that stands for all columns of floating-point numbers which have no row of their own."""
WITHOUT_INTERVAL = 0.01
"""Share of a value that stands for its interval where it has none."""
SMALLEST_SHARE = 1e-9
"""No tolerance is below this share of the value, where an interval is narrow or a value is shown to many places."""


@dataclass(frozen=True)
class Tolerance:
    """What one column of one table may differ by.

    Attributes
    ----------
    study, table, column : str
        `EVERY` as column stands for all that have no row of their own.
    share : float
        Of what `of` names.
    of : str
        ``interval``: half of the distance between the columns that `by` names; ``spread``: the value times the column that
        `by` names, its standard deviation in the logarithm; ``decimals``, ``digits``: the last of so many places that a page
        shows after the point, or of so many significant digits; ``ranking``: as ``digits``, and rows come in any order of
        equals.
    by : str
        Columns, or a number of places.
    """

    study: str
    table: str
    column: str
    share: float
    of: str
    by: str

    def allowed(self, values: FloatArray, table: pd.DataFrame) -> FloatArray:
        """Largest difference from each recorded value, in its unit; shape (n_rows,)."""
        size = np.where(np.isfinite(values), np.abs(values), 0.0)
        if self.of == INTERVAL:
            low, high = (table[name].to_numpy(dtype=float) for name in self.by.split(".."))
            scale = np.where(np.isfinite(high - low), (high - low) / 2.0, WITHOUT_INTERVAL * size)
        elif self.of == SPREAD:
            scale = size * table[self.by].to_numpy(dtype=float)
        elif self.of == DECIMALS:
            scale = np.full(size.shape, 10.0 ** -int(self.by))
        else:
            place = np.floor(np.log10(np.where(size > 0, size, 1.0))) + 1 - int(self.by)
            scale = np.where(size > 0, 10.0**place, 10.0 ** -int(self.by))
        return np.maximum(self.share * scale, SMALLEST_SHARE * size)


@dataclass(frozen=True)
class Difference:
    """Where a table is farthest from its recording.

    Attributes
    ----------
    table, column : str
    row : int
    size : float
        In units of the tolerance: above 1 is a finding; infinite where words or whole numbers differ.
    text : str
        The two values.
    """

    table: str
    column: str
    row: int
    size: float
    text: str

    def __str__(self) -> str:
        where = f"table `{self.table}`" + (f": `{self.column}` in row {self.row}" if self.column else "")
        size = "" if np.isinf(self.size) else f", {self.size:.3g} of its tolerance"
        return f"{where} {self.text}{size}"


def tolerance_table() -> pd.DataFrame:
    """Return all declared tolerances: `study`, `table`, `column`, `share`, `of`, `by`.

    Raises
    ------
    InputError
        If a row is of no known kind or its share is not positive.
    """
    path = data_folder() / "recorded" / "tolerances.csv"
    table = pd.read_csv(path, dtype={"by": str}, keep_default_na=False)
    bad = table[~table["of"].isin(KINDS) | ~(table["share"] > 0)]
    if len(bad):
        raise InputError(
            f"{path}, row {bad.index[0] + 2}: `of` is one of {', '.join(KINDS)}, and `share` is positive; "
            f"found {bad['of'].iloc[0]!r} and {bad['share'].iloc[0]}."
        )
    return table


def machines_table() -> pd.DataFrame:
    """Return what ``benchmarks/machines.py`` found.

    Returns
    -------
    DataFrame
        `setting`, `studies`, `largest_difference` in units of its tolerance, `of` (table and column), `holds`, `seconds`.
    """
    return pd.read_csv(data_folder() / "recorded" / "machines.csv", keep_default_na=False)


def tolerances_of(study: str) -> dict[tuple[str, str], Tolerance]:
    """Return a study's tolerances by table and column."""
    table = tolerance_table()
    rows = [
        Tolerance(**{str(k): v for k, v in row.items()}) for row in table[table["study"] == study].to_dict("records")
    ]
    return {(row.table, row.column): row for row in rows}


def difference(
    name: str, computed: pd.DataFrame, recorded: pd.DataFrame, declared: dict[tuple[str, str], Tolerance]
) -> Difference:
    """Compare a table with its recording.

    Parameters
    ----------
    name : str
        Of the table.
    computed, recorded : DataFrame
    declared : dict
        Of `tolerances_of`.

    Returns
    -------
    Difference
        The largest; of size 0 where nothing differs.

    Raises
    ------
    InputError
        If the table has floating-point numbers and declares no tolerance.
    """
    if list(computed.columns) != list(recorded.columns):
        return Difference(name, "", -1, np.inf, f"has other columns: {sorted(map(str, set(computed) ^ set(recorded)))}")
    if len(computed) != len(recorded):
        return Difference(name, "", -1, np.inf, f"has {len(computed)} rows, recorded {len(recorded)}")
    ranked = [c for c in computed.columns if (name, c) in declared and declared[name, c].of == RANKING]
    if ranked:
        return _ranking_difference(name, computed, recorded, declared[name, ranked[0]])
    worst = Difference(name, "", -1, 0.0, "is as recorded")
    for column in computed.columns:
        found = _column_difference(name, str(column), computed, recorded, declared)
        worst = found if found.size > worst.size else worst
    return worst


def _column_difference(
    name: str,
    column: str,
    computed: pd.DataFrame,
    recorded: pd.DataFrame,
    declared: dict[tuple[str, str], Tolerance],
) -> Difference:
    is_float = any(pd.api.types.is_float_dtype(t[column]) for t in (computed, recorded))
    tolerance = declared.get((name, column)) or (declared.get((name, EVERY)) if is_float else None)
    if is_float and tolerance is None:
        raise InputError(
            f"Table `{name}` declares no tolerance for `{column}`. Add a row to data/recorded/tolerances.csv; "
            f"`{EVERY}` as column stands for all."
        )
    if tolerance is None:
        a, b = (t[column].astype(object).where(t[column].notna(), None).to_numpy() for t in (computed, recorded))
        size = np.where(a == b, 0.0, np.inf)
    else:
        a, b = computed[column].to_numpy(dtype=float), recorded[column].to_numpy(dtype=float)
        size = _sizes(a, b, tolerance.allowed(b, recorded))
    row = int(np.argmax(size)) if size.size else -1
    text = f"is {a[row]}, recorded {b[row]}" if size.size else "is empty"
    return Difference(name, column, row, float(size[row]) if size.size else 0.0, text)


def _sizes(a: FloatArray, b: FloatArray, allowed: FloatArray) -> FloatArray:
    """Differences in units of what is allowed; infinite where only one is missing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.where(a == b, 0.0, np.abs(a - b) / allowed)
    missing = np.isnan(a) | np.isnan(b)
    return np.where(missing, np.where(np.isnan(a) & np.isnan(b), 0.0, np.inf), np.where(np.isnan(size), np.inf, size))


def _ranking_difference(name: str, computed: pd.DataFrame, recorded: pd.DataFrame, tolerance: Tolerance) -> Difference:
    """Compare rows by what they name; one that only one table has must tie with the last that the other has."""
    column = tolerance.column
    scores = [
        {
            tuple(row): float(score)
            for row, score in zip(t.drop(columns=column).to_numpy().tolist(), t[column], strict=True)
        }
        for t in (computed, recorded)
    ]
    worst = Difference(name, column, -1, 0.0, "is as recorded")
    allowed = dict(
        zip(scores[1], tolerance.allowed(np.array(list(scores[1].values())), recorded).tolist(), strict=True)
    )
    at_end = tolerance.allowed(np.array([min(scores[1].values(), default=0.0)]), recorded.tail(1))[0]
    for row, what in enumerate(dict.fromkeys([*scores[0], *scores[1]])):
        ours, theirs = (own.get(what, min(own.values(), default=np.nan)) for own in scores)
        size = abs(ours - theirs) / allowed.get(what, at_end)
        if size > worst.size:
            worst = Difference(name, column, row, float(size), f"of {what} is {ours}, recorded {theirs}")
    return worst
