"""Traces of others: each format by its columns, plain and compressed, and what cannot be replayed with its message."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from stepcal.datasets.request_traces import cut_and_scale, read_request_trace
from stepcal.errors import InputError
from stepcal.simulator import replay_trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.2224670,879,55\n"
)
AZURE_2025 = (
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,0,374,44\n2024-05-10 00:00:04.324509+00:00,2,396,109\n"
    "2024-05-10 00:00:04.551807+00:00,0,879,55\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,374,44,418,Conversation log\n9.3145790,GPT-4,396,109,505,API log\n"
    "9.4,ChatGPT,100,0,100,API log\n9.541877,ChatGPT,879,55,934,Conversation log\n"
)
TABLE = "arrival_s,prompt_tokens,output_tokens\n0.5,374,44\n4.814579,396,109\n5.041877,879,55\n"
UNSORTED = "arrival_time_us,input_tokens,output_tokens\n4314579,396,109\n0,374,44\n4541877,879,55\n"
MOONCAKE = [
    {"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [7]},
    {"timestamp": 4314.579, "input_length": 396, "output_length": 109, "hash_ids": [8]},
    {"timestamp": 4541.877, "input_length": 879, "output_length": 55, "hash_ids": [9, 10]},
]
LLMSERVINGSIM = [
    {"input_toks": 374, "output_toks": 44, "arrival_time": 1700000000.0, "queued_ts": 1.0, "last_token_ts": 2.0},
    {"input_toks": 396, "output_toks": 109, "arrival_time": 1700000004.314579, "queued_ts": 5.0, "last_token_ts": 6.0},
    {"input_toks": 879, "output_toks": 55, "arrival_time": 1700000004.541877, "queued_ts": 5.5, "last_token_ts": 7.0},
]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def frame(text: str) -> pd.DataFrame:
    from io import StringIO

    return pd.read_csv(StringIO(text))


def written(path: Path, text: str) -> Path:
    content = text.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    if ".parquet" in path.suffixes:
        frame(text).to_parquet(path)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "text", "known_as"),
    [
        ("azure.csv", AZURE, "azure"),
        ("azure-2024.csv", AZURE_2025, "azure"),
        ("azure.csv.gz", AZURE, "azure"),
        ("burstgpt.csv", BURSTGPT, "burstgpt"),
        ("burstgpt.csv.zst", BURSTGPT, "burstgpt"),
        ("mine.csv", TABLE, "table"),
        ("mine.parquet", UNSORTED, "table"),
        ("azure.parquet", AZURE, "azure"),
        ("mine.tsv", TABLE.replace(",", "\t"), "table"),
        ("mooncake.jsonl", lines(MOONCAKE), "mooncake"),
        ("mooncake.jsonl.zst", lines(MOONCAKE), "mooncake"),
        ("requests.jsonl", lines(LLMSERVINGSIM), "llmservingsim"),
        ("requests.jsonl.gz", lines(LLMSERVINGSIM), "llmservingsim"),
        ("requests.json", json.dumps(LLMSERVINGSIM), "llmservingsim"),
        ("with-bom.csv", "\ufeff" + TABLE, "table"),
    ],
)
def test_a_trace_is_known_by_its_columns(name: str, text: str, known_as: str, tmp_path: Path) -> None:
    trace = read_request_trace(written(tmp_path / name, text))
    assert trace.format == known_as
    assert trace.left_out == (1 if "burstgpt" in name else 0)
    assert trace.table["arrival_time_us"].tolist() == pytest.approx([0, 4_314_579, 4_541_877], abs=0.6)
    assert trace.table["prompt_tokens"].tolist() == [374, 396, 879]
    assert trace.table["output_tokens"].tolist() == [44, 109, 55]
    requests = replay_trace(trace.table)
    assert requests.prompt_tokens.tolist() == [374, 396, 879]
    assert requests.arrival_s.tolist() == pytest.approx([0, 4.314579, 4.541877], abs=1e-6)


def test_a_format_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", lines([{k: v for k, v in row.items() if k != "hash_ids"} for row in MOONCAKE]))
    assert read_request_trace(path).table["arrival_time_us"].max() == pytest.approx(
        4_541_877_000
    )  # seconds, as a table
    assert read_request_trace(path, format_name="mooncake").table["arrival_time_us"].max() == pytest.approx(4_541_877)
    with pytest.raises(InputError, match="lacks `TIMESTAMP`, which the format `azure` has"):
        read_request_trace(path, format_name="azure")
    with pytest.raises(InputError, match="must be one of mooncake, azure"):
        read_request_trace(path, format_name="excel")


def test_equal_blocks_are_a_shared_prefix(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 1, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 9]},
    ]
    requests = replay_trace(read_request_trace(written(tmp_path / "m.jsonl", lines(rows))).table)
    assert requests.segment_content.tolist() == [0, 1, 2, 0, 1, 3]
    assert requests.segment_tokens.tolist() == [512, 512, 76, 512, 512, 276]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "columns `x`, `y`: no format that can be replayed"),
        ("a.csv", "arrival_s,prompt_tokens,output_tokens\n", "nothing to replay"),
        ("a.csv", TABLE.replace("4.814579", "noon"), "row 2: `arrival_s` is 'noon'; it must be a time"),
        ("a.csv", TABLE.replace("396", "-3"), "row 2: `prompt_tokens` is -3; it must be a whole number"),
        ("a.csv", TABLE.replace("396", "3.5"), "row 2: `prompt_tokens` is 3.5"),
        ("a.csv", TABLE.replace("396", "1e30"), "row 2: `prompt_tokens` is"),
        ("a.csv", TABLE.replace("396", "many"), "row 2: `prompt_tokens` is 'many'"),
        ("a.csv", AZURE.replace("2023-11-16 18:15:50.9951690", "yesterday"), "row 2: `TIMESTAMP` is 'yesterday'"),
        ("a.csv", TABLE + "1,2,3,4,5\n", "not a readable CSV|more cells"),
        ("a.jsonl", lines(MOONCAKE)[:-20], "line 3: not JSON"),
        ("a.jsonl", "[1, 2]", "a JSON list, but not of objects"),
        ("a.jsonl", lines([{**MOONCAKE[0], "hash_ids": [1, 2]}]), "must be a list of 1 whole numbers"),
        ("a.jsonl", lines([{**MOONCAKE[0], "hash_ids": "x"}]), "must be a list of 1 whole numbers"),
        ("a.jsonl", '{"a": ' * 100_000, "not JSON"),
        ("a.csv.gz", "no gzip", None),
        ("a.parquet", "PAR1", None),
        ("a.txt", "hello", "neither parquet, CSV with a header, nor JSON lines"),
        ("a.csv", "", "neither parquet, CSV with a header, nor JSON lines"),
    ],
)
def test_what_cannot_be_replayed_is_named(name: str, text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message or "cannot be read") as caught:
        read_request_trace(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_part_of_a_trace_can_arrive_faster() -> None:
    table = pd.DataFrame(
        {"index": range(5), "arrival_time_us": [0, 1e6, 2e6, 3e6, 4e6], "prompt_tokens": 1, "output_tokens": 1}
    )
    part = cut_and_scale(table, from_s=1.0, until_s=4.0, first=2, rate_scale=4.0)
    assert part["index"].tolist() == [1, 2]
    assert part["arrival_time_us"].tolist() == [0, 250_000]
    for options, message in (
        ({"rate_scale": 0.0}, "`--rate-scale` is 0.0"),
        ({"first": 0}, "`--first` is 0"),
        ({"from_s": 3.0, "until_s": 2.0}, "leave nothing"),
        ({"from_s": 9.0}, "No request arrives from 9 s"),
    ):
        with pytest.raises(InputError, match=message):
            cut_and_scale(table, **options)
