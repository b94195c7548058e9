"""What a process pays before it does anything: which libraries it loads, and that compiled code is loaded, not made anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepcal.locations import CACHE_VARIABLE, COMPILED, cache_folder
from stepcal.simulator import compilation
from stepcal.simulator.compilation import cached

TABLES = {"pandas", "pandera", "pyarrow", "pooch"}
"""Needed by who reads tables."""
FITS = {"scipy.optimize", "scipy.linalg", "xgboost", "fastjsonschema"}
"""Needed by who fits or judges."""
ARRAYS = {"numpy", "numba", "yaml"}

WORKLOAD = """
api: {type: completion}
data: {type: shared_prefix, shared_prefix: {num_groups: 2, num_prompts_per_group: 2, system_prompt_len: 20,
       question_len: 10, output_len: 5}}
load: {type: constant, stages: [{rate: 5, duration: 4}]}
"""


def loaded_by(program: str, *arguments: str) -> set[str]:
    """The modules that a new process has loaded when the program has run."""
    code = (
        f"import json, sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write('\\n' + json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_import_loads_no_library():
    assert loaded_by("import stepcal") & (TABLES | FITS | ARRAYS | {"typer"}) == set()


def test_help_loads_no_library():
    run = "from stepcal.cli.main import app; app()"
    assert loaded_by(run, "--help") & (TABLES | FITS | ARRAYS) == set()


def test_simulate_loads_arrays_and_nothing_for_tables_or_fits(tmp_path):
    workload = tmp_path / "profile.yaml"
    workload.write_text(WORKLOAD, encoding="utf-8")
    command = ("simulate", "--architecture", "llama-2-7b", "--kv-blocks", "1000", "--coefficients", "default")
    options = ("--workload", str(workload), "--json", str(tmp_path / "out.json"))
    run = "from stepcal.cli.main import app; app()"
    loaded_by(run, *command, *options)  # the first process may have to compile, which loads all of numba
    loaded = loaded_by(run, *command, *options)
    assert json.loads((tmp_path / "out.json").read_text())["overall"]["completed"] == 20
    assert loaded & (TABLES | FITS) == set()
    assert loaded >= ARRAYS


def double(values: np.ndarray) -> int:
    """A small entry point."""
    for i in range(values.size):
        values[i] *= 2
    return values.size


class TestCompiledCode:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        return tmp_path / "cache"

    @staticmethod
    def run() -> list[int]:
        values = np.arange(3)
        assert cached(double)(values) == 3
        return values.tolist()

    def test_lies_in_the_cache_and_is_loaded_from_there(self, cache, caplog):
        caplog.set_level("INFO", "stepcal")
        assert self.run() == [0, 2, 4]
        files = sorted(p for p in (cache / COMPILED).rglob("*") if p.is_file())
        assert {p.suffix for p in files} == {".nbi", ".nbc"}
        assert "Compiling the simulator" in caplog.text
        caplog.clear()
        assert self.run() == [0, 2, 4]
        assert caplog.text == ""
        assert sorted(p for p in (cache / COMPILED).rglob("*") if p.is_file()) == files

    def test_a_damaged_file_is_made_anew(self, cache):
        self.run()
        for path in (cache / COMPILED).rglob("*.nb?"):
            path.write_bytes(path.read_bytes()[:40])
        assert self.run() == [0, 2, 4]

    def test_a_cache_that_cannot_be_written_costs_time_only(self, tmp_path, monkeypatch, caplog):
        caplog.set_level("INFO", "stepcal")
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
        assert self.run() == [0, 2, 4]
        assert "cannot be written to" in caplog.text


def test_a_change_of_any_compiled_source_is_noticed():
    sources = compilation_sources()
    assert {"kernel", "blocks", "scheduling", "clock", "layout", "compilation", "units"} <= sources
    assert "inference_perf" not in sources


def compilation_sources() -> set[str]:
    """Modules whose bytes are part of the key of the compiled loop: those that a change of makes another key."""
    from stepcal.simulator import kernel

    seen: set[str] = set()
    original = Path.read_bytes

    def read(path: Path) -> bytes:
        seen.add(path.stem)
        return original(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        compilation._sources_sha256.__wrapped__(kernel.__file__)
    return seen


def test_the_cache_is_where_the_variable_says_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().name == "stepcal"
