"""The offload pool: blocks in it, and requests that find no room, against what vLLM's own scheduler rejected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcal.errors import InputError
from stepcal.specs.architecture import load_architecture
from stepcal.specs.kv_offloading import held_blocks, offload_blocks, rejected_requests
from stepcal.studies.diagnosis.kv_offloading import OUTPUTS, STOCK, TIMING, estimated_rejections, steady_timing
from stepcal.studies.published_runs import STUDY_OFFLOAD_GIB
from stepcal.studies.results.records import read_recorded

counts = st.integers(1, 256)
blocks = st.integers(0, 50_000)
pools = st.integers(1, 20_000)
outputs = st.integers(2, 4000)


@pytest.mark.parametrize(
    ("model", "expected"),
    [("llama-2-7b", 1024), ("llama-2-70b", 1638), ("codellama-34b", 2730), ("mixtral-8x7b", 4096)],
)
def test_blocks_of_the_study(model: str, expected: int) -> None:
    assert offload_blocks(load_architecture(model), STUDY_OFFLOAD_GIB) == expected


def test_no_pool_has_no_blocks_and_rejects_nobody() -> None:
    assert offload_blocks(load_architecture("llama-2-7b"), 0.0) == 0
    assert rejected_requests(128, 30_000, 1448, pool_blocks=0).tolist() == [0.0]


@pytest.mark.parametrize("gib", [-1.0, float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused(gib: float) -> None:
    with pytest.raises(InputError, match="`kv_offloading_size` is"):
        offload_blocks(load_architecture("llama-2-7b"), gib)


@given(running=counts, held=blocks, output=outputs, pool=pools)
def test_between_nobody_and_everybody(running: int, held: int, output: int, pool: int) -> None:
    rejected = rejected_requests(running, held, output, pool_blocks=pool)[0]
    assert 0.0 <= rejected <= running * (1 + 1e-12)
    assert (rejected > 0.0) == (held > pool)


@given(running=counts, held=blocks, more=blocks, output=outputs, pool=pools)
def test_grows_with_the_blocks_in_use(running: int, held: int, more: int, output: int, pool: int) -> None:
    fewer, many = rejected_requests(running, [held, held + more], output, pool_blocks=pool)
    assert many >= fewer - 1e-9


@given(running=counts, held=blocks, output=outputs, pool=pools, more=blocks)
def test_a_larger_pool_rejects_no_more(running: int, held: int, output: int, pool: int, more: int) -> None:
    small, large = (rejected_requests(running, held, output, pool_blocks=p)[0] for p in (pool, pool + more))
    assert large <= small + 1e-9


@given(running=counts, context=st.integers(1, 3000), prompt=st.integers(1, 1000), texts=counts)
def test_a_shared_prompt_is_held_once(running: int, context: int, prompt: int, texts: int) -> None:
    alone, shared = (
        held_blocks(running, running * (context + prompt), prompt, n_texts=n)[0] for n in (running + texts, texts)
    )
    assert 0.0 <= shared <= alone
    assert alone - shared == pytest.approx(max(0, running - texts) * (prompt // 16))


class TestAgainstTheRealScheduler:
    """vLLM 0.15.1's OffloadingConnector on a CPU (`tools/time_vllm_offloading.py`), bins of five running requests."""

    def test_the_estimate_of_the_overloaded_runs_is_off_by_at_most_15_in_100_running_requests(self) -> None:
        table = estimated_rejections(steady_timing(read_recorded(TIMING).tables["timing"]))
        own = table[table["offload"] == OUTPUTS]
        assert own["model"].nunique() == 4
        assert (np.abs(own["estimated"] - own["rejected"]) / own["running"]).max() < 0.15

    def test_the_estimate_of_the_ramps_is_off_by_at_most_20_in_100_on_average(self) -> None:
        table = estimated_rejections(read_recorded(TIMING).tables["timing"])
        own = table[(table["offload"] == OUTPUTS) & (table["workload"] == "general")]
        error = np.abs(own["estimated"] - own["rejected"]) / own["running"]
        assert np.average(error, weights=own["n_calls"]) < 0.2

    def test_nobody_is_rejected_while_all_blocks_fit(self) -> None:
        table = read_recorded(TIMING).tables["timing"]
        below = table[(table["pool_blocks"] > 0) & (table["held_blocks"] < 0.8 * table["pool_blocks"])]
        assert len(below) > 20
        assert (below["rejected"] == 0).all()

    def test_the_release_stores_no_outputs_and_rejects_fewer(self) -> None:
        table = read_recorded(TIMING).tables["timing"].query("n_calls >= 20 and workload == 'reasoning'")
        keys = ["model", "workload", "bin"]
        both = table[table["offload"] == STOCK].merge(table[table["offload"] == OUTPUTS], on=keys)
        assert (both["rejected_x"] <= both["rejected_y"] + 5).all()
