"""``stepcal cache`` shows what is kept and deletes what can be made again, and nothing else."""

import json

import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.locations import CACHE_VARIABLE, COMPILED, RESULTS

runner = CliRunner()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "kept"))
    entry, code = f"{RESULTS}/h2-{'0' * 32}.json", f"{COMPILED}/{'0' * 16}/loop.nbc"
    for name, size in ((entry, 3_000_000), (code, 10), ("0a1b/steps.parquet", 7), (f"{RESULTS}/mine.csv", 5)):
        path = tmp_path / "kept" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return tmp_path / "kept"


def test_it_shows_folder_and_sizes(cache):
    done = runner.invoke(app, ["cache", "--json", "-"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "folder": str(cache),
        "cleared": False,
        "bytes": {RESULTS: 3_000_000, COMPILED: 10},
    }
    assert "results of studies: 3.0 MB" in done.stderr
    assert len(list(cache.rglob("*.*"))) == 4


def test_clear_leaves_downloaded_traces_and_what_is_not_ours(cache):
    assert runner.invoke(app, ["cache", "--clear"]).exit_code == 0
    assert sorted(p.name for p in cache.rglob("*") if p.is_file()) == ["mine.csv", "steps.parquet"]


def test_without_a_cache_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "none"))
    for options in ([], ["--clear"]):
        done = runner.invoke(app, ["cache", *options, "--json", "-"])
        assert done.exit_code == 0
        assert json.loads(done.stdout)["bytes"] == {RESULTS: 0, COMPILED: 0}
