"""Speed of the simulator: real experiments, scaling in the number of requests, and the slow reference beside it.

::

    python benchmarks/simulator.py --data shared/data            # the 16 experiments, replayed
    python benchmarks/simulator.py --requests 10000000           # one long run: time and peak memory
    python benchmarks/simulator.py --reference tests/simulator   # against the slow reference

Times are of one process; what numba compiles is cached on disk, and the first run (which may compile) is not counted.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from stepcal.datasets import load_requests
from stepcal.simulator import (
    CompiledStepTime,
    LoadStage,
    RequestList,
    ServerConfig,
    SimulationResult,
    Workload,
    make_requests,
    read_workload,
    replay_requests,
    simulate,
)

# Clients of the real runs gave up after this time.
REAL_TIMEOUT_S = 300.0
# Share of a decode step that grows with the KV tokens, in the step time made up for each experiment.
KV_SHARE = 0.3


def step_time_like(table: pd.DataFrame, output_len: int) -> CompiledStepTime:
    """A step time with which a run resembles the measured one: same pace of tokens, a part of it growing with KV."""
    done = table[~table["has_error"] & (table["e2e_s"] > table["ttft_s"])]
    pace_us = float(((done["e2e_s"] - done["ttft_s"]) / (output_len - 1)).median() * 1e6)
    span_s = (table["arrival_time_us"].max() - table["arrival_time_us"].min()) / 1e6
    in_flight = min(128.0, len(done) / span_s * done["e2e_s"].mean())
    kv_tokens = in_flight * (done["prompt_tokens"].median() + output_len / 2)
    return CompiledStepTime(
        constant_us=pace_us * (1.0 - KV_SHARE) * 0.9,
        requests_us=pace_us * (1.0 - KV_SHARE) * 0.1 / in_flight,
        kv_us=pace_us * KV_SHARE / kv_tokens,
        tokens_us=1.0,
        prefill_pair_us=1e-4,
        waiting_us=2.0,
    )


def load_experiments(data: Path) -> list[tuple[str, RequestList, ServerConfig, CompiledStepTime]]:
    """The real experiments, ready to simulate."""
    requests = load_requests(data)
    servers = pd.read_csv(data / "requests" / "server_settings.csv").set_index("experiment_id")
    experiments = []
    for name, server in servers.iterrows():
        table = requests[requests["experiment_id"] == name].reset_index(drop=True)
        workload = read_workload(data / "experiments" / str(name) / "results" / "config.yaml")
        config = ServerConfig(
            kv_blocks=int(server["kv_blocks_total_gpu"]),
            max_num_seqs=int(server["max_num_seqs"]),
            max_num_batched_tokens=int(server["max_num_batched_tokens"]),
        )
        experiments.append(
            (str(name), replay_requests(table, workload), config, step_time_like(table, workload.output_len))
        )
    return experiments


def time_experiments(data: Path, repeats: int) -> None:
    """Engine and wall time of all experiments, best of `repeats`."""
    experiments = load_experiments(data)
    best: dict[str, SimulationResult] = {}
    for _ in range(repeats + 1):
        for name, requests, server, step_time in experiments:
            result = simulate(requests, server, step_time, timeout_s=REAL_TIMEOUT_S)
            if name not in best or result.engine_s < best[name].engine_s:
                best[name] = result
    print(f"{'experiment':<48}{'requests':>9}{'failed':>8}{'steps':>9}{'preempted':>10}{'engine ms':>11}{'wall ms':>9}")
    for name, result in best.items():
        n, failed = len(result.requests), int((~result.is_finished).sum())
        print(
            f"{name:<48}{n:>9,}{failed:>8,}{result.steps:>9,}{result.preemptions:>10,}"
            f"{result.engine_s * 1e3:>11.2f}{result.wall_s * 1e3:>9.2f}"
        )
    n, steps = sum(len(r.requests) for r in best.values()), sum(r.steps for r in best.values())
    engine_s, wall_s = sum(r.engine_s for r in best.values()), sum(r.wall_s for r in best.values())
    # An event is an arrival, the end of a request, a preemption or a re-admission.
    events = sum(2 * len(r.requests) + 2 * r.preemptions for r in best.values())
    started = time.perf_counter()
    for result in best.values():
        result.summary()
    summaries_s = time.perf_counter() - started
    print(
        f"all: {n:,} requests, {steps:,} steps: engine {engine_s:.3f} s, wall {wall_s:.3f} s "
        f"({engine_s / n * 1e6:.2f} µs a request, {engine_s / events * 1e9:.0f} ns an event, "
        f"{engine_s / steps * 1e9:.0f} ns a step); "
        f"summaries {summaries_s:.3f} s"
    )


def time_scaling(n_requests: int) -> None:
    """One run of many requests, and a tenth of it, to see that the time is linear; peak memory of the process."""
    for n in (n_requests // 10, n_requests):
        workload = Workload(
            n_groups=10,
            n_prompts_per_group=10,
            system_prompt_len=100,
            question_len=466,
            output_len=247,
            stages=(LoadStage(10.0, n / 10.0),),
        )
        requests = workload.requests(seed=1)
        step_time = CompiledStepTime(constant_us=5000.0, requests_us=20.0, kv_us=0.03, tokens_us=1.0)
        result = simulate(requests, ServerConfig(kv_blocks=7463), step_time, timeout_s=REAL_TIMEOUT_S)
        result.summary()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{n:>12,} requests, {result.steps:,} steps: engine {result.engine_s:.2f} s, wall {result.wall_s:.2f} s, "
            f"{result.engine_s / n * 1e6:.2f} µs a request, peak {peak:.2f} GiB"
        )


def time_reference(folder: Path, n_requests: int = 300) -> None:
    """The same scenario on the slow reference and on the engine."""
    sys.path.insert(0, str(folder))
    import vllm_reference

    rng = np.random.Generator(np.random.PCG64(0))
    arrival_us = np.round(np.cumsum(rng.exponential(1e5, n_requests)))
    step_time = {
        "constant_us": 5000.0,
        "per_token_us": 1.0,
        "per_request_us": 20.0,
        "per_kv_token_us": 0.03,
        "per_waiting_us": 2.0,
    }
    prompts = [[(i // 10, 100), (10 + i, 466)] for i in range(100)]
    server = ServerConfig(kv_blocks=7463)
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
                "arrival_us": float(t),
                "prompt_segments": prompts[i % 100],
                "output_tokens": 247,
                "output_content": None,
            }
            for i, t in enumerate(arrival_us)
        ],
    }
    started = time.perf_counter()
    expected = vllm_reference.simulate(scenario, vllm_reference.affine_step_time_us(step_time))
    reference_s = time.perf_counter() - started
    fast = CompiledStepTime(
        constant_us=5000.0, tokens_us=1.0, requests_us=20.0, kv_us=0.03, prefill_kv_us=0.03, waiting_us=2.0
    )
    requests = make_requests(arrival_us / 1e6, prompts, 247)
    results = [simulate(requests, server, fast) for _ in range(5)]
    engine_s = min(r.engine_s for r in results)
    finish = np.array([row["finish_us"] for row in expected["outcome"]])
    difference = float(np.max(np.abs(results[0].rows["finish_us"] / finish - 1.0)))
    print(
        f"{n_requests} requests, {results[0].steps:,} steps: reference {reference_s:.2f} s, "
        f"engine {engine_s * 1e3:.2f} ms, "
        f"{reference_s / engine_s:,.0f} times faster; largest relative difference of finish times {difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with requests/ and experiments/")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, help="requests of the scaling run")
    parser.add_argument("--reference", type=Path, help="folder of the slow reference")
    arguments = parser.parse_args()
    if arguments.data:
        time_experiments(arguments.data, arguments.repeats)
    if arguments.requests:
        time_scaling(arguments.requests)
    if arguments.reference:
        time_reference(arguments.reference)


if __name__ == "__main__":
    main()
