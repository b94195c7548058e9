"""The offload pool in the simulator: who is rejected, and that advancing many steps at once changes nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.simulator import CompiledStepTime, LoadStage, ServerConfig, StepBatch, Workload, simulate
from stepcal.simulator.offload import REFRESH_CALLS
from stepcal.specs.kv_offloading import rejected_requests

OUTPUT_TOKENS = 150
SERVER = ServerConfig(kv_blocks=700, max_num_seqs=24, max_num_batched_tokens=512, offload_blocks=200)
STEP_TIME = CompiledStepTime(
    constant_us=4000.0, kv_us=0.3, host_constant_us=300.0, host_requests_us=8.0, host_rejected_us=900.0, combine="max"
)
TIMES = ("first_scheduled_us", "first_token_us", "finish_us")


def some_requests(rate: float = 30.0, seed: int = 0):
    workload = Workload(
        n_groups=3,
        n_prompts_per_group=5,
        system_prompt_len=100,
        question_len=200,
        output_len=OUTPUT_TOKENS,
        stages=(LoadStage(rate, 20.0), LoadStage(rate / 2, 20.0)),
    )
    return workload.requests(seed=seed)


def asked_steps(server: ServerConfig, rate: float = 30.0, seed: int = 0) -> tuple[list[StepBatch], pd.DataFrame]:
    """Every batch that the clock was asked about, and the recorded row of each."""
    batches: list[StepBatch] = []

    def step_time(batch: StepBatch):
        batches.append(batch)
        return STEP_TIME(batch)

    result = simulate(some_requests(rate, seed), server, step_time, record_steps=1.0)
    return batches, result.step_table().to_pandas()


@given(
    rate=st.floats(2.0, 20.0),
    pool=st.integers(1, 600),
    is_async=st.booleans(),
    timeout_s=st.sampled_from([np.inf, 4.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_steps_at_once_one_by_one_and_recorded_are_the_same(rate, pool, is_async, timeout_s, seed) -> None:
    server = replace(SERVER, offload_blocks=pool, async_scheduling=is_async)
    requests = some_requests(rate, seed)
    runs = [
        simulate(requests, server, STEP_TIME, timeout_s=timeout_s, **options)
        for options in ({}, {"max_jump": 1}, {"max_jump": 7}, {"record_steps": 1.0})
    ]
    for other in runs[1:]:
        assert other.steps == runs[0].steps
        assert (other.rows["status"] == runs[0].rows["status"]).all()
        for key in TIMES:
            assert np.allclose(other.rows[key], runs[0].rows[key], rtol=1e-12, atol=0.0, equal_nan=True), key


@pytest.mark.parametrize("is_async", [False, True])
def test_a_callable_gives_the_same_times(is_async: bool) -> None:
    server = replace(SERVER, async_scheduling=is_async)
    step_time = STEP_TIME if is_async else replace(STEP_TIME, combine="sum")  # nothing overlaps synchronously
    compiled, asked = (simulate(some_requests(), server, t) for t in (step_time, lambda batch: step_time(batch)))
    assert compiled.steps == asked.steps
    for key in TIMES:
        assert np.allclose(compiled.rows[key], asked.rows[key], rtol=1e-9, atol=0.0, equal_nan=True), key


@pytest.mark.parametrize("is_async", [False, True])
def test_the_number_is_the_estimate_from_the_batch_at_the_last_change(is_async: bool) -> None:
    """A call finds what the one before it left, if no request ended in between."""
    server = replace(SERVER, offload_blocks=100, async_scheduling=is_async)
    batches, rows = asked_steps(server, rate=12.0)
    assert len(batches) == len(rows)
    rejected = np.array([b.rejected for b in batches])
    running, n_ended = rows["running_depth"].to_numpy(), rows["num_finished"].to_numpy()
    held = (rows["kv_blocks_total"] - 1 - rows["kv_blocks_free"]).to_numpy()
    estimate = rejected_requests(running, held, OUTPUT_TOKENS, pool_blocks=server.offload_blocks)
    admitted = np.flatnonzero(np.diff(running) > 0) + 1  # a request came in this call: the next one counts anew
    checked = np.array([i for i in admitted if i + 1 < len(rows) and n_ended[i - 1 : i + 2].sum() == 0])
    assert len(checked) > 50
    assert (estimate[checked] > 0).sum() > 40
    assert np.allclose(rejected[checked + 1], estimate[checked], rtol=1e-12)
    # Where nobody comes or goes the number stays, but for a new count every so many calls.
    is_same = (np.diff(running, prepend=-1) == 0) & (n_ended == 0) & (rows["num_prefill_reqs"].to_numpy() == 0)
    quiet = is_same & np.roll(is_same, 1) & np.roll(is_same, 2)
    moved = quiet[1:] & (np.diff(rejected) != 0)
    assert quiet.sum() > 1000
    assert moved.sum() <= len(rows) / REFRESH_CALLS + 1


@pytest.mark.parametrize(("pool", "is_full"), [(0, False), (5000, False), (200, True)])
def test_nobody_is_rejected_without_a_pool_or_while_all_blocks_fit(pool: int, is_full: bool) -> None:
    batches, rows = asked_steps(replace(SERVER, offload_blocks=pool))
    rejected = np.array([b.rejected for b in batches])
    assert (rejected.max() > 0) == is_full
    assert (rejected <= rows["running_depth"].max()).all()


def test_a_full_pool_makes_requests_slower_and_an_ample_one_does_not() -> None:
    e2e_us = {
        pool: np.nanmean(simulate(some_requests(), replace(SERVER, offload_blocks=pool), STEP_TIME).e2e_us())
        for pool in (0, 100, 200, 700)
    }
    assert e2e_us[700] == pytest.approx(e2e_us[0], rel=1e-9)
    assert e2e_us[700] < e2e_us[200] < e2e_us[100]
