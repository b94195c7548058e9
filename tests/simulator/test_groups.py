"""Layers that differ in what they read: equal to the slow reference on random scenarios, and bounded by the window."""

import os

import numpy as np
import pytest
import vllm_reference
from random_scenarios import random_scenario, random_timed_scenario, with_groups
from scenario_adapter import play_calls, play_timed
from test_conformance import assert_same

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, KvGroup, ServerConfig, make_conversations, make_requests, simulate
from stepcal.simulator.versions import NEWEST, RELEASES

N_CASES = int(os.environ.get("STEPCAL_RANDOM_CASES", "150"))
_BATCH = 25
BATCHES = [range(first, min(first + _BATCH, N_CASES)) for first in range(0, N_CASES, _BATCH)]
VERSIONS = [release.version for release in RELEASES]
STEP_TIME = CompiledStepTime(constant_us=1000.0, requests_us=10.0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_calls_equal_those_of_the_reference(seeds: range, version: str) -> None:
    for seed in seeds:
        scenario = with_groups(random_scenario(seed), seed, version)
        try:
            expected = vllm_reference.simulate(scenario)
        except vllm_reference.EndlessError:  # one block short, by a release's own count for chunks of no whole blocks
            with pytest.raises(InputError, match="waits for ever"):
                play_calls(scenario)
            continue
        assert_same(play_calls(scenario), expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_times_equal_those_of_the_reference(seeds: range, version: str) -> None:
    for seed in seeds:
        scenario = with_groups(random_timed_scenario(seed), seed, version)
        try:
            expected = vllm_reference.simulate(scenario, vllm_reference.affine_step_time_us(scenario["step_time"]))
        except vllm_reference.EndlessError:
            with pytest.raises(InputError, match="waits for ever"):
                play_timed(scenario)
            continue
        assert_same(play_timed(scenario), expected)
        assert_same(play_timed(scenario, record=False), {**expected, "steps": []})


def server(*groups: KvGroup, kv_blocks: int = 5000, **changes: object) -> ServerConfig:
    return ServerConfig(kv_blocks=kv_blocks, vllm_version=NEWEST, kv_groups=groups or (KvGroup(),), **changes)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_a_window_that_never_slides_costs_its_blocks_and_nothing_else(n_groups: int) -> None:
    """With as many blocks for each group, a model with windows longer than any request is a model without."""
    rng = np.random.default_rng(1)
    prompts = [[(i % 5, 40), (100 + i, 30 + i)] for i in range(40)]
    requests = make_requests(np.sort(rng.uniform(0.0, 3.0, 200)), prompts, 50)
    windows = [KvGroup("sliding", 4096)] * n_groups
    plain = simulate(requests, server(kv_blocks=120, enable_prefix_caching=False), STEP_TIME)
    several = server(KvGroup(), *windows, kv_blocks=119 * (n_groups + 1) + 1, enable_prefix_caching=False)
    assert simulate(requests, several, STEP_TIME).rows["finish_us"].tobytes() == plain.rows["finish_us"].tobytes()


def test_a_window_bounds_what_a_request_holds() -> None:
    requests = make_requests([0.0], [[(0, 1000)]], 2000)
    result = simulate(requests, server(KvGroup("sliding", 128)), STEP_TIME, record_steps=1.0)
    held = 4999 - result.step_table()["kv_blocks_free"].to_numpy()
    assert held[100:].max() <= 128 // 16 + 1
    chunked = simulate(requests, server(KvGroup("chunked", 512)), STEP_TIME, record_steps=1.0)
    assert (4999 - chunked.step_table()["kv_blocks_free"].to_numpy())[100:].max() <= 512 // 16 + 1


def test_a_prefix_is_hit_where_its_window_was_kept() -> None:
    """The same prompt again: all of it but for its last block, though the window's blocks of its middle are gone."""
    requests = make_requests([0.0, 5.0], [[(0, 800)]], 40)
    result = simulate(requests, server(KvGroup(), KvGroup("sliding", 64)), STEP_TIME)
    assert result.rows["cached_tokens"].tolist() == [0, 784]


@pytest.mark.parametrize("version", VERSIONS)
def test_turns_of_sessions_are_requests_that_come_when_their_answers_are_there(version: str) -> None:
    """Conversations with think times, and the same requests sent at the times at which their turns were due."""
    sessions = make_conversations(
        np.arange(12) / 64, 4, system_prompt_len=40, question_len=37, output_len=50, think_s=0.25, n_system_prompts=2
    )
    groups = (KvGroup("sliding", 64), KvGroup("sliding", 64), KvGroup("sliding", 100), KvGroup())
    small = ServerConfig(
        kv_blocks=900, max_num_seqs=4, max_num_batched_tokens=64, vllm_version=version, kv_groups=groups
    )
    eighths = CompiledStepTime(constant_us=1024.0, requests_us=8.0)  # sums are exact
    served = simulate(sessions, small, eighths)
    assert served.rows["cached_tokens"].max() > 100
    finish_s = served.rows["finish_us"] / 1e6
    due_s = np.where(sessions.follows < 0, sessions.arrival_s, finish_s[sessions.follows] + 0.25)
    order = np.argsort(due_s, kind="stable")
    alone = make_requests(
        due_s[order],
        [
            list(zip(sessions.segment_content[a:b], sessions.segment_tokens[a:b], strict=True))
            for a, b in zip(sessions.prompt_start[:-1], sessions.prompt_start[1:], strict=True)
        ],
        sessions.output_tokens[order],
        prompt=sessions.prompt[order],
        output_content=sessions.output_content[order],
    )
    again = simulate(alone, small, eighths)
    assert np.allclose(again.rows["finish_us"], served.rows["finish_us"][order], rtol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_with_offloading_groups_are_kept_as_the_release_keeps_them(version: str) -> None:
    """Up to 0.19.0 as full attention: the blocks of a plain model, and steps that read the window."""
    requests = make_requests(np.arange(12) * 0.02, [[(i, 30 + 25 * i)] for i in range(12)], 40 + np.arange(12))
    groups, small = (KvGroup("sliding", 48), KvGroup()), {"max_num_batched_tokens": 128, "vllm_version": version}
    offloads = ServerConfig(kv_blocks=100, kv_groups=groups, offload_blocks=10_000, **small)
    plain = ServerConfig(kv_blocks=100, offload_blocks=10_000, **small)
    reads = CompiledStepTime(constant_us=1000.0, kv_us=0.5, prefill_kv_us=0.25, prefill_pair_us=0.01)
    kept_whole = version in ("0.15.1", "0.19.0")
    assert offloads.has_groups != kept_whole
    rows = [simulate(requests, server, STEP_TIME, record_steps=1.0).step_table() for server in (offloads, plain)]
    assert rows[0].equals(rows[1]) == kept_whole
    less = [simulate(requests, offloads, reads.with_windows(share)).simulated_s for share in (0.0, 0.5)]
    assert less[1] < less[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "latent"}, InputError, "must be one of"),
        ({"kind": "sliding", "window": 0}, InputError, "at least 2 tokens"),
        ({"kind": "full", "window": 64}, InputError, "full attention has none"),
    ],
)
def test_bad_groups_are_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KvGroup(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv_groups": ()}, InputError, "at least one group"),
        ({"kv_groups": (KvGroup(), KvGroup())}, InputError, "all alike are one group"),
        ({"kv_groups": (KvGroup(), KvGroup("sliding", 32), KvGroup())}, InputError, "side by side"),
        (
            {
                "kv_groups": (KvGroup("sliding", 64), KvGroup("sliding", 32), KvGroup()),
                "offload_blocks": 9,
                "vllm_version": "0.19.0",
            },
            InputError,
            "vLLM refuses",
        ),
        (
            {"offload_blocks": 9, "vllm_version": "0.15.1", "disable_hybrid_kv_cache_manager": False},
            InputError,
            "refuses to start",
        ),
        (
            {"kv_groups": (KvGroup("sliding", 64), KvGroup("chunked", 32)), "disable_hybrid_kv_cache_manager": True},
            InputError,
            "vLLM refuses",
        ),
    ],
)
def test_groups_that_vllm_does_not_make_are_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ServerConfig(**{"kv_blocks": 100, "vllm_version": NEWEST, **changes})


