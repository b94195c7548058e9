"""How every table of stepcal is declared and checked: columns with unit, meaning and bound; one error per broken rule.

A column's declaration is a pandera column whose metadata hold its kind and unit, so that the same object checks the
values and prints the data dictionary. `checked_table` is the only way in: it refuses missing and unexpected columns by
name, turns whole floats into integers, and reports the first bad value with its file, row or line, column and bound.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import pandas as pd
import pandera.pandas as pa

from stepcal.errors import InputError, shown

LINE_INDEX = "line"
"""Name of a frame's index when it holds line numbers of the source file: errors then name the line, not the row."""

_BLAMES = "\t"
"""Divides, in the text of a rule between columns, the column that errors blame from the bound."""

_SHOWN_NAMES = 12
_INTEGERS_BELOW = 2.0**63
_DTYPES = {"integer": "int64", "number": "float64", "flag": "bool"}


def integer(meaning: str, unit: str, *, minimum: int | None = 0, required: bool = True) -> pa.Column:
    """Declare a column of whole numbers, at least `minimum` (None: any)."""
    checks = [] if minimum is None else [pa.Check.ge(minimum, error=f"a whole number of at least {minimum}")]
    return _column("integer", meaning, unit, checks, required=required)


def number(
    meaning: str, unit: str, *, above: float | None = None, minimum: float | None = None, nullable: bool = False
) -> pa.Column:
    """Declare a column of finite numbers, above `above` or at least `minimum`; NaN only where `nullable`."""
    checks = [pa.Check(np.isfinite, error="a finite number")]
    if above is not None:
        checks.append(pa.Check.gt(above, error=f"a number above {above:g}"))
    if minimum is not None:
        checks.append(pa.Check.ge(minimum, error=f"a number of at least {minimum:g}"))
    return _column("number", meaning, unit, checks, nullable=nullable)


def text(meaning: str, *, choices: Iterable[str] | None = None, nullable: bool = False) -> pa.Column:
    """Declare a column of non-empty text, one of `choices` where given."""
    checks = [pa.Check(lambda values: values.str.len() > 0, error="text that is not empty")]
    if choices is not None:
        allowed = sorted(choices)
        checks = [pa.Check.isin(allowed, error=f"one of {', '.join(allowed)}")]
    return _column("text", meaning, "", checks, nullable=nullable)


def flag(meaning: str) -> pa.Column:
    """Declare a column of true or false."""
    return _column("flag", meaning, "", [])


def integer_list(meaning: str, unit: str) -> pa.Column:
    """Declare an optional column whose cells are lists of whole numbers, one number a request of the step."""
    return _column("integer list", meaning, unit, [], required=False)


def _column(
    kind: str, meaning: str, unit: str, checks: list[pa.Check], *, nullable: bool = False, required: bool = True
) -> pa.Column:
    return pa.Column(
        _DTYPES.get(kind),
        checks,
        nullable=nullable,
        required=required,
        description=meaning,
        metadata={"kind": kind, "unit": unit},
    )


def row_rule(holds: Callable[[pd.DataFrame], pd.Series], column: str, bound: str) -> pa.Check:
    """Declare a rule between columns: `holds` gives a boolean per row, and errors blame `column`."""
    return pa.Check(holds, error=f"{column}{_BLAMES}{bound}")


def column_dictionary(schema: pa.DataFrameSchema) -> pd.DataFrame:
    """Return the data dictionary of a schema: column, kind, unit, whether required, meaning."""
    rows = [
        {
            "column": name,
            "kind": _metadata(column)["kind"],
            "unit": _metadata(column)["unit"],
            "required": column.required,
            "meaning": column.description,
        }
        for name, column in schema.columns.items()
    ]
    return pd.DataFrame(rows)


