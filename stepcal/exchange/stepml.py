"""``stepml_coefficients.json``: a fitted step-time model with intervals, validity range and hashes, by a published schema.

It is a superset of the coefficient files that `stepcal.step_time.coefficients` reads, so one file drives the simulator and
travels. A CSV table of the parameters is the same without what stands around them.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastjsonschema

from stepcal.errors import InputError
from stepcal.locations import data_folder

FORMAT, SCHEMA_VERSION = "stepml_coefficients", 1
SCHEMA_FILE = "stepml_coefficients-1.schema.json"
_COLUMNS = ("name", "value", "unit", "low", "high", "identified", "reason")
_WORDS = ("name", "unit", "reason")
_ABOUT = "# "


@dataclass(frozen=True)
class StepmlFile:
    """A coefficient file.

    Attributes
    ----------
    variant : str
        Form of the step time.
    parameters : tuple of dict
        `name`, `value`, `unit`, and where known `low`, `high`, `identified`, `reason`.
    about : dict
        Everything else of the file: `validity`, `errors`, `provenance`, `combine` and so on.
    """

    variant: str
    parameters: tuple[dict[str, Any], ...]
    about: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the file's content, in the order in which it is written."""
        head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "variant": self.variant}
        return {**head, **self.about, "parameters": [dict(p) for p in self.parameters]}


@functools.cache
def schema() -> dict[str, Any]:
    """Return the published JSON Schema."""
    text = (data_folder() / "exchange" / SCHEMA_FILE).read_text(encoding="utf-8")
    return dict(json.loads(text))


@functools.cache
def _validator() -> Any:
    return fastjsonschema.compile(schema())


def checked_document(document: Any, *, source: str) -> dict[str, Any]:
    """Return a document that holds to the schema.

    Parameters
    ----------
    document : object
    source : str
        What errors call it.

    Raises
    ------
    InputError
        If it breaks the schema; the place and the rule are named. A later version says so.
    """
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{source} has `schema_version` {version}; this stepcal reads up to {SCHEMA_VERSION}. Update stepcal, or export "
            "the file again with the older version."
        )
    try:
        _validator()(document)
    except fastjsonschema.JsonSchemaValueException as error:
        raise InputError(f"{source}: {error.message[:200]}. The schema is data/exchange/{SCHEMA_FILE}.") from None
    return dict(document)


def stepml_file(document: Mapping[str, Any], *, source: str) -> StepmlFile:
    """Build from a coefficient document of any age: one of ours without a format, or one that holds to the schema.

    Raises
    ------
    InputError
        As `checked_document`.
    """
    content = dict(document)
    content.setdefault("format", FORMAT)
    content.setdefault("schema_version", SCHEMA_VERSION)
    if isinstance(content.get("parameters"), list):
        content["parameters"] = [{"unit": "1", **p} if isinstance(p, dict) else p for p in content["parameters"]]
    checked_document(content, source=source)
    about = {k: v for k, v in content.items() if k not in ("format", "schema_version", "variant", "parameters")}
    return StepmlFile(str(content["variant"]), tuple(content["parameters"]), about)


def read_stepml(path: Path) -> StepmlFile:
    """Read ``stepml_coefficients.json``, or the CSV table that `csv_text` wrote.

    Raises
    ------
    InputError
        If the file cannot be read or breaks the schema.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        return from_csv(text, source=str(path)) if path.suffix == ".csv" else _from_json(text, path)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}. Check the path.") from None


def _from_json(text: str, path: Path) -> StepmlFile:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is no JSON document: {error}. Export it again.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}; a coefficient file is an object with `variant`.")
    return stepml_file(document, source=str(path))


def json_text(file: StepmlFile) -> str:
    """Return the file as JSON; numbers are written so that reading gives the same bits."""
    return json.dumps(file.document(), indent=1, allow_nan=False) + "\n"


def csv_text(file: StepmlFile) -> str:
    """Return the parameters as a CSV table; the rest stands in one comment line, so that nothing is lost."""
    out = io.StringIO()
    out.write(_ABOUT + json.dumps({"variant": file.variant, **file.about}) + "\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(_COLUMNS)
    for p in file.parameters:
        table.writerow([_cell(c, p[c]) if c in p else "" for c in _COLUMNS])
    return out.getvalue()


def _cell(column: str, value: Any) -> str:
    """A value as spreadsheets and pandas read it; text that would be taken for something else is written as JSON."""
    is_plain = column in _WORDS and isinstance(value, str) and value != "" and not value.startswith('"')
    return value if is_plain else json.dumps(value)


def _value(column: str, cell: str) -> Any:
    return cell if column in _WORDS and not cell.startswith('"') else json.loads(cell)


def from_csv(text: str, *, source: str) -> StepmlFile:
    """Read what `csv_text` wrote.

    Raises
    ------
    InputError
        If it is no such table, or breaks the schema.
    """
    first, _, rest = text.partition("\n")
    try:
        about = json.loads(first.removeprefix(_ABOUT))
        parameters = [
            {c: _value(c, v) for c, v in row.items() if v not in (None, "")}
            for row in csv.DictReader(io.StringIO(rest))
        ]
        return stepml_file({**about, "parameters": parameters}, source=source)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source} is no coefficient table of stepcal ({error}). Export it again with `--to csv`."
        ) from None