def test_a_request_that_can_never_be_admitted_is_refused() -> None:
    requests = make_requests([0.0], [[(0, 100)]], 5)
    with pytest.raises(InputError, match="can never fit"):
        simulate(requests, server(KvGroup(), KvGroup("sliding", 64), kv_blocks=12), STEP_TIME)


@pytest.mark.parametrize("window", [KvGroup("sliding", 48), KvGroup("chunked", 64)])
def test_step_time_reads_the_window_only(window: KvGroup) -> None:
    """Compiled and asked step by step; and less than a model that reads everything, by what the window leaves out."""
    requests = make_requests(np.arange(12) * 0.02, [[(i, 30 + 25 * i)] for i in range(12)], 40 + np.arange(12))
    plain = CompiledStepTime(constant_us=1000.0, kv_us=0.5, prefill_kv_us=0.25, prefill_pair_us=0.01)
    grouped = server(KvGroup(), window, max_num_batched_tokens=128)
    half = plain.with_windows(0.5)
    compiled = simulate(requests, grouped, half)
    asked = simulate(requests, grouped, lambda batch: half(batch))
    assert np.allclose(compiled.rows["finish_us"], asked.rows["finish_us"], rtol=1e-12)
    assert compiled.simulated_s < simulate(requests, grouped, plain).simulated_s
    never_slides = server(KvGroup(), KvGroup("sliding", 4096), max_num_batched_tokens=128)
    same = simulate(requests, never_slides, half).rows["finish_us"]
    assert np.allclose(same, simulate(requests, never_slides, plain).rows["finish_us"], rtol=1e-12)
