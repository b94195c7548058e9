"""Plays scenarios of the recording format (tests/conformance) on the simulator."""

import gzip
import json
from pathlib import Path

import numpy as np

from stepcal.simulator import CompiledStepTime, KvGroup, RequestList, ServerConfig, make_requests
from stepcal.simulator import layout as at
from stepcal.simulator.engine import EngineRun

RECORDINGS = Path(__file__).parents[1] / "conformance"

# Contents that nobody names get numbers of their own, far from those of the scenarios.
_UNNAMED = -1


def load_recordings(folder: str) -> list[dict]:
    """All recordings of a folder of tests/conformance, in order of releases and file names."""
    paths = sorted((RECORDINGS / folder).rglob("*.json.gz"))
    return [recording for path in paths for recording in json.loads(gzip.decompress(path.read_bytes()))]


def server_of(config: dict) -> ServerConfig:
    """The server of a scenario."""
    return ServerConfig(
        kv_blocks=config["num_gpu_blocks"],
        max_num_seqs=config["max_num_seqs"],
        max_num_batched_tokens=config["max_num_batched_tokens"],
        max_model_len=config["max_model_len"],
        block_size=config["block_size"],
        enable_prefix_caching=config["enable_prefix_caching"],
        async_scheduling=config["async_scheduling"],
        vllm_version=config.get("vllm_version", "0.15.1"),
        kv_groups=tuple(KvGroup(kind, window) for kind, window in config.get("kv_groups", [["full", 0]])),
        scheduling_policy=config.get("scheduling_policy", "fcfs"),
        enable_chunked_prefill=config.get("enable_chunked_prefill", True),
        long_prefill_token_threshold=config.get("long_prefill_token_threshold", 0),
    )


def requests_of(
    scenario: dict, arrivals: list[float], aborts: list[float | None] | None, stage: list[int] | None = None
) -> RequestList:
    """The request list of a scenario. Arrivals and aborts are in the unit of the run's clock."""
    requests = scenario["requests"]
    contents = [r["output_content"] for r in requests]
    return make_requests(
        arrivals,
        [[(content, tokens) for content, tokens in r["prompt_segments"]] for r in requests],
        [r["output_tokens"] for r in requests],
        prompt=range(len(requests)),
        output_content=[_UNNAMED if c is None else c for c in contents],
        abort_s=None if aborts is None else [np.inf if a is None else a for a in aborts],
        stage=stage,
        index=[r["index"] for r in requests],
        priority=[r.get("priority", 0) for r in requests],
    )


def tell_arrivals(run: EngineRun, requests: list[dict]) -> None:
    """Let the scheduler compare the arrival times that the requests name, where they name any."""
    if run.visits is not None and any("arrival_time" in r for r in requests):
        run.visits = run.visits._replace(told_arrival=np.array([r["arrival_time"] for r in requests], np.float64))


def _steps(run: EngineRun) -> list[dict]:
    rows = run.recorder.rows()
    assert rows is not None
    index = run.request_list.index
    assert index is not None
    blocks_in_use = run.server.usable_blocks - rows.column("kv_blocks_free")
    steps = []
    for call, n_blocks in zip(rows.calls(), blocks_in_use.tolist(), strict=True):
        steps.append(
            {
                "scheduled": [[int(index[i]), n] for i, n in call["scheduled"]],
                "preempted": [int(index[i]) for i in call["preempted"]],
                "blocks_in_use": n_blocks,
                "cached_tokens": [[int(index[i]), n] for i, n in call["cached_tokens"]],
            }
        )
    return steps


