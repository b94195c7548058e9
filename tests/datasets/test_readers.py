"""Parquet, OTLP and dispatch: round trips, and errors that name the file, the line and the way out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stepcal.datasets import (
    content_sha256,
    read_requests_parquet,
    read_steps,
    read_steps_otlp,
    read_steps_parquet,
    validate_requests,
    validate_steps,
)
from stepcal.datasets.steps_layout import BATCH_EVENT, STEP_ATTRIBUTES
from stepcal.errors import InputError

RUN: dict[str, Any] = {
    "experiment_id": "run-a",
    "model": "llama-2-7b",
    "workload": "general",
    "tensor_parallel": 1,
}
ATTRIBUTES = {column: attribute for attribute, column in STEP_ATTRIBUTES.items()}


def _study_layout(steps: pd.DataFrame) -> pd.DataFrame:
    return steps.rename(columns={**ATTRIBUTES, "tensor_parallel": "tp"})


def _any_value(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"arrayValue": {"values": [_any_value(item) for item in value]}}
    return {"doubleValue": value} if isinstance(value, float) else {"intValue": str(value)}


def _event(row: Mapping[Any, Any], name: str = BATCH_EVENT) -> dict[str, Any]:
    attributes = [
        {"key": ATTRIBUTES[column], "value": _any_value(value)} for column, value in row.items() if column in ATTRIBUTES
    ]
    return {"name": name, "timeUnixNano": "1771360000000000000", "attributes": attributes}


def _export(events: list[dict[str, Any]]) -> str:
    span = {"traceId": "00", "spanId": "00", "name": "engine", "events": events}
    return json.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": [span]}]}]})


@pytest.fixture
def otlp_lines(steps: pd.DataFrame) -> list[str]:
    """An invented trace of four lines: two events, a blank line, two events beside another one, and no event."""
    events = [_event(row) for row in steps.to_dict("records")]
    return [_export(events[:2]), "", _export([*events[2:], _event({}, name="journey.FIRST_TOKEN")]), _export([])]


def _written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_canonical_parquet_round_trips(steps: pd.DataFrame, tmp_path: Path) -> None:
    checked = validate_steps(steps, source="trace")
    checked.to_parquet(tmp_path / "steps.parquet")
    pd.testing.assert_frame_equal(read_steps_parquet(tmp_path / "steps.parquet"), checked)


def test_parquet_keeps_lists_per_request(steps: pd.DataFrame, tmp_path: Path) -> None:
    checked = validate_steps(steps.assign(decode_kv_lens=pd.Series([[1, 2, 3]] * len(steps))), source="trace")
    checked.to_parquet(tmp_path / "steps.parquet")
    again = read_steps_parquet(tmp_path / "steps.parquet")
    assert again["decode_kv_lens"].tolist() == checked["decode_kv_lens"].tolist()
    assert content_sha256(again) == content_sha256(checked)


def test_the_studys_layout_is_renamed_and_its_derived_columns_dropped(steps: pd.DataFrame, tmp_path: Path) -> None:
    derived = {"cycle_time_us": 1.0, "matched_iti_count": 2, "cycle_time_ratio": 0.5, "kv.usage_gpu_ratio": 0.1}
    _study_layout(steps).assign(**derived, **{"batch.scheduled_tokens": 6}).to_parquet(tmp_path / "steps.parquet")
    pd.testing.assert_frame_equal(read_steps_parquet(tmp_path / "steps.parquet"), validate_steps(steps, source="trace"))


def test_an_unknown_column_is_refused_unless_ignored(steps: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "steps.parquet"
    _study_layout(steps).assign(mystery=1).to_parquet(path)
    with pytest.raises(InputError, match="unexpected column `mystery`"):
        read_steps_parquet(path)
    assert len(read_steps_parquet(path, ignore=["mystery"])) == len(steps)


def test_requests_parquet_takes_both_names_of_the_prompt(requests: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    requests.rename(columns={"prompt_tokens": "input_tokens"}).to_parquet(path)
    pd.testing.assert_frame_equal(read_requests_parquet(path), validate_requests(requests, source="requests"))


@pytest.mark.parametrize("reader", [read_steps_parquet, read_requests_parquet, read_steps])
@pytest.mark.parametrize("content", [b"PAR1 and then nothing that is parquet", b"", b"PAR1"])
def test_corrupt_parquet_names_the_file(reader: Any, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        reader(path)
    assert str(refusal.value).startswith(f"{path} cannot be read as parquet")
    assert "corrupt or cut short" in str(refusal.value)


@pytest.mark.parametrize("reader", [read_steps_parquet, read_requests_parquet, read_steps])
def test_an_absent_file_is_named(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.parquet is not a file"):
        reader(tmp_path / "nowhere.parquet")


def test_otlp_gives_the_rows_of_its_step_events(steps: pd.DataFrame, otlp_lines: list[str], tmp_path: Path) -> None:
    path = _written(tmp_path / "trace.jsonl", otlp_lines)
    expected = validate_steps(steps, source="trace")
    pd.testing.assert_frame_equal(read_steps_otlp(path, **RUN), expected)
    pd.testing.assert_frame_equal(read_steps(path, **RUN), expected)


def test_otlp_reads_lists_per_request(steps: pd.DataFrame, tmp_path: Path) -> None:
    row = steps.to_dict("records")[0] | {"decode_kv_lens": [4, 5, 6]}
    path = _written(tmp_path / "trace.jsonl", [_export([_event(row)])])
    assert read_steps_otlp(path, **RUN)["decode_kv_lens"].tolist() == [[4, 5, 6]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"resourceSpans": [', "line 5: not JSON"),
        ("[1, 2]", "line 5: expected an OTLP ExportTraceServiceRequest with `resourceSpans`, found list"),
        ('{"resourceMetrics": []}', "line 5: expected an OTLP ExportTraceServiceRequest"),
        ('{"resourceSpans": {"a": 1}}', "line 5: `resourceSpans[].scopeSpans[].spans[].events[]` are not lists"),
        (_export([7]), "line 5: `resourceSpans[].scopeSpans[].spans[].events[]` are not lists"),  # type: ignore[list-item]
        (
            _export([{"name": BATCH_EVENT, "attributes": 7}]),
            "line 5: the attributes of `step.BATCH_SUMMARY` are not a list",
        ),
        (
            _export([{"name": BATCH_EVENT, "attributes": [{"key": "step.id", "value": {"intValue": "9" * 30}}]}]),
            "line 5: malformed attribute",
        ),
        (
            _export([{"name": BATCH_EVENT, "attributes": [{"key": "step.id", "value": 12}]}]),
            "line 5: malformed attribute",
        ),
        ('{"resourceSpans": 3}', "line 5: `resourceSpans[].scopeSpans[].spans[].events[]` are not lists"),
        (
            _export([{"name": BATCH_EVENT, "attributes": [{"key": "step.id", "value": {"intValue": "twelve"}}]}]),
            "line 5: malformed attribute",
        ),
        (
            _export([{"name": BATCH_EVENT, "attributes": [{"key": "step.id", "value": {"bytesValue": "AA"}}]}]),
            "values of kind bytesValue are not read",
        ),
        (_export([{"name": BATCH_EVENT, "attributes": [{"value": {"intValue": "1"}}]}]), "line 5: malformed attribute"),
        (
            _export([{"name": BATCH_EVENT, "attributes": [{"key": "step.id", "value": {"intValue": "77"}}]}]),
            "line 5: column `ts_start_ns` is NaN",
        ),
    ],
)
def test_a_bad_otlp_line_is_named(otlp_lines: list[str], line: str, said: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "trace.jsonl", [*otlp_lines, line])
    with pytest.raises(InputError) as refusal:
        read_steps_otlp(path, **RUN)
    assert str(refusal.value).startswith(f"{path}, line 5")
    assert said in str(refusal.value)


def test_a_repeated_otlp_step_names_both_lines(otlp_lines: list[str], tmp_path: Path) -> None:
    path = _written(tmp_path / "trace.jsonl", [*otlp_lines, otlp_lines[2]])
    with pytest.raises(InputError, match="line 5: duplicate of line 3"):
        read_steps_otlp(path, **RUN)


def test_an_unknown_otlp_attribute_is_refused_unless_ignored(steps: pd.DataFrame, tmp_path: Path) -> None:
    event = _event(steps.to_dict("records")[0])
    event["attributes"].append({"key": "lora.active", "value": {"intValue": "2"}})
    path = _written(tmp_path / "trace.jsonl", [_export([event])])
    with pytest.raises(InputError, match=r"unexpected column `lora\.active`"):
        read_steps_otlp(path, **RUN)
    assert len(read_steps_otlp(path, **RUN, ignore=["lora.active"])) == 1


def test_otlp_without_step_events_says_so(tmp_path: Path) -> None:
    path = _written(tmp_path / "trace.jsonl", [_export([_event({}, name="other")])])
    with pytest.raises(InputError, match=r"holds no `step\.BATCH_SUMMARY` event in its 1 lines"):
        read_steps_otlp(path, **RUN)


def test_otlp_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_steps_otlp(tmp_path / "trace.jsonl", **RUN)


def test_dispatch_asks_for_the_names_that_otlp_lacks(otlp_lines: list[str], tmp_path: Path) -> None:
    path = _written(tmp_path / "trace.log", otlp_lines)
    with pytest.raises(InputError, match="pass `model`, `workload`, `tensor_parallel` too"):
        read_steps(path, experiment_id="run-a")


def test_dispatch_goes_by_content_where_the_suffix_is_silent(steps: pd.DataFrame, tmp_path: Path) -> None:
    validate_steps(steps, source="trace").to_parquet(tmp_path / "trace.dat")
    assert len(read_steps(tmp_path / "trace.dat")) == len(steps)


def test_dispatch_fills_columns_that_parquet_lacks(steps: pd.DataFrame, tmp_path: Path) -> None:
    steps.drop(columns=list(RUN)).to_parquet(tmp_path / "trace.parquet")
    assert read_steps(tmp_path / "trace.parquet", **RUN)["model"].unique().tolist() == ["llama-2-7b"]


def test_dispatch_refuses_other_content(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("step_id\n1\n", encoding="utf-8")
    with pytest.raises(InputError, match="neither parquet"):
        read_steps(tmp_path / "trace.csv")


def test_a_pretty_printed_export_is_json_but_not_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{\n "resourceSpans": []\n}\n')
    with pytest.raises(InputError, match=r"is JSON, but not JSON lines.*`jq -c \."):
        read_steps(path, **RUN)
