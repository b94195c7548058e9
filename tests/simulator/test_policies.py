"""Priorities and a threshold for long prefills: equal to the slow reference on random scenarios, and what they promise."""

import os

import numpy as np
import pytest
import vllm_reference
from random_scenarios import random_scenario, random_timed_scenario, with_policies
from scenario_adapter import play_calls, play_timed
from test_conformance import assert_same
from test_random_scenarios import VERSIONS, of_version

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, ServerConfig, make_requests, simulate
from stepcal.simulator.versions import NEWEST

N_CASES = int(os.environ.get("STEPCAL_RANDOM_CASES", "75"))
_BATCH = 25
BATCHES = [range(first, min(first + _BATCH, N_CASES)) for first in range(0, N_CASES, _BATCH)]
STEP_TIME = CompiledStepTime(constant_us=1000.0, requests_us=10.0, kv_us=0.01, prefill_tokens_us=1.0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_calls_equal_those_of_the_reference(seeds: range, version: str) -> None:
    for seed in seeds:
        scenario = with_policies(of_version(random_scenario(seed), version), seed)
        try:
            expected = vllm_reference.simulate(scenario)
        except vllm_reference.EndlessError:
            with pytest.raises(InputError, match="does not come to an end"):
                play_calls(scenario)
            continue
        assert_same(play_calls(scenario), expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_times_equal_those_of_the_reference(seeds: range, version: str) -> None:
    for seed in seeds:
        scenario = with_policies(of_version(random_timed_scenario(seed), version), seed)
        step_time_us = vllm_reference.affine_step_time_us(scenario["step_time"])
        try:
            expected = vllm_reference.simulate(scenario, step_time_us)
        except vllm_reference.EndlessError:
            continue
        assert_same(play_timed(scenario), expected)
        assert_same(play_timed(scenario, record=False), {**expected, "steps": []})


def server(**changes: object) -> ServerConfig:
    return ServerConfig(**{"kv_blocks": 5000, "vllm_version": NEWEST, **changes})


def random_requests(**changes: object) -> object:
    rng = np.random.default_rng(1)
    prompts = [[(i % 5, 40), (100 + i, 30 + 9 * i)] for i in range(40)]
    return make_requests(np.sort(rng.uniform(0.0, 3.0, 200)), prompts, 50, **changes)


@pytest.mark.parametrize("kv_blocks", [5000, 120])
@pytest.mark.parametrize("vllm_version", VERSIONS)
@pytest.mark.parametrize("is_async", [True, False])
def test_a_threshold_that_no_prompt_reaches_changes_nothing(kv_blocks: int, vllm_version: str, is_async: bool) -> None:
    """Two ways to simulate the same server: the fast loop, and the one that visits each request."""
    requests = random_requests()
    limits = {"kv_blocks": kv_blocks, "max_num_batched_tokens": 256, "vllm_version": vllm_version}
    plain = simulate(requests, server(**limits, async_scheduling=is_async), STEP_TIME)
    visited = server(**limits, async_scheduling=is_async, long_prefill_token_threshold=4096)
    other = simulate(requests, visited, STEP_TIME)
    assert (plain.preemptions > 0) == (kv_blocks == 120)
    for name in ("first_scheduled_us", "first_token_us", "finish_us", "cached_tokens", "preemptions"):
        assert np.allclose(other.rows[name], plain.rows[name], rtol=1e-12), name
    assert other.gap_counts.sum() == plain.gap_counts.sum()
    assert other.gap_sums == pytest.approx(plain.gap_sums, rel=1e-9)


@pytest.mark.parametrize("kv_blocks", [5000, 120])
def test_equal_priorities_are_first_come_first_served(kv_blocks: int) -> None:
    """Without preemption; those of a preempted request's age are served first either way."""
    requests = random_requests(priority=np.full(200, 7))
    plain = simulate(requests, server(kv_blocks=kv_blocks, max_num_seqs=4), STEP_TIME)
    other = simulate(requests, server(kv_blocks=kv_blocks, max_num_seqs=4, scheduling_policy="priority"), STEP_TIME)
    assert np.allclose(other.rows["finish_us"], plain.rows["finish_us"], rtol=1e-12)


def test_the_important_wait_less() -> None:
    """With few places, requests of priority 0 overtake those of priority 1, and both classes keep their order."""
    priority = np.arange(200) % 2
    limits = server(max_num_seqs=4, scheduling_policy="priority")
    rows = simulate(random_requests(priority=priority), limits, STEP_TIME).rows
    waits = rows["first_scheduled_us"] - rows["arrival_us"]
    assert waits[priority == 0].mean() < 0.5 * waits[priority == 1].mean()
    for level in (0, 1):
        assert (np.diff(rows["first_scheduled_us"][priority == level]) >= 0.0).all()


def test_a_lone_request_is_spared_the_threshold_in_the_newest_release() -> None:
    requests = make_requests([0.0], [[(0, 1000)]], 3)
    steps = {
        version: simulate(requests, server(long_prefill_token_threshold=100, vllm_version=version), STEP_TIME).steps
        for version in VERSIONS
    }
    assert steps == {"0.15.1": 12, "0.19.0": 12, "0.24.0": 12, "0.33.0": 3}


def test_short_prompts_pass_long_ones_under_a_threshold() -> None:
    requests = make_requests([0.0, 0.0], [[(0, 2000)], [(1, 100)]], 20)
    first_come = simulate(requests, server(max_num_batched_tokens=512), STEP_TIME).rows["first_token_us"]
    limited = server(max_num_batched_tokens=512, long_prefill_token_threshold=256)
    first_token_us = simulate(requests, limited, STEP_TIME).rows["first_token_us"]
    assert first_come[0] <= first_come[1]
    assert first_token_us[1] < 0.5 * first_token_us[0]


def test_many_preempted_requests_wait_behind_more_important_ones() -> None:
    """More requests are preempted at a time than may run: each later one is more important than all before it."""
    n = 60
    prompts = [[(i, 60)] for i in range(n)]
    requests = make_requests(np.arange(n) * 0.02, prompts, 200, priority=-np.arange(n))
    limits = server(kv_blocks=40, max_num_seqs=4, scheduling_policy="priority")
    result = simulate(requests, limits, STEP_TIME, record_steps=1.0)
    assert (result.rows["status"] == 3).all()
    assert (result.rows["preemptions"] > 0).sum() > 2 * limits.max_num_seqs
    assert np.argmin(result.rows["finish_us"]) > n // 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduling_policy": "lifo"}, "must be one of fcfs, priority"),
        ({"long_prefill_token_threshold": -1}, "from 0"),
        ({"long_prefill_token_threshold": 5000}, "to 4096"),
    ],
)
def test_bad_policies_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        server(**changes)


def test_priorities_of_another_number_are_refused() -> None:
    with pytest.raises(InputError, match="priority"):
        make_requests([0.0, 1.0], [[(0, 5)]], 5, priority=[1])
