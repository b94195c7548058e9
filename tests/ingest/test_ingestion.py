"""`ingest` as a whole: what cannot be used is set aside and counted, and a run that was killed leaves nothing half done."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.ingest import ingest

FILES = Path(__file__).parent / "files"
KILL_POINTS = 10
RUNNER = CliRunner()

# A child that ingests, and dies by SIGKILL at the n-th time that it opens, renames or removes a file under its output.
CHILD = """
import os, signal, sys
from pathlib import Path
from stepcal.ingest import ingest
sources, out, point = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
seen = 0
def hook(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(out) in str(arguments[0]):
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
ingest([sources], out)
print(seen)
"""


def record(sent: float, e2e: float = 1.5, ttft: float = 0.5, tokens: int = 11) -> str:
    return json.dumps(
        {
            "input_toks": 100,
            "output_toks": tokens,
            "queued_ts": sent,
            "scheduled_ts": sent,
            "first_token_ts": sent + ttft,
            "last_token_ts": sent + e2e,
        }
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but the lock, whose process differs."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_child(sources: Path, out: Path, point: int) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", CHILD, str(sources), str(out), str(point)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)


def test_killed_at_ten_points_it_leaves_nothing_half_written_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = run_child(FILES, tmp_path / "whole", 0)
    n_events = int(whole.stdout)
    expected = contents(tmp_path / "whole")
    assert n_events > KILL_POINTS
    for i, point in enumerate(np.linspace(1, n_events, KILL_POINTS).astype(int)):
        out = tmp_path / f"killed{i}"
        assert run_child(FILES, out, int(point)).returncode == -signal.SIGKILL
        seen = contents(out) if out.exists() else {}
        for name, digest in seen.items():
            if not Path(name).name.startswith(".") and ".tmp-" not in name:
                assert digest == expected[name], f"{name} is half written after a kill at event {point}"
        assert run_child(FILES, out, 0).returncode == 0
        assert contents(out) == expected


def test_a_second_call_reads_nothing_again(tmp_path: Path) -> None:
    ingest([FILES], tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("requests.parquet")}
    assert ingest([FILES], tmp_path / "out")["requests"] == 85
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("requests.parquet")}
    damaged = next(iter(before))
    damaged.write_bytes(b"")
    ingest([FILES], tmp_path / "out")
    assert len(pd.read_parquet(damaged)) > 0


def test_of_two_processes_on_one_folder_the_second_says_who_has_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest([FILES], out)
    with (out / ".lock").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        result = RUNNER.invoke(app, ["ingest", str(FILES), "--out", str(out)])
    assert result.exit_code == 2
    assert f"process {os.getpid()}" in result.output
    assert RUNNER.invoke(app, ["ingest", str(FILES), "--out", str(out)]).exit_code == 0


def test_files_in_parallel_give_the_same_bytes(tmp_path: Path) -> None:
    ingest([FILES], tmp_path / "one", jobs=1)
    ingest([FILES], tmp_path / "two", jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bad_lines_are_set_aside_with_their_line_and_reason(tmp_path: Path) -> None:
    bad = {
        2: ("{not json", "not what the format has here"),
        4: (record(3.0, e2e=-1.0), "end-to-end latency is -1.0"),
        5: (record(4.0, ttft=2.0), "time to the first token is 2.0"),
        6: (record(5.0, tokens=0), "`output_tokens` is 0"),
        7: (record(6.0).replace("100", "1.5"), "`input_toks` is 1.5"),
        9: (record(8.0).replace("100", '"100"'), "`input_toks` is '100'"),
    }
    lines = [bad[n][0] if n in bad else record(float(n)) for n in range(1, 11)]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines) + "\n")
    manifest = ingest([path], tmp_path / "out")
    assert (manifest["requests"], manifest["rejected"]) == (10 - len(bad), len(bad))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "log" / "rejected.jsonl").read_text().splitlines()]
    assert {r["line"] for r in rejected} == set(bad)
    for row in rejected:
        assert row["file"] == "log.jsonl"
        assert bad[row["line"]][1] in row["reason"]


def test_strict_stops_at_the_first_bad_line_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([record(1.0), record(2.0, e2e=-1.0), record(3.0)]))
    result = RUNNER.invoke(app, ["ingest", str(path), "--out", str(tmp_path / "out"), "--strict"])
    assert result.exit_code == 2
    assert "line 2" in result.output
    assert not list((tmp_path / "out").rglob("requests.parquet"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("cut.json", (FILES / "vllm_bench_0.33.0_detailed.json").read_bytes()[:3000], "cut short or damaged"),
        ("summary.json", b'{"date": "x", "tokenizer_id": "t", "mean_ttft_ms": 1}', "--save-detailed"),
        ("empty.jsonl", b"", "is empty"),
        ("other.json", b'{"hello": 1}', "looks like no known tool"),
        ("bad.jsonl", record(1.0, e2e=-1.0).encode(), "none of its 1 rows can be used"),
        ("own.csv", b"a,b\n1,2\n", "--mapping"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_way_out(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = RUNNER.invoke(app, ["ingest", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert problem in result.output
    assert name in result.output
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "log.jsonl").write_text(record(1.0))
    with pytest.raises(InputError, match="would both be the run `log`"):
        ingest([tmp_path], tmp_path / "out")


@given(sent=st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_rows_come_out_by_arrival_and_none_is_lost(sent: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sorted")
    (folder / "log.jsonl").write_text("\n".join(record(s / 1e3) for s in sent))
    ingest([folder / "log.jsonl"], folder / "out")
    table = pd.read_parquet(folder / "out" / "log" / "requests.parquet")
    expected = np.sort(np.array(sent)) - min(sent)
    np.testing.assert_array_equal(table["arrival_time_us"], expected * 1_000)
    assert sorted(table["source_row"]) == list(range(1, len(sent) + 1))
    assert table["index"].tolist() == list(range(len(sent)))
