"""What is read off the label about KV offloading: recovered where it was put in, and what the public traces say."""

import numpy as np
import pandas as pd
import pytest

from stepcal.specs.architecture import load_architecture
from stepcal.specs.kv_offloading import offload_blocks, rejected_requests
from stepcal.studies import registry as studies
from stepcal.studies.diagnosis.kv_offloading import (
    OUTPUTS,
    STOCK,
    TIMING,
    interval_slopes,
    label_by_held,
    rejection_cost,
    steady_timing,
)
from stepcal.studies.diagnosis.offload_pool import ALL, PROMPTS, fit_pool
from stepcal.studies.results.records import read_recorded

OUTPUT_TOKENS = 248
MODELS = ("llama-2-70b", "llama-2-7b", "codellama-34b", "mixtral-8x7b")
RUNS = pd.DataFrame(
    {
        "experiment_id": ["a"],
        "run_output_tokens": [OUTPUT_TOKENS],
        "run_system_prompt_tokens": [100],
        "run_groups": [10],
        "run_prompts_per_group": [10],
        "block_size": [16],
    }
)
PROMPT_TOKENS = pd.Series({"a": 575.0})


def made_up_steps(gib: float, *, slope: float = 0.0, n: int = 3000, seed: int = 0) -> pd.DataFrame:
    """A run whose batch rises and falls, whose scheduler scans a pool, and whose interval takes a share of that."""
    rng = np.random.default_rng(seed)
    running = np.rint(50 + 40 * np.sin(np.arange(n) / 60)).astype(int)
    held = 37 * running
    pool = offload_blocks(load_architecture("llama-2-70b"), gib)
    rejected = rejected_requests(running, held - running, OUTPUT_TOKENS, pool_blocks=pool)
    label = (7 * running + 100 * rejected) * rng.lognormal(0, 0.2, n)
    starts = np.concatenate([[0], np.cumsum(18_000 + 30 * running + slope * label)[:-1]])
    return pd.DataFrame(
        {
            "experiment_id": "a",
            "model": "llama-2-70b",
            "step_id": np.arange(n),
            "ts_start_ns": 1e3 * starts,
            "duration_us": label,
            "running_depth": running,
            "num_prefill_reqs": 0,
            "num_decode_reqs": running,
            "prefill_tokens": 0,
            "kv_blocks_total": 31_356,
            "kv_blocks_free": 31_356 - held,
        }
    )


@pytest.mark.parametrize("gib", [6.0, 8.0, 10.0])
def test_the_pool_that_was_put_in_is_found(gib: float) -> None:
    fits, profile = fit_pool(made_up_steps(gib), RUNS, PROMPT_TOKENS)
    fit = fits.set_index("stored").loc[ALL]
    assert fit["pool_gib"] == pytest.approx(gib, abs=0.15)
    assert fit["low_gib"] <= fit["pool_gib"] <= fit["high_gib"] <= fit["low_gib"] + 0.6
    assert fit["request_us"] == pytest.approx(7, rel=0.05)
    assert fit["scan_us"] == pytest.approx(100, rel=0.05)
    assert fit["log_rms"] < fit["log_rms_no_pool"] / 2
    assert profile.query("stored == 'all'")["log_rms"].min() == pytest.approx(fit["log_rms"])
    assert fits["log_rms"].idxmin() == fits.index[fits["stored"] == ALL][0]


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_the_share_of_the_label_that_a_step_waits_for_is_found(slope: float) -> None:
    found = interval_slopes(made_up_steps(8.0, slope=slope)).set_index("smoothed").loc[False]
    assert found["slope"] == pytest.approx(slope, abs=0.02)
    assert found["low"] - 1e-9 <= found["slope"] <= found["high"] + 1e-9


def test_bins_hold_all_steps_but_those_of_rare_batches() -> None:
    steps = made_up_steps(8.0)
    table = label_by_held(steps)
    assert len(steps) - 400 < table["n_steps"].sum() <= len(steps)
    assert (table["p10_us"] <= table["median_us"]).all()
    assert (table["pool_blocks"] == 1638).all()
    below, above = (table[(table["held_blocks"] > 1700) == is_above]["per_request_us"] for is_above in (False, True))
    assert above.min() > 1.5 * below.max()


class TestTheRealScheduler:
    def test_a_rejection_costs_more_the_more_blocks_the_pool_has(self) -> None:
        rows = steady_timing(read_recorded(TIMING).tables["timing"])
        costs = rows[rows["offload"] == OUTPUTS].sort_values("pool_blocks")["rejection_us"]
        assert len(costs) == 4
        assert costs.is_monotonic_increasing
        constant, block = rejection_cost(read_recorded(TIMING).tables["timing"])
        assert 0 < constant < 50
        assert 0.02 < block < 0.3

    def test_the_overloaded_labels_are_reproduced_within_half(self) -> None:
        labels = read_recorded("offloading").tables["labels"].query("overloaded")
        rows = steady_timing(read_recorded(TIMING).tables["timing"]).set_index(["offload", "model"])["p50_us"]
        for row in labels.itertuples():
            model = next(
                m for m in ("llama-2-70b", "llama-2-7b", "codellama-34b", "mixtral-8x7b") if m in row.experiment_id
            )
            assert 2 / 3 < rows[OUTPUTS, model] / row.label_us < 1.5, model
        assert (
            rows[STOCK, "mixtral-8x7b"]
            < labels.set_index("experiment_id").filter(like="mixtral", axis=0)["label_us"].iloc[0] / 2
        )


@pytest.fixture(scope="module")
def study(traces_folder):
    return studies.load_study(studies.OFFLOADING, data=traces_folder)


class TestThePublicTraces:
    def test_three_traces_of_two_models_agree_on_8_gib(self, study) -> None:
        fits = study["pool_fit"].query("stored == 'all'")
        assert len(fits) == 3
        assert ((fits["low_gib"] <= 8.0) & (fits["high_gib"] >= 8.0)).all()
        assert fits["pool_gib"].between(7.9, 8.2).all()

    def test_prompts_alone_explain_no_trace_better(self, study) -> None:
        errors = study["pool_fit"].pivot(index="experiment_id", columns="stored", values="log_rms")
        assert (errors[PROMPTS] > errors[ALL]).all()
        rival = study["pool_fit"].query("stored == 'prompts'")
        assert rival["low_gib"].max() > rival["high_gib"].min(), "no one size fits all three"

    def test_the_interval_does_not_follow_the_label_while_the_gpu_is_slower(self, study) -> None:
        assert study["slopes"]["high"].max() < 0.1
        assert study["slopes"]["low"].min() > -0.1

    def test_every_run_is_on_its_side_of_a_millisecond(self, study) -> None:
        labels = study["labels"]
        assert len(labels) == 16
        assert ((labels["rejected"] > 0) == (labels["label_us"] > 1000)).all()
        assert labels["ratio"].between(0.4, 2.0).all()

    def test_where_the_host_is_slower_the_step_takes_as_long_as_the_label(self, study) -> None:
        busy = study["late"].query("running > 100")
        assert len(busy) >= 6
        assert busy["share_percent"].between(90, 105).all()
