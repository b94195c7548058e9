"""Count what the real vLLM 0.15.1 loads from its pool in CPU memory, and what that changes in virtual time.

Same engine, stub and workload as ``time_vllm_offloading.py``: the overloaded one of the seed study, each model with the GPU
blocks of its server and a pool of 8 GiB. A step takes its time for the requests in it, and more for each prompt token that
is computed; no time of the host is counted, so that what differs between offloading and none is what loads do. A copy takes
one step, which is as fast as it can be. Counted are the tokens that admitted and resumed requests had, those that were
computed in prefill and those loaded from the pool, and the mean latency of the requests that ended.

    vllm-env/bin/python tools/count_vllm_loads.py --out data/recorded/pool_loads.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import record_vllm
import time_vllm_offloading as offloading
from record_vllm import add_request, make_engine, vllm_version
from time_vllm_schedule import MEASURED_RELEASE, write_recording
from vllm.config import KVTransferConfig

SECONDS = 150.0
PREFILL_US = {"llama-2-7b": 16.7, "llama-2-70b": 58.0, "codellama-34b": 48.7, "mixtral-8x7b": 23.3}
"""A prompt token in a large step, by the coefficients `default` on these servers."""


def count_case(case: offloading.Case, seconds: float, model_dir: str) -> dict[str, Any]:
    """One run: tokens needed, found and loaded, and latencies in virtual time."""
    _, gpu_blocks, (empty_ms, full_ms) = offloading.MODELS[case.model]
    system, question, output = offloading.WORKLOADS[case.workload]
    arrivals = offloading.arrivals_s(case.rate_per_s, seconds)
    requests = [
        {
            "index": i,
            "prompt_segments": [
                (1 + i % offloading.N_TEXTS // offloading.N_GROUPS, system),
                (1000 + i % offloading.N_TEXTS, question),
            ],
            "output_tokens": output,
            "output_content": None,
            "arrival_step": 0,
        }
        for i in range(len(arrivals))
    ]
    config = {
        "block_size": offloading.BLOCK_SIZE,
        "enable_prefix_caching": True,
        "num_gpu_blocks": gpu_blocks + 1,  # and the null block
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
        "async_scheduling": True,
    }
    offloading.store_outputs(case.offload == offloading.OUTPUTS)
    settings = {}
    if case.pool_blocks:
        settings["kv_transfer_config"] = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": case.pool_blocks * offloading.STUB_BLOCK_BYTES},
        )
    engine = make_engine(config, model_dir, offloading.OffloadDevice, **settings)
    device, scheduler = engine.model_executor, engine.scheduler
    device.requests = {str(r["index"]): r for r in requests}
    counts = dict.fromkeys(("admissions", "preemptions", "prompt_tokens", "computed_tokens", "loaded_tokens"), 0)

    def duration_us(output: Any) -> float:
        n_running, n_tokens = len(output.num_scheduled_tokens), output.total_num_scheduled_tokens
        step_ms = empty_ms + (full_ms - empty_ms) * n_running / 128
        return 1e3 * step_ms + (n_tokens - n_running) * PREFILL_US[case.model]

    device.duration_us = duration_us
    if case.pool_blocks:
        connector = scheduler.connector
        allocated = connector.update_state_after_alloc

        def counted(request: Any, blocks: Any, n_external: int) -> Any:
            counts["loaded_tokens"] += n_external
            return allocated(request, blocks, n_external)

        connector.update_state_after_alloc = counted
    schedule = scheduler.schedule

    def counted_schedule() -> Any:
        output = schedule()
        admitted = [new.req_id for new in output.scheduled_new_reqs] + list(
            output.scheduled_cached_reqs.resumed_req_ids
        )
        counts["admissions"] += len(output.scheduled_new_reqs)
        counts["preemptions"] += len(output.preempted_req_ids or ())
        counts["prompt_tokens"] += sum(scheduler.requests[r].num_tokens for r in admitted)
        counts["computed_tokens"] += output.total_num_scheduled_tokens - len(output.num_scheduled_tokens)
        return output

    scheduler.schedule = counted_schedule
    n_added, latencies_s = 0, []
    while device.now_us < 1e6 * seconds:
        if not scheduler.has_requests() and not engine.batch_queue:
            if n_added == len(arrivals):
                break
            device.now_us = max(device.now_us, 1e6 * arrivals[n_added]) + 1
        while n_added < len(arrivals) and 1e6 * arrivals[n_added] <= device.now_us:
            add_request(engine, requests[n_added])
            n_added += 1
        outputs, _ = engine.step_fn()
        for group in (outputs or {}).values():
            ended = (int(o.request_id) for o in group.outputs if o.finish_reason is not None)
            latencies_s += [device.now_us / 1e6 - arrivals[i] for i in ended]
    mean = sum(latencies_s) / len(latencies_s) if latencies_s else None
    about = {"model": case.model, "workload": case.workload, "offload": case.offload, "pool_blocks": case.pool_blocks}
    return {**about, **counts, "ended": len(latencies_s), "mean_e2e_s": mean}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="virtual seconds of each case")
    given = parser.parse_args()
    if vllm_version != MEASURED_RELEASE:
        print(f"vLLM {vllm_version} is installed; the servers ran {MEASURED_RELEASE}.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as model_dir:
        (Path(model_dir) / "config.json").write_text(json.dumps(record_vllm.TINY_LLAMA))
        for model in offloading.MODELS:
            for mode in (offloading.NONE, offloading.STOCK, offloading.OUTPUTS):
                case = offloading.Case(model, "reasoning", offloading.STEADY_PER_S, mode)
                rows.append(count_case(case, given.seconds, model_dir))
                print(json.dumps(rows[-1]), file=sys.stderr)
    table = {name: [row[name] for row in rows] for name in rows[0]}
    write_recording(given.out, "loads", table, seconds=given.seconds, pool_gib=offloading.POOL_GIB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