def _number(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def play_calls(scenario: dict) -> dict:
    """Play a scenario whose clock is the number of ``schedule()`` calls."""
    requests = scenario["requests"]
    run = EngineRun(
        requests_of(scenario, [r["arrival_step"] for r in requests], [r["abort_step"] for r in requests]),
        server_of(scenario["config"]),
        CompiledStepTime(constant_us=1.0),
        record_steps=1.0,
        count_calls=True,
        keep_empty=True,
    )
    steps = [r.get("abort_before_output_of_step") for r in requests]
    in_flight = np.array([np.inf if step is None else step for step in steps], dtype=np.float64)
    order = np.argsort(in_flight, kind="stable").astype(np.int32)[: int(np.isfinite(in_flight).sum())]
    tell_arrivals(run, requests)
    run.requests = run.requests._replace(output_abort_at=in_flight, output_abort_order=order)
    run.drive(None)
    rows = run.requests.rows
    outcome = [
        {
            "index": r["index"],
            "first_token_step": _number(rows["first_token_us"][i]),
            "finish_step": _number(rows["finish_us"][i]) if rows["status"][i] == at.FINISHED else None,
            "status": at.STATUS_NAMES[rows["status"][i]],
            "preemptions": int(rows["preemptions"][i]),
        }
        for i, r in enumerate(requests)
    ]
    return {"steps": _steps(run), "outcome": outcome}


def step_time_of(scenario: dict) -> CompiledStepTime:
    """The step time of a timed scenario."""
    c = scenario["step_time"]
    return CompiledStepTime(
        constant_us=c["constant_us"],
        tokens_us=c["per_token_us"],
        requests_us=c["per_request_us"],
        kv_us=c["per_kv_token_us"],
        prefill_kv_us=c["per_kv_token_us"],
        waiting_us=c["per_waiting_us"],
    )


def run_timed(scenario: dict, *, record: bool, max_jump: int | None = None, ask: bool = False) -> EngineRun:
    """Run a timed scenario; the steps are recorded one by one, or jumped over."""
    requests = scenario["requests"]
    aborts = [None if r["abort_us"] is None else r["abort_us"] / 1e6 for r in requests]
    step_time = step_time_of(scenario)
    run = EngineRun(
        requests_of(scenario, [r["arrival_us"] / 1e6 for r in requests], aborts),
        server_of(scenario["config"]),
        (lambda batch: step_time(batch)) if ask else step_time,
        record_steps=1.0 if record else None,
        max_jump=max_jump,
        keep_empty=record and not ask,
    )
    tell_arrivals(run, requests)
    # Exactly the scenario's microseconds, without a detour over seconds.
    run.requests.rows["arrival_us"] = [r["arrival_us"] for r in requests]
    run.requests.abort_at[:] = [np.inf if r["abort_us"] is None else r["abort_us"] for r in requests]
    run.drive(None)
    return run


def play_timed(scenario: dict, *, record: bool = True, max_jump: int | None = None, ask: bool = False) -> dict:
    """Play a timed scenario; the steps are those of the recording format, with their times."""
    run = run_timed(scenario, record=record, max_jump=max_jump, ask=ask)
    return {"steps": timed_steps_of(run) if record else [], "outcome": outcome_of(scenario, run)}


def timed_steps_of(run: EngineRun) -> list[dict]:
    """The recorded steps of a run, with their times."""
    recorded = run.recorder.rows()
    assert recorded is not None
    times = recorded.steps[["schedule_us", "start_us", "end_us"]].tolist()
    return [
        {**step, "schedule_us": schedule, "start_us": start, "duration_us": end - start}
        for step, (schedule, start, end) in zip(_steps(run), times, strict=True)
    ]


def outcome_of(scenario: dict, run: EngineRun) -> list[dict]:
    """What became of the requests of a timed scenario."""
    rows = run.requests.rows
    return [
        {
            "index": r["index"],
            "status": at.STATUS_NAMES[rows["status"][i]],
            "preemptions": int(rows["preemptions"][i]),
            **{
                name: None if np.isnan(values[i]) else float(values[i])
                for name, values in (
                    ("first_scheduled_us", rows["first_scheduled_us"]),
                    ("first_token_us", rows["first_token_us"]),
                    ("finish_us", rows["finish_us"]),
                )
            },
        }
        for i, r in enumerate(scenario["requests"])
    ]
