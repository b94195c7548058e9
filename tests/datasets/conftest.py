"""Small tables to break, and the real traces where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from stepcal.datasets import step_columns
from stepcal.locations import shipped_folder


def _public_layout() -> Path | None:
    named = os.environ.get("STEPCAL_DATA")
    folder = Path(named) if named else shipped_folder().parent / "shared" / "data"
    return folder if (folder / "experiments").is_dir() else None


@pytest.fixture(scope="session")
def public_layout() -> Path:
    """The folder of the public layout; tests that need it are skipped without it."""
    folder = _public_layout()
    if folder is None:
        pytest.skip("needs the public traces: set STEPCAL_DATA to their folder")
    return folder


@pytest.fixture
def no_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No folder of traces and an empty download cache; returns the cache."""
    monkeypatch.delenv("STEPCAL_DATA", raising=False)
    cache = tmp_path / "cache"
    monkeypatch.setattr("stepcal.datasets.catalogue.cache_folder", lambda: cache)
    return cache


@pytest.fixture
def steps() -> pd.DataFrame:
    """Four valid step rows."""
    count = 4
    table = pd.DataFrame(
        {
            "experiment_id": "run-a",
            "model": "llama-2-7b",
            "workload": "general",
            "tensor_parallel": 1,
            "step_id": range(10, 10 + count),
            "ts_start_ns": [step * 1_000_000 for step in range(count)],
            "ts_end_ns": [step * 1_000_000 + 250_000 for step in range(count)],
            "duration_us": 250.0,
            "kv_blocks_total": 100,
        }
    )
    counts = step_columns().query("required")["column"]
    return table.assign(**{name: 3 for name in counts if name not in table})


@pytest.fixture
def requests() -> pd.DataFrame:
    """Three valid request rows, of which the last failed."""
    return pd.DataFrame(
        {
            "experiment_id": "run-a",
            "index": [0, 1, 2],
            "arrival_time_us": [0, 10_000, 25_000],
            "prompt_tokens": [100, 120, 0],
            "output_tokens": [50, 60, 0],
            "has_error": [False, False, True],
            "e2e_s": [1.5, 2.0, 300.2],
            "ttft_s": [0.1, 0.2, None],
        }
    )