def checked_table(frame: pd.DataFrame, schema: pa.DataFrameSchema, *, source: str) -> pd.DataFrame:
    """Return `frame` in the schema's column order and types, or say what is wrong with it.

    Parameters
    ----------
    frame : DataFrame
        Left as it is. An index named ``line`` holds line numbers of the source and is used in errors.
    schema : pandera.pandas.DataFrameSchema
        Declared with this module's column functions; ``schema.unique`` names the key columns.
    source : str
        What errors call the table: a file's path, or words.

    Returns
    -------
    DataFrame
        A new frame with a fresh index. Optional columns are kept where present.

    Raises
    ------
    InputError
        If the table is empty, a column is missing or unexpected, a value has the wrong kind or breaks its bound, or
        two rows share a key.
    """
    _check_columns(frame, schema, source)
    if frame.empty:
        raise InputError(f"{source}: the table has no rows. Check that the file is the one meant and not cut short.")
    places = _Places(source, frame.index if frame.index.name == LINE_INDEX else None)
    present = [name for name in schema.columns if name in frame.columns]
    plain = frame[present].reset_index(drop=True)
    coerced = pd.DataFrame(
        {name: _coerced(plain[name], schema.columns[name], places) for name in present}, index=plain.index
    )
    _check_key(coerced, schema, places)
    try:
        return schema.validate(coerced, lazy=True)
    except pa.errors.SchemaErrors as errors:
        raise _first_failure(errors, coerced, places) from None


def content_sha256(frame: pd.DataFrame) -> str:
    """Hash what a table says, whatever file, column order, row order or integer width it came in.

    Columns are taken by name; rows are sorted by the key columns present (experiment, step, index, stage), else kept in
    order. Integers hash as int64, numbers as float64 (one NaN, no negative zero), text as UTF-8, lists as JSON.

    Parameters
    ----------
    frame : DataFrame

    Returns
    -------
    str
        Hexadecimal SHA-256.
    """
    keys = [name for name in ("experiment_id", "step_id", "index", "stage") if name in frame.columns]
    ordered = frame.astype({key: "str" for key in keys if key == "experiment_id"})
    if keys:
        ordered = ordered.sort_values(keys, kind="stable")
    digest = hashlib.sha256(f"{len(ordered)} rows\n".encode())
    for name in sorted(ordered.columns):
        kind, payload = _column_bytes(ordered[name])
        digest.update(f"{name}\0{kind}\0{len(payload)}\n".encode())
        digest.update(payload)
    return digest.hexdigest()


class _Places:
    """Turns a row position into the words that find it in the source."""

    def __init__(self, source: str, lines: pd.Index | None) -> None:
        self.source = source
        self._lines = lines

    def name(self, position: int) -> str:
        if self._lines is not None:
            return f"line {self._lines[position]}"
        return f"row {position + 1}"

    def error(self, position: int, column: str, value: Any, bound: str) -> InputError:
        return InputError(
            f"{self.source}, {self.name(position)}: column `{column}` is {_shown(value)}, but must be {bound}. "
            f"Correct or drop that row and read the file again."
        )


def _shown(value: Any) -> str:
    if isinstance(value, float) and np.isnan(value):
        return "NaN"
    if value is None or value is pd.NA:
        return "missing"
    if isinstance(value, np.generic):
        value = value.item()
    return shown(value)


def _metadata(column: pa.Column) -> dict[str, str]:
    return cast(dict[str, str], column.metadata)


def _names(names: Iterable[str]) -> str:
    listed = [f"`{name}`" for name in names]
    shown = ", ".join(listed[:_SHOWN_NAMES])
    return shown if len(listed) <= _SHOWN_NAMES else f"{shown} and {len(listed) - _SHOWN_NAMES} more"


def _check_columns(frame: pd.DataFrame, schema: pa.DataFrameSchema, source: str) -> None:
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise InputError(f"{source}: column {_names(repeated)} appears twice. Keep one of them.")
    missing = [name for name, column in schema.columns.items() if column.required and name not in frame.columns]
    extra = [str(name) for name in frame.columns if name not in schema.columns]
    if not missing and not extra:
        return
    problems = []
    if missing:
        problems.append(f"missing column{'s' * (len(missing) > 1)} {_names(missing)}")
    if extra:
        problems.append(f"unexpected column{'s' * (len(extra) > 1)} {_names(extra)}")
    raise InputError(
        f"{source}: {'; '.join(problems)}. A table of {schema.name} has the columns {', '.join(schema.columns)} "
        f"(`stepcal.datasets` describes each): rename, add or drop columns to match."
    )


def _coerced(values: pd.Series, column: pa.Column, places: _Places) -> pd.Series:
    kind, name = _metadata(column)["kind"], str(values.name)
    if kind == "integer list":
        return _lists(values, places)
    missing = values.isna().to_numpy()
    if missing.any() and not column.nullable:
        position = int(missing.argmax())
        raise places.error(position, name, values.iloc[position], _bound(column))
    if kind == "text":
        return values.astype("str")
    if kind == "flag":
        return _flags(values, places)
    return _numbers(values, column, places)


