"""Step rows to test with: the real traces where they are at hand, and small tables of any make-up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from stepcal.datasets.catalogue import load_steps
from stepcal.locations import CACHE_VARIABLE, COMPILED, cache_folder, shipped_folder
from stepcal.specs.hardware import Accelerator, load_accelerator

# The same examples on every machine, however slow it is at the moment; a bug hunt may raise the number.
settings.register_profile("stepcal", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("stepcal")

MakeSteps = Callable[..., pd.DataFrame]


@pytest.fixture(scope="session", autouse=True)
def results_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Results of studies are shared within a session, and the user's own are left alone; compiled code is the user's."""
    compiled, cache = cache_folder() / COMPILED, tmp_path_factory.mktemp("cache")
    compiled.mkdir(parents=True, exist_ok=True)
    (cache / COMPILED).symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache))
        yield


@pytest.fixture(scope="session")
def traces_folder() -> Path:
    """The folder of the public traces; tests that need it are skipped without it."""
    named = os.environ.get("STEPCAL_DATA")
    folder = Path(named) if named else shipped_folder().parent / "shared" / "data"
    if not (folder / "steps" / "enriched_steps.parquet").is_file():
        pytest.skip(f"no step traces in {folder}: set STEPCAL_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def traces(traces_folder: Path) -> pd.DataFrame:
    """The public step traces of three experiments."""
    return load_steps(traces_folder)


@pytest.fixture(scope="session")
def h100() -> Accelerator:
    return load_accelerator("h100-sxm")


@pytest.fixture(scope="session")
def make_steps() -> MakeSteps:
    """Build step rows from token counts; everything else has a plain default that a keyword overrides."""

    def make(prefill_tokens: object, decode_tokens: object, **columns: object) -> pd.DataFrame:
        prefill, decode = np.broadcast_arrays(np.atleast_1d(prefill_tokens), np.atleast_1d(decode_tokens))  # type: ignore[call-overload]
        defaults: dict[str, object] = {
            "experiment_id": "run-a",
            "model": "llama-2-7b",
            "workload": "general",
            "tensor_parallel": 1,
            "step_id": np.arange(prefill.size) * 10,
            "duration_us": 100.0,
            "running_depth": decode,
            "waiting_depth": 0,
            "num_prefill_reqs": (prefill > 0).astype(int),
            "num_decode_reqs": decode,
            "num_finished": 0,
            "num_preempted": 0,
            "kv_blocks_total": 10_000,
            "kv_blocks_free": 10_000 - decode,
        }
        tokens = {"prefill_tokens": prefill, "decode_tokens": decode}
        return pd.DataFrame({**defaults, **tokens, **columns}, index=range(prefill.size))

    return make
