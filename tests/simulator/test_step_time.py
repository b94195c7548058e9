"""Step times: closed forms against stepping, tables, callables, host and GPU overlapping, bad components."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.simulator import (
    CompiledStepTime,
    LoadStage,
    RequestList,
    ServerConfig,
    StepBatch,
    Workload,
    simulate,
)
from stepcal.simulator.clock import N_GAP_BINS, elapsed, gap_bin, gap_bin_centres, steps_until

SERVER = ServerConfig(kv_blocks=700, max_num_seqs=24, max_num_batched_tokens=512)
TIMES = ("first_scheduled_us", "first_token_us", "finish_us")


def some_requests(rate: float = 12.0, seed: int = 0) -> RequestList:
    workload = Workload(
        n_groups=3,
        n_prompts_per_group=5,
        system_prompt_len=100,
        question_len=200,
        output_len=150,
        stages=(LoadStage(rate, 20.0), LoadStage(rate / 2, 20.0)),
    )
    return workload.requests(seed=seed)


STEP_TIMES = {
    "affine": CompiledStepTime(constant_us=5000.0, tokens_us=3.1, requests_us=40.7, kv_us=0.31, waiting_us=3.3),
    "tables": CompiledStepTime(
        tokens_us=4000.0 + 300.0 * np.sqrt(np.arange(513)),
        requests_us=np.log1p(np.arange(25)) * 500.0,
        decode_requests_us=np.arange(25) ** 1.5,
        kv_us=0.2,
        prefill_pair_us=1e-3,
        prefill_kv_us=0.1,
    ),
    "host bound for short contexts": CompiledStepTime(
        constant_us=3000.0,
        kv_us=0.9,
        host_constant_us=4000.0,
        host_requests_us=90.0,
        host_waiting_us=8.0,
        combine="max",
    ),
    "floor": CompiledStepTime(constant_us=-2000.0, kv_us=1.1, requests_us=10.0, floor_us=3000.0),
    "falling with KV": CompiledStepTime(constant_us=9000.0, kv_us=-0.7, floor_us=4000.0),
}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("name", STEP_TIMES)
def test_closed_forms_agree_with_stepping(name: str, async_scheduling: bool) -> None:
    server = ServerConfig(kv_blocks=700, max_num_seqs=24, max_num_batched_tokens=512, async_scheduling=async_scheduling)
    jumped, stepped = (
        simulate(some_requests(), server, STEP_TIMES[name], timeout_s=4.0, max_jump=jump) for jump in (None, 1)
    )
    assert jumped.steps == stepped.steps
    assert (jumped.rows["status"] == stepped.rows["status"]).all()
    for key in TIMES:
        assert np.allclose(jumped.rows[key], stepped.rows[key], rtol=1e-9, atol=0.0, equal_nan=True), key
    assert jumped.gap_sums == pytest.approx(stepped.gap_sums, rel=1e-9)


@pytest.mark.parametrize("name", STEP_TIMES)
def test_a_callable_gives_the_same_times(name: str) -> None:
    step_time = STEP_TIMES[name]
    compiled = simulate(some_requests(), SERVER, step_time, timeout_s=4.0)
    asked = simulate(some_requests(), SERVER, lambda batch: step_time(batch), timeout_s=4.0)
    assert compiled.steps == asked.steps
    for key in TIMES:
        assert np.allclose(compiled.rows[key], asked.rows[key], rtol=1e-9, atol=0.0, equal_nan=True), key


def test_a_callable_sees_the_batch() -> None:
    seen: list[StepBatch] = []

    def step_time(batch: StepBatch) -> float:
        seen.append(batch)
        return 5000.0

    result = simulate(some_requests(), SERVER, step_time, record_steps=1.0)
    table = result.step_table()
    assert len(seen) == result.steps == table.num_rows
    assert [b.prefill_tokens for b in seen] == table["prefill_tokens"].to_pylist()
    assert [b.decode_kv_lens.tolist() for b in seen] == table["decode_kv_lens"].to_pylist()
    assert [b.prefill_kv_lens.tolist() for b in seen] == table["prefill_kv_lens"].to_pylist()
    assert [b.waiting for b in seen] == table["waiting_depth"].to_pylist()


def test_overlap_needs_asynchronous_scheduling() -> None:
    """Without it, host and GPU take turns whatever `combine` says."""
    parts = {"constant_us": 3000.0, "host_constant_us": 2000.0}
    requests = some_requests()
    both = ServerConfig(kv_blocks=700, async_scheduling=False)
    results = [simulate(requests, both, CompiledStepTime(**parts, combine=combine)) for combine in ("sum", "max")]
    assert results[0].rows.tobytes() == results[1].rows.tobytes()
    overlapped = simulate(requests, SERVER, CompiledStepTime(**parts, combine="max"))
    longer = simulate(requests, SERVER, CompiledStepTime(constant_us=3000.0))
    assert overlapped.rows.tobytes() == longer.rows.tobytes()


NON_NEGATIVE = st.floats(0.0, 1e4)


@given(a=NON_NEGATIVE, b=st.floats(-50.0, 50.0), c=NON_NEGATIVE, n=st.integers(0, 300))
@settings(deadline=None, max_examples=300)
def test_elapsed_is_the_sum_of_the_steps(a: float, b: float, c: float, n: int) -> None:
    steps = np.maximum(c, a + b * np.arange(n))
    assert elapsed(a, b, c, n) == pytest.approx(steps.sum(), rel=1e-12, abs=1e-9)


@given(a=st.floats(1.0, 1e4), b=st.floats(0.0, 50.0), c=NON_NEGATIVE, n=st.integers(2, 300), part=st.floats(0.001, 1.5))
@settings(deadline=None, max_examples=300)
def test_steps_until_is_the_first_that_reaches_the_time(a: float, b: float, c: float, n: int, part: float) -> None:
    time_us = part * elapsed(a, b, c, n)
    found = steps_until(a, b, c, time_us, n)
    sums = [elapsed(a, b, c, i) for i in range(1, n)]
    expected = next((i + 1 for i, total in enumerate(sums) if total >= time_us), n)
    assert found == expected


@given(gap=st.floats(0.1, 1e9))
@settings(deadline=None)
def test_bins_of_gaps_are_narrow(gap: float) -> None:
    b = gap_bin(gap)
    assert 0 <= b < N_GAP_BINS
    assert gap_bin_centres()[b] == pytest.approx(gap, rel=1.01e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_us": np.nan}, "`kv_us` is nan"),
        ({"constant_us": -1.0}, "`constant_us` is -1.0"),
        ({"tokens_us": [0.0, 1.0, np.inf]}, "`tokens_us` is inf at 2"),
        ({"host_requests_us": [0.0, -3.0]}, "`host_requests_us` is -3.0 at 1"),
        ({"requests_us": [[1.0]]}, "`requests_us` has 2 dimensions"),
        ({"combine": "mean"}, "`combine` is 'mean'"),
    ],
)
def test_a_bad_component_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledStepTime(**arguments)


def test_a_short_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"`requests_us` has 5 elements.*`max_num_seqs` needs 25"):
        simulate(some_requests(), SERVER, CompiledStepTime(requests_us=np.arange(5.0)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.nan, "step time is nan"),
        (-1.0, "step time is -1"),
        ({"gemm_us": 1.0, "attention_us": np.nan}, "`attention_us` is nan"),
        ({"gemm_us": 1.0, "overhead_us": -2.0}, "`overhead_us`"),
    ],
)
def test_a_bad_answer_of_a_callable_is_named(answer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(some_requests(), SERVER, lambda batch: answer)


def test_a_step_time_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        simulate(some_requests(), SERVER, CompiledStepTime(constant_us=1e308, kv_us=1e308))


PREFILL, DECODE = np.meshgrid(np.arange(513.0), np.arange(25.0), indexing="ij")
BATCH_TABLES = {
    "sum": 2000.0 + 3.0 * PREFILL + 40.0 * DECODE,
    "product": 3000.0 + 200.0 * np.sqrt(PREFILL) * np.log1p(DECODE),
    "jagged": 1000.0 + np.random.default_rng(0).uniform(0.0, 9000.0, PREFILL.shape),
}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("name", BATCH_TABLES)
def test_a_batch_table_jumps_as_it_steps_as_it_is_asked(name: str, async_scheduling: bool) -> None:
    server = ServerConfig(kv_blocks=700, max_num_seqs=24, max_num_batched_tokens=512, async_scheduling=async_scheduling)
    step_time = CompiledStepTime(batch_us=BATCH_TABLES[name], kv_us=0.2, waiting_us=5.0, prefill_pair_us=1e-3)
    jumped, stepped, asked = (
        simulate(some_requests(), server, clock, timeout_s=4.0, max_jump=jump)
        for clock, jump in ((step_time, None), (step_time, 1), (lambda batch: step_time(batch), None))
    )
    assert jumped.steps == stepped.steps == asked.steps
    for other in (stepped, asked):
        assert (jumped.rows["status"] == other.rows["status"]).all()
        for key in TIMES:
            assert np.allclose(jumped.rows[key], other.rows[key], rtol=1e-9, atol=0.0, equal_nan=True), key
    assert jumped.gap_sums == pytest.approx(stepped.gap_sums, rel=1e-9)


def test_a_batch_table_that_is_a_sum_is_two_tables() -> None:
    together = CompiledStepTime(batch_us=BATCH_TABLES["sum"])
    apart = CompiledStepTime(constant_us=2000.0, prefill_tokens_us=3.0, decode_requests_us=40.0)
    results = [simulate(some_requests(), SERVER, clock, timeout_s=4.0) for clock in (together, apart)]
    assert results[0].steps == results[1].steps
    for key in TIMES:
        assert np.allclose(results[0].rows[key], results[1].rows[key], rtol=1e-12, atol=0.0, equal_nan=True), key


def test_every_recorded_step_takes_what_its_cell_says() -> None:
    table = BATCH_TABLES["jagged"]
    steps = simulate(some_requests(), SERVER, CompiledStepTime(batch_us=table), record_steps=1.0).step_table()
    cells = table[steps["prefill_tokens"].to_numpy(), steps["decode_tokens"].to_numpy()]
    assert np.allclose(steps["duration_us"].to_numpy(), cells, rtol=1e-6)
    assert (steps["prefill_tokens"].to_numpy() > 0).any() and np.unique(steps["decode_tokens"]).size > 5


def test_a_batch_table_stops_at_the_floor_and_overlaps_with_the_host() -> None:
    low = CompiledStepTime(batch_us=BATCH_TABLES["jagged"] - 9000.0, floor_us=700.0)
    chunks = np.array([17], dtype=np.int32)
    empty = chunks[:0]
    below = np.argwhere(BATCH_TABLES["jagged"][0] < 9000.0)[0, 0]
    batch = StepBatch(empty, empty, np.full(below, 5, dtype=np.int32), 0)
    assert sum(low(batch).values()) == pytest.approx(700.0)
    jumped, stepped = (simulate(some_requests(), SERVER, low, timeout_s=4.0, max_jump=jump) for jump in (None, 1))
    assert np.allclose(jumped.rows["finish_us"], stepped.rows["finish_us"], rtol=1e-9, equal_nan=True)
    host = CompiledStepTime(batch_us=BATCH_TABLES["jagged"], host_constant_us=5000.0, combine="max")
    longest = CompiledStepTime(batch_us=np.maximum(BATCH_TABLES["jagged"], 5000.0))
    overlapped, single = (simulate(some_requests(), SERVER, clock) for clock in (host, longest))
    assert np.allclose(overlapped.rows["finish_us"], single.rows["finish_us"], rtol=1e-9)


def test_a_larger_batch_table_is_cut_to_the_server() -> None:
    table = BATCH_TABLES["jagged"]
    larger = np.pad(table, ((0, 100), (0, 7)), constant_values=1e6)
    results = [simulate(some_requests(), SERVER, CompiledStepTime(batch_us=t), timeout_s=4.0) for t in (table, larger)]
    assert results[0].rows.tobytes() == results[1].rows.tobytes()


@pytest.mark.parametrize("shape", [(512, 25), (513, 24), (25, 513), (1, 1)])
def test_a_batch_table_of_the_wrong_shape_is_named(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"`batch_us` has shape \({shape[0]}, {shape[1]}\).*need \(513, 25\)"):
        simulate(some_requests(), SERVER, CompiledStepTime(batch_us=np.ones(shape)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((513, 25, 1)), "`batch_us` has 3 dimensions"),
        (np.ones(513), r"`batch_us` has 1 dimension\(s\); it must be 0 or a table"),
        (5.0, r"`batch_us` has 0 dimension\(s\); it must be 0 or a table"),
        (np.full((513, 25), np.nan), "`batch_us` is nan"),
        (np.full((513, 25), -1.0), "`batch_us` is -1.0.*`floor_us`"),
    ],
)
def test_what_is_no_batch_table_is_refused(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledStepTime(batch_us=values)
