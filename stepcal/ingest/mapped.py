"""Tables of one's own, CSV or parquet, with a mapping file that says which column is what, and in which unit.

``columns: {sent: {column: ts, unit: ms}, prompt_tokens: n_in, output_tokens: n_out, e2e: {column: total, unit: ms}}``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from stepcal.errors import InputError
from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, number, rejected, whole
from stepcal.ingest.request_log import Request

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "datetime": math.nan}
"""Seconds of one unit; `datetime` is ISO 8601 text, for `sent` alone."""
_TIMES = ("sent", "e2e", "ttft", "queue", "last_token", "first_token")
_COUNTS = ("prompt_tokens", "output_tokens", "stage", "stream_events", "cached_prompt_tokens")
_TEXTS = ("error", "session_id")
NEEDED = ("prompt_tokens", "output_tokens")
_BATCH_ROWS = 8_192


def read_mapping(path: Path) -> dict[str, dict[str, Any]]:
    """Read a mapping file: our columns, each with the column of the table and its unit.

    Raises
    ------
    InputError
        If it is no YAML mapping, a name or a unit is unknown, or a column that is needed is missing.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from None
    columns = content.get("columns") if isinstance(content, dict) else None
    if not isinstance(columns, dict):
        raise InputError(f"{path} has no mapping `columns`. It says, for each of our columns, the table's: {_known()}.")
    return checked_mapping(columns, str(path))


def checked_mapping(columns: Mapping[Any, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return a mapping with each column's settings written out.

    Raises
    ------
    InputError
        As `read_mapping`.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, setting in columns.items():
        own = {"column": setting} if isinstance(setting, str) else setting
        if (
            name not in (*_TIMES, *_COUNTS, *_TEXTS)
            or not isinstance(own, dict)
            or not isinstance(own.get("column"), str)
        ):
            raise InputError(f"{source}: `{name}: {setting!r}` names no column of the table. Ours: {_known()}.")
        unit = own.get("unit")
        if name in _TIMES and (unit not in SECONDS or (unit == "datetime" and name != "sent")):
            raise InputError(
                f"{source}: `{name}` has the unit {unit!r}; a time needs one of {', '.join(SECONDS)} "
                "(`datetime` for `sent`)."
            )
        result[str(name)] = own
    missing = [n for n in NEEDED if n not in result]
    if missing:
        raise InputError(f"{source} lacks `{missing[0]}`. A request needs {' and '.join(NEEDED)}.")
    return result


def _known() -> str:
    return ", ".join((*_TIMES, *_COUNTS, *_TEXTS))


def _read(path: Path, options: Options) -> Iterator[Row]:
    if not options.mapping:
        raise UnreadableError(f"{path} is a table of your own: give `--mapping FILE`, which says what its columns are.")
    mapping = options.mapping
    records = _parquet(path, mapping) if path.suffix == ".parquet" else _csv(path, mapping)
    row = 0
    for row, record in records:
        try:
            yield _request(record, mapping, row)
        except MALFORMED as error:
            yield rejected(row, str(error), str(record))
    if not row:
        raise UnreadableError(f"{path} has no rows.")


def _csv(path: Path, mapping: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            _check_columns(path, table.fieldnames or (), mapping)
            for record in table:
                yield table.line_num, record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(f"{path} cannot be read as a CSV table: {error}.") from None


def _parquet(path: Path, mapping: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as table:
            _check_columns(path, table.schema_arrow.names, mapping)
            wanted = sorted({own["column"] for own in mapping.values()})
            row = 0
            for batch in table.iter_batches(_BATCH_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (OSError, pa.ArrowException) as error:
        raise UnreadableError(f"{path} cannot be read as a parquet table: {error}.") from None


def _check_columns(path: Path, found: Any, mapping: Mapping[str, Any]) -> None:
    missing = next((own["column"] for own in mapping.values() if own["column"] not in found), None)
    if missing is not None:
        raise UnreadableError(
            f"{path} has no column `{missing}`, which the mapping names. It has: {', '.join(map(str, found))}."
        )


def _request(record: dict[str, Any], mapping: Mapping[str, Any], row: int) -> Request:
    times = {name: _seconds(record, mapping, name) for name in _TIMES}
    counts = {name: _count(record, mapping, name) for name in _COUNTS}
    error = _error(record, mapping)
    sent = times["sent"]
    e2e = times["last_token"] - sent if math.isnan(times["e2e"]) else times["e2e"]
    ttft = times["first_token"] - sent if math.isnan(times["ttft"]) else times["ttft"]
    session = record.get(mapping["session_id"]["column"]) if "session_id" in mapping else None
    return Request(
        source_row=row,
        prompt_tokens=counts["prompt_tokens"] or 0,
        output_tokens=counts["output_tokens"] or 0,
        sent_s=sent,
        e2e_s=e2e,
        ttft_s=ttft,
        error=error,
        stage=counts["stage"] or 0,
        stream_events=counts["stream_events"],
        queue_s=None if math.isnan(times["queue"]) else times["queue"],
        cached_prompt_tokens=counts["cached_prompt_tokens"],
        session_id=None if session in (None, "") else str(session),
    )


def _seconds(record: dict[str, Any], mapping: Mapping[str, Any], name: str) -> float:
    if name not in mapping:
        return math.nan
    value, unit = record[mapping[name]["column"]], mapping[name]["unit"]
    if value is None or value == "":
        return math.nan
    if unit == "datetime":
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return number(_parsed(value), mapping[name]["column"]) * SECONDS[unit]


def _count(record: dict[str, Any], mapping: Mapping[str, Any], name: str) -> int | None:
    if name not in mapping:
        return None
    value = record[mapping[name]["column"]]
    return None if value is None or value == "" else whole(_parsed(value), mapping[name]["column"])


def _parsed(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _error(record: dict[str, Any], mapping: Mapping[str, Any]) -> str | None:
    """What the table's error column says, None where it is empty or one of the words that mean success (`ok`)."""
    if "error" not in mapping:
        return None
    value = record[mapping["error"]["column"]]
    good = [str(word) for word in mapping["error"].get("ok", ())]
    return None if value is None or str(value) in ("", "False", *good) else str(value)


FORMAT = Format(
    name="table",
    version=1,
    recognises=lambda path, head: path.suffix in (".csv", ".parquet"),
    read=_read,
    definitions={
        "sent": "The mapped column, in its unit.",
        "e2e": "The mapped `e2e`, or `last_token` less `sent`.",
        "ttft": "The mapped `ttft`, or `first_token` less `sent`.",
        "itl": "Not taken: time per output token is computed.",
        "tpot": "(e2e - ttft) / (output_tokens - 1): ours.",
        "concurrency": "Counted from the requests in flight.",
    },
    verified="any table, by the mapping that its user gives",
)