def _bound(column: pa.Column) -> str:
    stated = [check.error for check in column.checks if check.error]
    return str(stated[-1]) if stated else "true or false" if _metadata(column)["kind"] == "flag" else "a whole number"


def _flags(values: pd.Series, places: _Places) -> pd.Series:
    if values.dtype != bool and not pd.api.types.is_bool_dtype(values):
        wrong = ~values.map(lambda value: isinstance(value, bool | np.bool_)).to_numpy(dtype=bool)
        if wrong.any():
            position = int(wrong.argmax())
            raise places.error(position, str(values.name), values.iloc[position], "true or false")
    return values.astype(bool)


def _numbers(values: pd.Series, column: pa.Column, places: _Places) -> pd.Series:
    name, whole = str(values.name), _metadata(column)["kind"] == "integer"
    if pd.api.types.is_signed_integer_dtype(values):
        return values.astype("int64" if whole else "float64")
    scalars = values.map(lambda value: value if _is_convertible(value) else "")
    numeric = pd.to_numeric(scalars if values.dtype == object else values, errors="coerce")
    wrong = (numeric.isna() & values.notna()).to_numpy()
    if pd.api.types.is_bool_dtype(values):
        wrong = np.ones(len(values), dtype=bool)
    elif not wrong.any() and whole:
        magnitudes = np.abs(numeric.to_numpy(dtype=float))
        wrong = (magnitudes != np.floor(magnitudes)) | (magnitudes >= _INTEGERS_BELOW)
    if wrong.any():
        position = int(wrong.argmax())
        raise places.error(position, name, values.iloc[position], "a whole number" if whole else _bound(column))
    return numeric.astype("int64" if whole else "float64")


def _is_convertible(value: Any) -> bool:
    """Whether pandas can turn a value into a number or say that it is none: no list, and no integer beyond floats."""
    return bool(pd.api.types.is_scalar(value)) and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def _lists(values: pd.Series, places: _Places) -> pd.Series:
    lists: list[list[int]] = []
    for position, cell in enumerate(values):
        items = np.asarray(cell if isinstance(cell, list | tuple | np.ndarray) else [np.nan])
        whole = items.size == 0 or (
            items.dtype.kind in "iuf" and bool(np.all(np.isfinite(items) & (items >= 0) & (items == np.floor(items))))
        )
        if not whole:
            raise places.error(position, str(values.name), cell, "a list of whole numbers of at least 0")
        lists.append([int(item) for item in items])
    return pd.Series(lists, index=values.index, dtype=object)


def _check_key(frame: pd.DataFrame, schema: pa.DataFrameSchema, places: _Places) -> None:
    keys = list(schema.unique or [])
    repeats = frame.duplicated(keys).to_numpy() if keys else np.zeros(1, dtype=bool)
    if not repeats.any():
        return
    second = int(repeats.argmax())
    first = int((frame[keys] == frame.loc[second, keys]).all(axis=1).to_numpy().argmax())
    key = ", ".join(f"{name} {_shown(frame.loc[second, name])}" for name in keys)
    raise InputError(
        f"{places.source}, {places.name(second)}: duplicate of {places.name(first)} ({key}). "
        f"The columns {_names(keys)} name a row: drop one of the two, or give each run its own experiment_id."
    )


def _first_failure(errors: pa.errors.SchemaErrors, frame: pd.DataFrame, places: _Places) -> InputError:
    cases = errors.failure_cases.dropna(subset=["index"])
    if cases.empty:
        return InputError(f"{places.source}: {errors}")
    case = cases.sort_values("index", kind="stable").iloc[0]
    position = int(case["index"])
    blamed, blames, bound = str(case["check"]).rpartition(_BLAMES)
    column = blamed if blames else str(case["column"])
    return places.error(position, column, frame[column].iloc[position], bound)


def _column_bytes(values: pd.Series) -> tuple[str, bytes]:
    if pd.api.types.is_bool_dtype(values):
        return "flag", values.to_numpy(dtype=np.uint8).tobytes()
    if pd.api.types.is_integer_dtype(values):
        return "integer", values.to_numpy(dtype="<i8").tobytes()
    if pd.api.types.is_float_dtype(values):
        numbers = values.to_numpy(dtype="<f8", na_value=np.nan) + 0.0
        numbers[np.isnan(numbers)] = np.nan
        return "number", numbers.tobytes()
    plain = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in values]
    cells = [None if not isinstance(cell, list) and pd.isna(cell) else cell for cell in plain]
    return "text", json.dumps(cells, ensure_ascii=False).encode()
