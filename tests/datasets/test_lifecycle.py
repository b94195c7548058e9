"""inference-perf's files: real summaries where they are at hand, an invented per-request file, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stepcal.datasets import measured, read_lifecycle_per_request, read_lifecycle_summary
from stepcal.errors import InputError

SPREAD = {"mean": 0.2, "median": 0.1, "p90": 0.3, "p99": 0.4}


@pytest.fixture
def summary() -> dict[str, Any]:
    """A summary of three requests, of which one failed."""
    latencies = ["request_latency", "time_to_first_token", "inter_token_latency", "time_per_output_token"]
    rates = ["requests_per_sec", "input_tokens_per_sec", "output_tokens_per_sec", "total_tokens_per_sec"]
    return {
        "load_summary": {"count": 3},
        "successes": {
            "count": 2,
            "latency": {name: dict(SPREAD) for name in latencies},
            "throughput": dict.fromkeys(rates, 1.5),
            "prompt_len": SPREAD,
            "output_len": SPREAD,
        },
        "failures": {"count": 1},
    }


def _written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _value(table: pd.DataFrame, metric: str, statistic: str) -> float:
    return float(table.query("metric == @metric and statistic == @statistic")["value"].item())


def test_a_summary_becomes_tidy_rows_in_milliseconds(summary: dict[str, Any], tmp_path: Path) -> None:
    table = read_lifecycle_summary(_written(tmp_path / "stage_2_lifecycle_metrics.json", summary))
    assert table["stage"].unique().tolist() == [2]
    assert [_value(table, "requests", name) for name in ("requested", "completed", "failed")] == [3, 2, 1]
    assert _value(table, "e2e", "p50") == pytest.approx(100.0)
    assert _value(table, "prompt_len", "p99") == 0.4
    assert table.set_index(["metric", "statistic"]).loc[("throughput", "requests"), "unit"] == "request/s"


def test_a_run_in_which_nothing_completed_has_counts_only(summary: dict[str, Any], tmp_path: Path) -> None:
    summary["successes"] = {"count": 0, "latency": None, "throughput": None}
    table = read_lifecycle_summary(_written(tmp_path / "summary_lifecycle_metrics.json", summary))
    assert table["metric"].unique().tolist() == ["requests"]
    assert table["stage"].unique().tolist() == [-1]


def test_a_missing_figure_is_named_in_full(summary: dict[str, Any], tmp_path: Path) -> None:
    del summary["successes"]["latency"]["time_to_first_token"]["mean"]
    path = _written(tmp_path / "stage_0_lifecycle_metrics.json", summary)
    with pytest.raises(InputError, match=r"lacks `successes\.latency\.time_to_first_token\.mean`"):
        read_lifecycle_summary(path)


def test_a_figure_that_is_no_number_is_refused(summary: dict[str, Any], tmp_path: Path) -> None:
    summary["failures"]["count"] = "four"
    path = _written(tmp_path / "stage_0_lifecycle_metrics.json", summary)
    with pytest.raises(InputError, match=r"`failures\.count` is 'four', but must be a finite number"):
        read_lifecycle_summary(path)


def test_a_name_without_stage_needs_the_argument(summary: dict[str, Any], tmp_path: Path) -> None:
    path = _written(tmp_path / "metrics.json", summary)
    with pytest.raises(InputError, match="the name tells no stage"):
        read_lifecycle_summary(path)
    assert read_lifecycle_summary(path, stage=1)["stage"].unique().tolist() == [1]


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "stage_0_lifecycle_metrics.json"
    path.write_text('{\n  "load_summary": {\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"stage_0_lifecycle_metrics\.json, line 3: not JSON"):
        read_lifecycle_summary(path)


def test_real_summaries_agree_with_the_shipped_table(public_layout: Path) -> None:
    for folder in sorted((public_layout / "experiments").iterdir()):
        shipped = measured().query("experiment_id == @folder.name and stage == -1")
        read = read_lifecycle_summary(folder / "results" / "summary_lifecycle_metrics.json")
        assert read["value"].tolist() == shipped["value"].tolist()


def _record(start: float, /, **changes: Any) -> dict[str, Any]:
    info = {"input_tokens": 90, "output_tokens": 3, "output_token_times": [start + 0.25, start + 0.5]}
    record = {"start_time": start, "end_time": start + 1.0, "request": "", "response": "", "info": info}
    return record | {"error": None} | changes


def test_per_request_records_become_request_rows_by_arrival(tmp_path: Path) -> None:
    failed = _record(100.5, info={"input_tokens": 0}, error={"error_type": "TimeoutError", "error_msg": ""})
    path = _written(tmp_path / "per_request_lifecycle_metrics.json", [_record(101.0), failed, _record(100.0)])
    rows = read_lifecycle_per_request(path, experiment_id="run-a")
    assert rows["arrival_time_us"].tolist() == [0, 500_000, 1_000_000]
    assert rows["has_error"].tolist() == [False, True, False]
    assert rows["prompt_tokens"].tolist() == [90, 0, 90]
    assert rows["ttft_s"].dropna().tolist() == [0.25, 0.25]
    assert rows["e2e_s"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "expected a non-empty JSON list"),
        ({"requests": []}, "found an object with `requests`"),
        ([_record(0.0), {"latency": 3}], "entry 2: not a request record of inference-perf"),
        ([_record(0.0, start_time="noon")], "entry 1: not a request record"),
        ([_record(0.0, info=None)], "entry 1: not a request record"),
        ([_record(0.0, end_time=-1.0)], "row 1: column `e2e_s` is -1.0"),
        ([_record(0.0), _record(1.0, info={"input_tokens": 1, "output_tokens": 1})], "column `ttft_s` is NaN"),
    ],
)
def test_other_per_request_layouts_are_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "per_request_lifecycle_metrics.json", content)
    with pytest.raises(InputError) as refusal:
        read_lifecycle_per_request(path, experiment_id="run-a")
    assert said in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0, True, "1"])
def test_a_mean_that_is_no_time_is_named(value: object, summary: dict[str, Any], tmp_path: Path) -> None:
    summary["successes"]["latency"]["request_latency"]["mean"] = value
    path = _written(tmp_path / "stage_0_lifecycle_metrics.json", summary)
    with pytest.raises(
        InputError, match=r"`successes\.latency\.request_latency\.mean` is .*finite number of at least 0"
    ):
        read_lifecycle_summary(path)


def test_a_quantile_that_a_run_did_not_ask_for_has_no_row(summary: dict[str, Any], tmp_path: Path) -> None:
    del summary["successes"]["latency"]["time_to_first_token"]["p90"]
    table = read_lifecycle_summary(_written(tmp_path / "stage_0_lifecycle_metrics.json", summary))
    assert set(table[table["metric"] == "ttft"]["statistic"]) == {"mean", "p50", "p99"}


def test_lengths_go_by_their_names_of_both_years(summary: dict[str, Any], tmp_path: Path) -> None:
    old = read_lifecycle_summary(_written(tmp_path / "stage_0_lifecycle_metrics.json", summary))
    for length in ("prompt", "output"):
        summary["successes"][f"{length}_tokens"] = summary["successes"].pop(f"{length}_len")
    new = read_lifecycle_summary(_written(tmp_path / "stage_0_lifecycle_metrics.json", summary))
    pd.testing.assert_frame_equal(old, new)


def test_without_streaming_there_are_no_latencies_of_tokens(summary: dict[str, Any], tmp_path: Path) -> None:
    for name in ("time_to_first_token", "inter_token_latency", "time_per_output_token"):
        summary["successes"]["latency"][name] = None
    table = read_lifecycle_summary(_written(tmp_path / "summary_lifecycle_metrics.json", summary))
    assert set(table["metric"]) == {"requests", "e2e", "prompt_len", "output_len", "throughput"}


REQUEST = {"start_time": 10.0, "end_time": 10.5, "request": "", "response": "", "error": None}


@pytest.mark.parametrize(
    ("info", "ttft_s"),
    [
        pytest.param({"input_tokens": 32, "output_tokens": 2, "output_token_times": [10.1, 10.5]}, 0.1, id="0.2 to 0.4"),
        pytest.param(
            {"input_tokens": 32, "response_info": {"output_tokens": 2, "output_token_times": [10.1, 10.5]}}, 0.1, id="0.5"
        ),
        pytest.param(
            {"request_metrics": {"input_tokens": 32},
             "response_metrics": {"output_tokens": 2, "output_token_times": [10.1]}}, 0.1, id="0.6",
        ),
        pytest.param({"input_tokens": 32, "output_tokens": 2, "output_token_times": []}, None, id="unary"),
        pytest.param({"input_tokens": 32, "output_tokens": 2, "output_token_times": None}, None, id="unary, null"),
    ],
)  # fmt: skip
def test_requests_of_every_release_are_read(info: dict[str, Any], ttft_s: float | None, tmp_path: Path) -> None:
    path = tmp_path / "per_request_lifecycle_metrics.json"
    path.write_text(json.dumps([{**REQUEST, "info": info}]))
    row = read_lifecycle_per_request(path, experiment_id="run").iloc[0]
    assert (row["prompt_tokens"], row["output_tokens"]) == (32, 2)
    assert row["e2e_s"] == pytest.approx(0.5)
    assert row["ttft_s"] == pytest.approx(ttft_s) if ttft_s else np.isnan(row["ttft_s"])


@pytest.mark.parametrize("start", [float("nan"), float("inf"), 1e300, "x", None, 10**400])
def test_a_time_that_is_none_is_refused_with_its_entry(start: object, tmp_path: Path) -> None:
    info = {"input_tokens": 32, "output_tokens": 2}
    path = tmp_path / "per_request_lifecycle_metrics.json"
    path.write_text(json.dumps([{**REQUEST, "info": info}, {**REQUEST, "start_time": start, "info": info}]))
    with pytest.raises(InputError, match="entry 2: not a request record"):
        read_lifecycle_per_request(path, experiment_id="run")
