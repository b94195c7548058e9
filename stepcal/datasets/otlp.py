"""Step rows from OpenTelemetry JSON-lines: the ``step.BATCH_SUMMARY`` events among the spans of an instrumented vLLM.

Unverified format: no public trace in OTLP form was found, so the layout follows the OTLP/JSON specification (one
ExportTraceServiceRequest a line, 64-bit integers as strings) and was tested on an invented fixture only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from stepcal.datasets.schemas import validate_steps
from stepcal.datasets.steps_layout import BATCH_EVENT, STEP_ATTRIBUTES, UNUSED_STEP_ATTRIBUTES
from stepcal.datasets.tables import LINE_INDEX
from stepcal.errors import InputError, shown

_LARGEST_INTEGER = 2**63 - 1  # OTLP integers are int64
_LARGEST_DOCUMENT = 1 << 26


def read_steps_otlp(
    path: Path | str,
    *,
    experiment_id: str,
    model: str,
    workload: str,
    tensor_parallel: int,
    ignore: Collection[str] = (),
) -> pd.DataFrame:
    """Read the step events of an OTLP JSON-lines file (unverified format).

    Each line is an ExportTraceServiceRequest: ``resourceSpans[].scopeSpans[].spans[].events[]``. Events of other names
    are skipped. Nothing in the file names the run, so the arguments do.

    Parameters
    ----------
    path : Path or str
    experiment_id, model, workload : str
    tensor_parallel : int
    ignore : collection of str
        Event attributes to drop that the schema does not know.

    Returns
    -------
    DataFrame
        Canonical step rows, in file order.

    Raises
    ------
    InputError
        If the file is absent or not text, a line is not JSON or not an export request, an attribute's value is
        malformed (each with its line number), no step event is found, or the rows break the schema.

    References
    ----------
    OpenTelemetry Protocol specification 1.x, "JSON Protobuf Encoding", https://opentelemetry.io/docs/specs/otlp/.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    line = 0
    for line, request in _requests(path):
        for event in _events(request, path, line):
            if event.get("name") == BATCH_EVENT:
                rows.append(_row(event, path, line, ignore))
                lines.append(line)
    if not rows:
        raise InputError(
            f"{path} holds no `{BATCH_EVENT}` event in its {line} lines. "
            "Record with an instrumented vLLM that emits it, with its step sampling rate above zero."
        )
    frame = pd.DataFrame(rows, index=pd.Index(lines, name=LINE_INDEX)).assign(
        experiment_id=experiment_id, model=model, workload=workload, tensor_parallel=tensor_parallel
    )
    return validate_steps(frame, source=str(path))


def _requests(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and parsed object; blank lines are skipped."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for line, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                try:
                    parsed = json.loads(text)
                except (ValueError, RecursionError) as error:
                    if line == 1 and _is_one_document(path):
                        raise InputError(
                            f"{path} is JSON, but not JSON lines: one document over several lines. Put each export request "
                            f"on a line of its own: `jq -c . {path} > {path.stem}.jsonl`."
                        ) from None
                    raise InputError(
                        f"{path}, line {line}: not JSON ({shown(str(error))}). The file is corrupt or cut short: "
                        "export it again, or delete that line."
                    ) from None
                yield line, parsed
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): it is no OTLP JSON-lines file.") from error


def _is_one_document(path: Path) -> bool:
    """Whether the whole file is one JSON document, as a pretty-printer writes it."""
    if path.stat().st_size > _LARGEST_DOCUMENT:
        return False
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _events(request: Any, path: Path, line: int) -> Iterator[dict[str, Any]]:
    if not isinstance(request, dict) or "resourceSpans" not in request:
        keys = [f"`{str(key)[:40]}`" for key in list(request)[:12]] if isinstance(request, dict) else []
        found = ", ".join(keys) or type(request).__name__
        raise InputError(
            f"{path}, line {line}: expected an OTLP ExportTraceServiceRequest with `resourceSpans`, found {found}. "
            "Export traces (not metrics or logs) with the file exporter."
        )
    try:
        for resource in request["resourceSpans"]:
            for scope in resource.get("scopeSpans", []):
                for span in scope.get("spans", []):
                    yield from map(_object, span.get("events", []))
    except (AttributeError, TypeError):
        raise InputError(
            f"{path}, line {line}: `resourceSpans[].scopeSpans[].spans[].events[]` are not lists of objects there. "
            "The line does not follow OTLP/JSON: export the trace again."
        ) from None


def _object(node: Any) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise TypeError(f"{type(node).__name__} where an object belongs")
    return node


def _row(event: dict[str, Any], path: Path, line: int, ignore: Collection[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    attributes = event.get("attributes", [])
    if not isinstance(attributes, list):
        raise InputError(
            f"{path}, line {line}: the attributes of `{BATCH_EVENT}` are not a list but {shown(attributes)}. "
            "The line does not follow OTLP/JSON: export the trace again."
        )
    for attribute in attributes:
        try:
            key, value = attribute["key"], attribute["value"]
            if key not in UNUSED_STEP_ATTRIBUTES and key not in ignore:
                row[STEP_ATTRIBUTES.get(key, key)] = _plain(value)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path}, line {line}: malformed attribute {shown(attribute)} of `{BATCH_EVENT}` ({shown(str(error))}). "
                'OTLP writes {"key": "step.id", "value": {"intValue": "12"}}.'
            ) from None
    return row


def _plain(value: dict[str, Any]) -> Any:
    """Turn an OTLP AnyValue into a Python value; integers arrive as strings."""
    ((kind, content),) = value.items()
    if kind == "intValue":
        number = int(content)
        if abs(number) > _LARGEST_INTEGER:
            raise ValueError("beyond 64 bits")
        return number
    if kind == "doubleValue":
        return float(content)
    if kind in ("stringValue", "boolValue"):
        return content
    if kind == "arrayValue":
        return [_plain(item) for item in content.get("values", [])]
    raise ValueError(f"values of kind {kind} are not read")
