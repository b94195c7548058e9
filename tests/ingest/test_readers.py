"""Readers against files that the tools wrote themselves, in runs against `tools/mock_openai_server.py`, and invented ones.

The mock server was told: first token after 40 ms, 10 ms a token, two tokens an event (one for GuideLLM); each 13th request
fails.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from stepcal.errors import InputError
from stepcal.ingest import FORMATS, definitions_table, format_of, ingest, read_mapping

FILES = Path(__file__).parent / "files"
REAL = {
    "vllm_bench_0.33.0_detailed.json": ("vllm-bench", 16, 1, 6),
    "vllm_bench_0.33.0_append.json": ("vllm-bench", 32, 2, 6),
    "guidellm_0.8.1_benchmarks.json": ("guidellm", 13, 1, 12),
    "aiperf_0.13.0_profile_export.jsonl": ("aiperf", 24, 1, 6),
}
TOKENS = 12


def table_of(out: Path, run: str) -> pd.DataFrame:
    return pd.read_parquet(out / run / "requests.parquet")


@pytest.mark.parametrize("name", REAL)
def test_files_of_the_tools_themselves_give_requests_in_our_definitions(name: str, tmp_path: Path) -> None:
    tool, n_requests, n_failed, n_events = REAL[name]
    manifest = ingest([FILES / name], tmp_path / "out")
    assert {r["tool"] for r in manifest["runs"]} == {tool}
    assert manifest["requests"] == n_requests
    assert manifest["failed"] == n_failed
    assert manifest["rejected"] == 0
    table = pd.concat([table_of(tmp_path / "out", r["run"]) for r in manifest["runs"]])
    done = table[~table["has_error"]]
    assert (done["output_tokens"] == TOKENS).all()
    assert (done["stream_events"] == n_events).all()
    # The server paces tokens by 10 ms, whatever the tool counts as a gap: what is not a token must not show.
    tpot_ms = 1e3 * (done["e2e_s"] - done["ttft_s"]) / (TOKENS - 1)
    assert tpot_ms.median() == pytest.approx(10.0, rel=0.45)  # a busy machine wakes late, never early
    assert tpot_ms.min() > 8.0
    assert done["ttft_s"].between(0.039, 0.2).all()
    assert table["arrival_time_us"].iloc[0] == 0
    assert table["arrival_time_us"].notna().all()


def test_time_per_output_token_is_the_one_that_vllm_reports(tmp_path: Path) -> None:
    own = json.loads((FILES / "vllm_bench_0.33.0_detailed.json").read_text())
    ingest([FILES / "vllm_bench_0.33.0_detailed.json"], tmp_path / "out")
    table = table_of(tmp_path / "out", "vllm_bench_0.33.0_detailed").query("not has_error")
    tpot_ms = 1e3 * (table["e2e_s"] - table["ttft_s"]) / (table["output_tokens"] - 1)
    assert tpot_ms.mean() == pytest.approx(own["mean_tpot_ms"], rel=1e-6)
    assert 1e3 * table["ttft_s"].mean() == pytest.approx(own["mean_ttft_ms"], rel=1e-6)


def test_time_per_output_token_is_the_inter_token_latency_of_aiperf_and_guidellm(tmp_path: Path) -> None:
    ingest([FILES / name for name in REAL], tmp_path / "out")
    lines = (FILES / "aiperf_0.13.0_profile_export.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["metrics"] for line in lines]
    theirs = sum(m["inter_token_latency"]["value"] for m in metrics if m) / sum(1 for m in metrics if m)
    table = table_of(tmp_path / "out", "aiperf_0.13.0_profile_export").query("not has_error")
    assert (1e3 * (table["e2e_s"] - table["ttft_s"]) / (TOKENS - 1)).mean() == pytest.approx(theirs, rel=1e-6)
    rows = json.loads((FILES / "guidellm_0.8.1_benchmarks.json").read_text())["benchmarks"][0]["requests"]["successful"]
    table = table_of(tmp_path / "out", "guidellm_0.8.1_benchmarks").query("not has_error")
    ours = (1e3 * (table["e2e_s"] - table["ttft_s"]) / (TOKENS - 1)).mean()
    assert ours == pytest.approx(sum(r["inter_token_latency_ms"] for r in rows) / len(rows), rel=1e-5)
    with_first = sum(r["time_per_output_token_ms"] for r in rows) / len(rows)
    assert with_first > 1.15 * ours  # GuideLLM's own counts the first token


INVENTED = {
    "otlp": '{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": "1000000000", "attributes": ['
    '{"key": "gen_ai.usage.prompt_tokens", "value": {"intValue": "100"}},'
    '{"key": "gen_ai.usage.completion_tokens", "value": {"intValue": 11}},'
    '{"key": "gen_ai.latency.time_in_queue", "value": {"doubleValue": 0.01}},'
    '{"key": "gen_ai.latency.time_to_first_token", "value": {"doubleValue": 0.5}},'
    '{"key": "gen_ai.latency.e2e", "value": {"doubleValue": 1.5}}]}]}]}]}\n',
    "llmperf": '[{"error_code": null, "number_input_tokens": 100, "number_output_tokens": 11, "ttft_s": 0.5, '
    '"end_to_end_latency_s": 1.5, "inter_token_latency_s": 0.136}]',
    "llmservingsim": '{"input_toks": 100, "output_toks": 11, "arrival_time": 1.7e9, "queued_ts": 7.0, "scheduled_ts": 7.01, '
    '"first_token_ts": 7.5, "last_token_ts": 8.5}\n',
    "sglang": '{"server_info": {}, "input_lens": [100], "output_lens": [11], "ttfts": [0.5], "itls": [[0.4, 0.6]], '
    '"errors": [""]}\n',
    "blis-trace": "version: 2\n---\nrequest_id,session_id,input_tokens,output_tokens,arrival_time_us,send_time_us,"
    "first_chunk_time_us,last_chunk_time_us,status\n1,,100,11,0,100,500100,1500100,ok\n",
    "inference-perf": '[{"start_time": 1.0, "end_time": 2.6, "request": "", "response": "", "info": {"input_tokens": 100, '
    '"response_info": {"output_tokens": 11, "output_token_times": [1.5, 2.0, 2.5]}}, "error": null}]',
}


@pytest.mark.parametrize("tool", INVENTED)
def test_invented_files_give_the_same_request_whatever_the_tool(tool: str, tmp_path: Path) -> None:
    path = tmp_path / ("rows.csv" if tool == "blis-trace" else "rows.json")
    path.write_text(INVENTED[tool])
    assert format_of(path).name == tool
    ingest([path], tmp_path / "out")
    row = table_of(tmp_path / "out", "rows").iloc[0]
    assert (row["prompt_tokens"], row["output_tokens"]) == (100, 11)
    assert row["e2e_s"] == pytest.approx(1.5)
    assert row["ttft_s"] == pytest.approx(0.5)
    assert row["has_error"] == False  # noqa: E712
    assert FORMATS[tool].verified.startswith("unverified format")


def test_a_table_of_ones_own_comes_in_by_its_mapping(tmp_path: Path) -> None:
    mapping = tmp_path / "map.yaml"
    mapping.write_text(
        "columns:\n  sent: {column: ts, unit: datetime}\n  prompt_tokens: n_in\n  output_tokens: n_out\n"
        "  e2e: {column: total, unit: ms}\n  ttft: {column: first, unit: us}\n  error: {column: code, ok: ['200']}\n"
    )
    text = "ts,n_in,n_out,total,first,code\n2026-01-01 00:00:00,100,11,1500,500000,200\n2026-01-01 00:00:02,5,0,,,503\n"
    (tmp_path / "own.csv").write_text(text)
    pd.read_csv(tmp_path / "own.csv").to_parquet(tmp_path / "same.parquet")
    ingest([tmp_path / "own.csv", tmp_path / "same.parquet"], tmp_path / "out", mapping=read_mapping(mapping))
    first, second = table_of(tmp_path / "out", "own"), table_of(tmp_path / "out", "same")
    assert first["e2e_s"].iloc[0] == 1.5
    assert first["ttft_s"].iloc[0] == 0.5
    assert first["arrival_time_us"].tolist() == [0, 2_000_000]
    assert first["has_error"].tolist() == [False, True]
    same = ["e2e_s", "ttft_s", "arrival_time_us", "has_error", "prompt_tokens"]
    pd.testing.assert_frame_equal(first[same], second[same])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("columns: {prompt_tokens: a}", "lacks `output_tokens`"),
        ("columns: {prompt_tokens: a, output_tokens: b, e2e: c}", "needs one of s, ms, us, ns"),
        ("columns: {prompt_token: a, output_tokens: b}", "prompt_token"),
        ("- 1", "has no mapping `columns`"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mapping_that_cannot_be_used_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(InputError, match=problem):
        read_mapping(tmp_path / "map.yaml")


def test_every_tool_says_what_its_words_mean() -> None:
    words = {(row["tool"], row["word"]) for row in definitions_table()}
    expected = ("sent", "e2e", "ttft", "itl", "tpot", "concurrency")
    assert words == {(tool, word) for tool in FORMATS for word in expected}
