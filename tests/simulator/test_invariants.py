"""What must hold whatever the workload: tokens, blocks, order of service, conservation of work, determinism."""

from collections import Counter

import numpy as np
import pytest
import vllm_reference
from random_scenarios import random_timed_scenario
from scenario_adapter import run_timed

from stepcal.simulator import (
    CompiledStepTime,
    RequestList,
    ServerConfig,
    SimulationResult,
    generate_arrivals,
    make_conversations,
    make_requests,
    simulate,
)
from stepcal.simulator import layout as at
from stepcal.simulator.engine import EngineRun
from stepcal.simulator.load.arrivals import LoadStage

SEEDS = range(500, 560)
STEP_TIME = CompiledStepTime(constant_us=4000.0, tokens_us=2.0, requests_us=30.0, kv_us=0.05, waiting_us=3.0)


@pytest.fixture(scope="module")
def runs() -> list[EngineRun]:
    """Random scenarios, cramped and with aborts, every step recorded."""
    return [run_timed(random_timed_scenario(seed), record=True) for seed in SEEDS]


def some_requests(n: int = 400, *, rate: float = 20.0, output_tokens: int = 60, seed: int = 3) -> RequestList:
    arrival_s, stage = generate_arrivals([LoadStage(rate, n / rate / 2), LoadStage(2 * rate, n / rate / 4)], seed=seed)
    prompts = [[(i // 5, 40), (100 + i, 90 + i)] for i in range(30)]
    return make_requests(arrival_s, prompts, output_tokens, stage=stage)


def run_some(**arguments: object) -> SimulationResult:
    return simulate(some_requests(), ServerConfig(kv_blocks=110, max_num_seqs=32), STEP_TIME, **arguments)


def test_every_request_ends_in_exactly_one_status(runs: list[EngineRun]) -> None:
    for run in runs:
        assert set(run.requests.rows["status"]) <= {at.FINISHED, at.ABORTED}
        assert run.state.n_ended == len(run.request_list)
        left = ("n_running", "n_preempted", "n_queued", "n_decoding", "sum_base")
        assert [run.state[name] for name in left] == [0] * 5


def test_no_token_is_lost_or_made_twice(runs: list[EngineRun]) -> None:
    """Between two preemptions a request computes each of its tokens once, in order, and all of them by its end."""
    for run in runs:
        rows = run.requests.rows
        computed: Counter[int] = Counter()
        for call in run.recorder.rows().calls():
            for request in call["preempted"]:
                computed[request] = 0
            computed.update(dict(call["cached_tokens"]))
            computed.update(dict(call["scheduled"]))
        for request in np.flatnonzero(rows["status"] == at.FINISHED).tolist():
            assert computed[request] == rows["prompt_tokens"][request] + rows["output_tokens"][request] - 1
            assert rows["generated_tokens"][request] == rows["output_tokens"][request]


def test_contexts_grow_by_what_is_scheduled(runs: list[EngineRun]) -> None:
    for run in runs:
        recorded = run.recorder.rows()
        context: dict[int, int] = {}
        items = 0
        for call, end in zip(recorded.calls(), recorded.column("items_end").tolist(), strict=True):
            for request in call["preempted"]:
                context[request] = 0
            context.update(dict(call["cached_tokens"]))
            for (request, n), kv in zip(call["scheduled"], recorded.item_kv[items:end].tolist(), strict=True):
                context[request] = context.get(request, 0) + n
                assert kv == context[request]
            items = end


def test_gaps_between_tokens_are_counted_once_each() -> None:
    result = run_some()
    assert result.is_finished.all()
    assert result.preemptions > 0
    assert result.gap_counts.sum() == (result.rows["output_tokens"] - 1).sum()
    spans = result.rows["finish_us"] - result.rows["first_token_us"]
    assert result.gap_sums.sum() == pytest.approx(spans.sum(), rel=1e-9)


def test_blocks_are_never_negative_nor_above_the_total(runs: list[EngineRun]) -> None:
    for run in runs:
        free = run.recorder.rows().column("kv_blocks_free")
        assert free.min() >= 0
        assert free.max() <= run.server.usable_blocks
        entries, entry, n_free = run.pool.entries, int(run.pool.entries["next"][0]), 0
        while entry:
            n_free += int(entries["count"][entry])
            entry = int(entries["next"][entry])
        assert n_free == run.pool.n.free == run.server.usable_blocks


def test_limits_are_kept(runs: list[EngineRun]) -> None:
    for run in runs:
        recorded = run.recorder.rows()
        tokens = recorded.column("prefill_tokens") + recorded.column("decode_tokens")
        assert tokens.max() <= run.server.max_num_batched_tokens
        assert recorded.column("running_depth").max() <= run.server.max_num_seqs


def test_first_come_first_served() -> None:
    result = run_some()
    order = np.argsort(result.rows["first_scheduled_us"], kind="stable")
    assert (np.diff(order) > 0).all()


def test_work_conservation(runs: list[EngineRun]) -> None:
    """The device is idle only while the engine has nothing to do, or is waiting for an output that frees something."""
    for run in runs:
        recorded = run.recorder.rows()
        is_step = recorded.column("num_prefill_reqs") + recorded.column("num_decode_reqs") > 0
        start, end = recorded.column("start_us")[is_step], recorded.column("end_us")[is_step]
        assert (start[1:] >= end[:-1]).all()
        arrivals = np.sort(run.requests.rows["arrival_us"])
        for gap_end, gap_start in zip(start[1:], end[:-1], strict=True):
            if gap_end > gap_start:
                assert gap_end in arrivals


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = (run_some(record_steps=0.3, seed=7) for _ in range(2))
    assert first.rows.tobytes() == second.rows.tobytes()
    assert first.step_table().equals(second.step_table())
    assert not first.step_table().equals(run_some(record_steps=0.3, seed=8).step_table())


def test_recording_does_not_change_the_run() -> None:
    plain, recorded = run_some(), run_some(record_steps=1.0)
    for name in at.REQUEST_ROW.names:
        assert np.allclose(plain.rows[name], recorded.rows[name], rtol=1e-9, equal_nan=True), name


@pytest.mark.parametrize(
    "component",
    [
        "constant_us",
        "tokens_us",
        "prefill_tokens_us",
        "requests_us",
        "decode_requests_us",
        "kv_us",
        "prefill_kv_us",
        "prefill_pair_us",
        "host_constant_us",
        "host_requests_us",
    ],
)
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_a_closed_batch_takes_longer_if_any_component_does(component: str, combine: str) -> None:
    """All requests are there from the start and fit at once, so every step is the same step, only slower."""
    base = {
        "constant_us": 500.0,
        "tokens_us": 2.0,
        "prefill_tokens_us": 1.0,
        "requests_us": 10.0,
        "decode_requests_us": 5.0,
        "kv_us": 0.05,
        "prefill_kv_us": 0.02,
        "prefill_pair_us": 1e-3,
        "host_constant_us": 400.0,
        "host_requests_us": 20.0,
    }
    requests = make_requests(np.zeros(16), [[(i, 50 + 7 * i)] for i in range(16)], np.arange(20, 36))
    means = []
    for factor in (0.5, 1.0, 1.5, 4.0):
        step_time = CompiledStepTime(**{**base, component: factor * base[component]}, combine=combine)
        result = simulate(requests, ServerConfig(kv_blocks=2000), step_time)
        means.append(np.nanmean(result.e2e_us()))
    assert (np.diff(means) >= 0.0).all()
    assert combine == "max" or (np.diff(means) > 0.0).all()


def test_a_timeout_bounds_every_latency() -> None:
    requests = some_requests(rate=200.0)
    timeout_s = 1.0
    result = simulate(
        requests,
        ServerConfig(kv_blocks=110, max_num_seqs=32),
        STEP_TIME,
        timeout_s=timeout_s,
        api_before_us=800.0,
        api_after_us=500.0,
    )
    summary = result.summary()["overall"]
    assert 0 < summary["failed"] < len(requests)
    assert summary["completed"] + summary["failed"] == len(requests)
    assert np.nanmax(result.e2e_us()) <= timeout_s * 1e6


def test_api_overheads_are_part_of_what_the_client_sees() -> None:
    requests = some_requests(rate=1.0)  # hardly any two at a time, so the engine's own time is the same
    server = ServerConfig(kv_blocks=110, max_num_seqs=32)
    plain = simulate(requests, server, STEP_TIME)
    with_api = simulate(requests, server, STEP_TIME, api_before_us=2000.0, api_after_us=3000.0)
    assert np.allclose(with_api.e2e_us(), plain.e2e_us() + 5000.0, rtol=1e-9)
    assert np.allclose(with_api.ttft_us(), plain.ttft_us() + 5000.0, rtol=1e-9)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_conversations_wait_for_their_answers_and_hit_what_was_said(async_scheduling: bool) -> None:
    think_s, n_sessions, n_turns = 0.5, 40, 4
    requests = make_conversations(
        np.arange(n_sessions) * 0.2,
        n_turns,
        system_prompt_len=64,
        question_len=30,
        output_len=50,
        think_s=think_s,
        n_system_prompts=2,
    )
    server = ServerConfig(kv_blocks=3000, async_scheduling=async_scheduling)
    result = simulate(requests, server, STEP_TIME, api_after_us=1000.0)
    table = result.request_table()
    assert (table["status"] == "finished").all()
    for turn in range(1, n_turns):
        now = table.iloc[turn * n_sessions : (turn + 1) * n_sessions]
        before = table.iloc[(turn - 1) * n_sessions : turn * n_sessions]
        assert np.allclose(now["arrival_s"].to_numpy(), before["finish_s"].to_numpy() + think_s, rtol=1e-12)
        # All full blocks of what was said, except the last token of the answer, which was never computed.
        said = before["prompt_tokens"].to_numpy() + before["output_tokens"].to_numpy() - 1
        assert (now["cached_tokens"].to_numpy() == said // server.block_size * server.block_size).all()


def test_conversations_equal_the_reference() -> None:
    """Replayed on the reference at the times at which the simulator sent the turns."""
    requests = make_conversations(
        np.arange(12) * 0.01, 3, system_prompt_len=40, question_len=30, output_len=37, think_s=0.03
    )
    server = ServerConfig(kv_blocks=45, max_num_seqs=6, max_num_batched_tokens=128)
    step_time = CompiledStepTime(constant_us=500.0, tokens_us=1.0, requests_us=8.0, waiting_us=0.5)
    result = simulate(requests, server, step_time)
    starts = requests.prompt_start.tolist()
    segments = np.column_stack((requests.segment_content, requests.segment_tokens)).tolist()
    arrival_us = result.rows["arrival_us"]
    order = np.argsort(arrival_us, kind="stable").tolist()
    scenario = {
        "config": {
            "max_num_seqs": server.max_num_seqs,
            "max_num_batched_tokens": server.max_num_batched_tokens,
            "num_gpu_blocks": server.kv_blocks,
            "block_size": server.block_size,
            "max_model_len": server.max_model_len,
            "enable_prefix_caching": True,
            "async_scheduling": True,
        },
        "requests": [
            {
                "index": i,
                "arrival_us": float(arrival_us[i]),
                "prompt_segments": segments[starts[i] : starts[i + 1]],
                "output_tokens": int(requests.output_tokens[i]),
                "output_content": int(requests.output_content[i]),
            }
            for i in order
        ],
    }
    coefficients = {
        "constant_us": 500.0,
        "per_token_us": 1.0,
        "per_request_us": 8.0,
        "per_kv_token_us": 0.0,
        "per_waiting_us": 0.5,
    }
    expected = vllm_reference.simulate(scenario, vllm_reference.affine_step_time_us(coefficients))
    assert result.preemptions == sum(row["preemptions"] for row in expected["outcome"]) > 0
    for row in expected["outcome"]:
        assert result.rows["finish_us"][row["index"]] == pytest.approx(row["finish_us"], rel=1e-12)
