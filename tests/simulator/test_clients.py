"""Clients that wait for each other: equal to the slow reference on random loads, and right where it can be counted."""

import os
import random

import numpy as np
import pytest
import vllm_reference
from random_scenarios import random_timed_scenario, with_groups
from reference_clients import ClientClock
from scenario_adapter import outcome_of, requests_of, server_of, step_time_of, timed_steps_of
from test_conformance import assert_same

from stepcal.errors import InputError
from stepcal.simulator import (
    Clients,
    CompiledStepTime,
    LoadStage,
    ServerConfig,
    SimulationResult,
    generate_arrivals,
    make_conversations,
    make_requests,
    simulate,
    stage_starts,
)
from stepcal.simulator.engine import EngineRun
from stepcal.simulator.versions import RELEASES

N_CASES = int(os.environ.get("STEPCAL_RANDOM_CASES", "150"))
_BATCH = 25
BATCHES = [range(first, min(first + _BATCH, N_CASES)) for first in range(0, N_CASES, _BATCH)]
TEN_MS = CompiledStepTime(constant_us=10_000.0)


def random_load(seed: int) -> tuple[dict, dict]:
    """A random scenario whose requests have a stage and an offset in it, and how clients send it. Sums are exact."""
    rng = random.Random(seed)
    scenario = random_timed_scenario(seed)
    requests = scenario["requests"]
    n_stages = rng.choice((1, 1, 2, 3))
    squeeze = rng.choice((1.0, 0.25, 0.0))
    stages = sorted(rng.randrange(n_stages) for _ in requests)
    offsets = sorted((stage, request["arrival_us"] * squeeze) for stage, request in zip(stages, requests, strict=True))
    for request, (stage, offset) in zip(requests, offsets, strict=True):
        request.update(stage=stage, arrival_us=offset, abort_us=None)
    max_in_flight = rng.choice((None, 1, 2, 3, 8))
    thinks = max_in_flight is not None and rng.random() < 0.5
    load = {
        "max_in_flight": max_in_flight,
        "think_us": [rng.choice((0.0, 16.0, 500.0 * rng.random() // 1)) if thinks else 0.0 for _ in requests],
        "interval_us": rng.choice((0.0, 100.0)),
        "drains": n_stages > 1,
        "api_us": rng.choice((0.0, 0.0, 40.0)),
        "timeout_us": rng.choice((None, None, 100.0, 400.0, 3000.0)),
    }
    load["round_trip_us"] = 2 * load["api_us"]
    return scenario, load


def first_begin_us(request: dict, scenario: dict, load: dict) -> float:
    """When the stage of a request begins, if it is the first with any, and how long a request takes to the engine."""
    first = scenario["requests"][0]["stage"]
    return load["api_us"] + first * load["interval_us"] if request["stage"] == first else 0.0


def run_load(scenario: dict, load: dict, *, record: bool) -> EngineRun:
    """The load on the engine, with the scenario's times to the last bit."""
    requests = scenario["requests"]
    n_stages = requests[-1]["stage"] + 1
    start_s = 1e3 * np.arange(n_stages)  # the list's own times, which draining replaces
    arrivals = [start_s[r["stage"]] + r["arrival_us"] / 1e6 for r in requests]
    listed = requests_of(scenario, arrivals, None, stage=[r["stage"] for r in requests])
    run = EngineRun(
        listed,
        server_of(scenario["config"]),
        step_time_of(scenario),
        clients=Clients(
            max_in_flight=load["max_in_flight"],
            think_s=1.0 if any(load["think_us"]) else 0.0,
            stage_starts_s=start_s if load["drains"] else None,
        ),
        timeout_s=np.inf if load["timeout_us"] is None else 1.0,
        api_before_us=load["api_us"],
        api_after_us=load["api_us"],
        record_steps=1.0 if record else None,
        keep_empty=record,
    )
    run.requests.rows["arrival_us"] = [r["arrival_us"] + first_begin_us(r, scenario, load) for r in requests]
    if any(load["think_us"]):
        run.requests = run.requests._replace(think_us=np.array(load["think_us"]))
    run.limits = run.limits._replace(
        timeout_us=np.inf if load["timeout_us"] is None else load["timeout_us"], stage_interval_us=load["interval_us"]
    )
    run.drive(None)
    return run


@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_random_loads_equal_the_reference(seeds: range, has_groups: bool) -> None:
    """Also of models whose layers differ in what they read, by turns as each release keeps their KV."""
    for seed in seeds:
        scenario, load = random_load(seed)
        if has_groups:
            scenario = with_groups(scenario, seed, RELEASES[seed % len(RELEASES)].version)
        step_time = vllm_reference.affine_step_time_us(scenario["step_time"])
        descriptions = [dict(r) for r in scenario["requests"]]
        for d in descriptions:
            if d["stage"] == descriptions[0]["stage"]:
                d["arrival_us"] += load["api_us"]
        clock = ClientClock(descriptions, step_time, load)
        expected = vllm_reference.simulate(scenario, step_time, clock)
        run = run_load(scenario, load, record=True)
        assert_same({"steps": timed_steps_of(run), "outcome": outcome_of(scenario, run)}, expected)
        jumped = run_load(scenario, load, record=False)
        assert_same({"steps": [], "outcome": outcome_of(scenario, jumped)}, {**expected, "steps": []})


def serve(n: int, rate: float, clients: Clients | None, **server: int) -> SimulationResult:
    requests = make_requests(np.arange(n) / rate, [[(i, 32)] for i in range(5)], 100)
    return simulate(requests, ServerConfig(kv_blocks=2000, **server), TEN_MS, clients=clients)


def test_what_waits_in_the_client_is_outside_the_latency() -> None:
    """One client, 100 steps of 10 ms each: whatever the rate, each request has the server for itself."""
    result = serve(100, 10.0, Clients(max_in_flight=1), max_num_seqs=4)
    assert np.allclose(result.e2e_us(), 1e6, rtol=1e-12)
    assert result.request_table()["arrival_s"].to_numpy() == pytest.approx(np.arange(100), rel=1e-12)
    assert serve(100, 10.0, None, max_num_seqs=4).e2e_us().mean() > 1e6


def test_enough_clients_change_nothing() -> None:
    few, many = (serve(60, 20.0, clients, max_num_seqs=8) for clients in (None, Clients(max_in_flight=60)))
    assert few.rows["finish_us"].tobytes() == many.rows["finish_us"].tobytes()


@pytest.mark.parametrize("n_clients", [1, 4, 16])
def test_a_closed_loop_keeps_its_clients_busy(n_clients: int) -> None:
    """Little's law: clients x time = sum of latencies and think times, but for the last round of each client."""
    think_s, n = 0.7, 320
    requests = make_requests(np.zeros(n), [[(i, 32)] for i in range(7)], 50 + np.arange(n) % 9)
    result = simulate(
        requests, ServerConfig(kv_blocks=4000), TEN_MS, clients=Clients(max_in_flight=n_clients, think_s=think_s)
    )
    latency_s = result.e2e_us() / 1e6
    busy_s = latency_s.sum() + (n - n_clients) * think_s
    span_s = result.rows["finish_us"].max() / 1e6
    assert n_clients * (span_s - latency_s.max() - think_s) <= busy_s <= n_clients * span_s * (1.0 + 1e-12)
    in_flight = [((result.sent_us <= t) & (result.rows["finish_us"] > t)).sum() for t in result.sent_us]
    assert max(in_flight) == n_clients


def test_a_stage_begins_when_the_one_before_has_ended() -> None:
    stages = [LoadStage(3.0, 20.0), LoadStage(0.5, 20.0)]
    arrival_s, stage = generate_arrivals(stages, "constant")
    requests = make_requests(arrival_s, [[(i, 32)] for i in range(5)], 100, stage=stage)
    server = ServerConfig(kv_blocks=2000, max_num_seqs=1)
    clients = Clients(stage_starts_s=stage_starts(stages), stage_interval_s=600.0)
    result = simulate(requests, server, TEN_MS, clients=clients)
    assert np.allclose(result.e2e_us()[stage == 1], 1e6, rtol=1e-9)
    last_finish_us = result.rows["finish_us"][stage == 0].max()
    assert result.sent_us[stage == 1] == pytest.approx(last_finish_us + 600e6 + np.arange(10) * 2e6, rel=1e-12)
    together = simulate(requests, server, TEN_MS)
    assert together.e2e_us()[stage == 1].mean() > 30e6


def test_an_empty_stage_ends_where_it_begins() -> None:
    requests = make_requests([5.0, 25.0], [[(0, 32)]], 10, stage=[1, 3])
    clients = Clients(stage_starts_s=[0.0, 5.0, 15.0, 25.0], stage_interval_s=2.0)
    result = simulate(requests, ServerConfig(kv_blocks=2000), TEN_MS, clients=clients)
    assert result.sent_us / 1e6 == pytest.approx([2.0, 2.0 + 0.1 + 2 * 2.0])


def test_sessions_do_not_jump_over_their_own_turns() -> None:
    """A turn comes while others decode: it is seen at the next call, however many calls are made at once."""
    requests = make_conversations(
        np.arange(6) * 0.004, 4, system_prompt_len=40, question_len=30, output_len=37, think_s=0.002
    )
    times = [
        simulate(
            requests, ServerConfig(kv_blocks=400), CompiledStepTime(constant_us=500.0, tokens_us=1.0), max_jump=max_jump
        ).rows["finish_us"]
        for max_jump in (None, 1)
    ]
    assert np.allclose(*times, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_in_flight": 0}, "at least 1"),
        ({"max_in_flight": 2, "think_s": -1.0}, "finite, from 0"),
        ({"think_s": 1.0}, "without `max_in_flight`"),
        ({"stage_interval_s": 1.0}, "without `stage_starts_s`"),
        ({"stage_interval_s": np.nan}, "finite, from 0"),
    ],
)
def test_bad_clients_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Clients(**arguments)


@pytest.mark.parametrize(
    ("changes", "clients", "message"),
    [
        ({"follows": [-1, 0]}, {"max_in_flight": 1}, "sessions"),
        ({"abort_s": [1.0, 1.0]}, {"max_in_flight": 1}, "abort times"),
        ({}, {"max_in_flight": 1, "think_s": [1.0, 2.0, 3.0]}, "there are 2 requests"),
        ({"stage": [0, 1]}, {"stage_starts_s": [0.0]}, "has 2 stages"),
        ({"stage": [1, 0]}, {"stage_starts_s": [0.0, 0.0]}, "order of their stages"),
        ({"stage": [0, 1]}, {"stage_starts_s": [0.0, 5.0]}, "before its stage"),
    ],
)
def test_lists_that_clients_cannot_send_are_refused(changes: dict, clients: dict, message: str) -> None:
    requests = make_requests([0.0, 1.0], [[(0, 5)]], 3, **changes)
    with pytest.raises(InputError, match=message):
        simulate(requests, ServerConfig(kv_blocks=20), TEN_MS, clients=Clients(**clients))
