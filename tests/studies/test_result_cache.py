"""The cache of results: what was computed is read again, whatever it depends on names the entry, damage costs time only."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepcal.errors import InputError
from stepcal.locations import CACHE_VARIABLE, RESULTS
from stepcal.studies import registry
from stepcal.studies.results import result_cache
from stepcal.studies.results.provenance import MEASURED, SIMULATED, Provenance
from stepcal.studies.results.result_cache import cached_study, result_key
from stepcal.studies.study import Study

TABLE = pd.DataFrame(
    {
        "name": ["a", None, "c"],
        "value": [0.1, np.nan, 1 / 3],
        "count": [1, 2, 1 << 53],
        "met": [True, None, False],
        "missing": [np.nan] * 3,
        "endless": [np.inf, -np.inf, 0.0],
    }
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / RESULTS


class Counted:
    """Computes a study and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Study:
        self.calls += 1
        return Study("x", {"t": TABLE}, Provenance(MEASURED, "0" * 64, 3, 1), {"report": "text"})


def same(first: Study, second: Study) -> None:
    assert (first.name, first.texts, first.provenance) == (second.name, second.texts, second.provenance)
    assert list(first.tables) == list(second.tables)
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_exact=True)


def test_the_second_time_it_is_read_and_equal_to_the_last_bit(cache):
    compute = Counted()
    first, second = (cached_study("x", "key", compute) for _ in range(2))
    assert compute.calls == 1
    same(first, second)
    pd.testing.assert_frame_equal(second["t"], TABLE, check_dtype=False, check_exact=True)
    (entry,) = cache.iterdir()
    assert entry.read_text(encoding="utf-8").startswith('{"provenance"')


def test_another_key_is_another_entry(cache):
    compute = Counted()
    cached_study("x", "key", compute)
    cached_study("x", "another", compute)
    assert compute.calls == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda _: "", lambda _: "{}", lambda _: "[1]"])
def test_a_damaged_entry_is_computed_anew(cache, damage):
    compute = Counted()
    first = cached_study("x", "key", compute)
    (entry,) = cache.iterdir()
    entry.write_text(damage(entry.read_text()))
    same(first, cached_study("x", "key", compute))
    assert compute.calls == 2


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    compute = Counted()
    same(cached_study("x", "key", compute), cached_study("x", "key", compute))
    assert compute.calls == 2


def test_a_failure_leaves_nothing(cache):
    def fail() -> Study:
        raise InputError("no")

    with pytest.raises(InputError):
        cached_study("x", "key", fail)
    assert not cache.exists() or list(cache.iterdir()) == []


class TestKey:
    def test_depends_on_all_that_goes_in(self, tmp_path):
        first, second = tmp_path / "a", tmp_path / "b"
        first.write_text("1")
        second.write_text("2")
        keys = [
            result_key("h1", MEASURED, [first]),
            result_key("h2", MEASURED, [first]),
            result_key("h1", SIMULATED, [first]),
            result_key("h1", MEASURED, [second]),
            result_key("h1", MEASURED, [first, second]),
            result_key("h1", MEASURED, [first], ["run"]),
            result_key("h1", MEASURED, [first], [], {"seed": 1}),
            result_key("h1", MEASURED, [first], [], {"seed": 2}),
        ]
        assert len(set(keys)) == len(keys)
        second.write_text("1")
        assert result_key("h1", MEASURED, [second]) == keys[0], "content counts, not the name"
        assert result_key("h1", MEASURED, [first], ["b", "a"]) == result_key("h1", MEASURED, [first], ["a", "b"])

    def test_depends_on_code_shipped_tables_and_libraries(self, monkeypatch, tmp_path):
        def digest() -> str:
            return result_cache._code_sha256.__wrapped__()

        before = digest()
        assert digest() == before
        monkeypatch.setattr(result_cache, "data_folder", lambda: tmp_path)
        without = digest()
        (tmp_path / "facts.csv").write_text("a\n1\n")
        assert len({before, without, digest()}) == 3
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
        assert digest() not in {before, without}


def _load(folder: str) -> float:
    study = registry.load_study(registry.RESCORED, data=folder)
    return float(study["rescored"]["mape_percent"].sum())


def test_two_processes_at_once_agree_and_leave_one_entry(cache, traces_folder):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(_load, [str(traces_folder)] * 2)
    assert sums[0] == sums[1]
    assert [p.name.partition("-")[0] for p in cache.iterdir()] == [registry.RESCORED]


def test_load_study_computes_once_and_anew_where_told_to(cache, traces_folder, monkeypatch):
    kind = registry.STUDIES[registry.RESCORED]
    calls = []

    def run(*tables: pd.DataFrame) -> object:
        calls.append(1)
        return kind.run(*tables)

    monkeypatch.setitem(registry.STUDIES, registry.RESCORED, registry.StudyKind(run, kind.loaders, simulates=False))
    first = registry.load_study(registry.RESCORED, data=traces_folder)
    same(first, registry.load_study(registry.RESCORED, data=traces_folder))
    assert len(calls) == 1
    again = registry.load_study(registry.RESCORED, data=traces_folder, recompute=True)
    assert len(calls) == 2
    pd.testing.assert_frame_equal(first["rescored"], again["rescored"], check_dtype=False, check_exact=True)
    chosen = [str(first["rescored"]["experiment_id"].iloc[0])]
    part = registry.load_study(registry.RESCORED, data=traces_folder, only_experiments=chosen)
    assert len(calls) == 3
    assert set(part["rescored"]["experiment_id"]) == set(chosen)
