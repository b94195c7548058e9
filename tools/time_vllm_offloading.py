"""Time ``schedule()`` of the real vLLM 0.15.1 on a CPU while KV offloading is on, and count whom the pool rejects.

Same engine loop and stub executor as ``time_vllm_schedule.py``, with vLLM's own ``OffloadingConnector`` (native offloading
to CPU memory) beside the scheduler: its bookkeeping runs, no bytes are copied. Blocks that a request stored cannot be
evicted from the pool before the request ends. Once the requests in flight hold more blocks than the pool has, the others ask
in vain, in every step: a scan of the whole pool and a warning in the log for each of them, inside ``schedule()``.

Each model's GPU blocks are those of the seed study's servers; the pool has 8 GiB. Offloading is off (``none``), as
released (``stock``), or with the blocks of generated tokens stored too (``outputs``). The release leaves those out: under
asynchronous scheduling the hash of a block that is just full is not known yet when its turn comes, and the block is skipped
for good. ``outputs`` waits for the hash instead, which is one line of ``_get_reqs_to_store``. ``smaller`` is the rival to
that: as released, with the pool that puts the jump where the public traces have it if prompts alone are stored.

    vllm-env/bin/python tools/time_vllm_offloading.py --out data/recorded/offload_timing.json

Times are of the machine that the script runs on; the file names it. Log records are formatted and written to nowhere.
"""

import argparse
import gc
import inspect
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"  # the warning of each rejection is part of what is timed

import record_vllm
from record_vllm import VirtualDevice, add_request, make_engine, vllm_version
from time_vllm_schedule import MEASURED_RELEASE, NS_PER_US, QUANTILES, quantile, write_recording
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

BLOCK_SIZE = 16
STUB_BLOCK_BYTES = 512
"""Of the stub model: one layer, one head of eight values, two bytes each, keys and values."""
POOL_GIB, SMALLER_POOL_GIB = 8.0, 5.9
SECONDS = 50.0
RUNNING_BIN = 5
N_TEXTS, N_GROUPS = 100, 10
STEADY_PER_S = (4.0, 4.0)
RAMP_PER_S = (2.0, 28.0)
NONE, STOCK, SMALLER, OUTPUTS = MODES = "none", "stock", "smaller", "outputs"

MODELS = {  # KV bytes of a token over all ranks, GPU blocks, and a rough step time: milliseconds at 0 and at 128 requests
    "llama-2-7b": (524_288, 7_462, (8.0, 43.0)),
    "llama-2-70b": (327_680, 31_356, (17.5, 27.0)),
    "codellama-34b": (196_608, 26_602, (14.5, 25.0)),
    "mixtral-8x7b": (131_072, 27_510, (18.0, 35.0)),
}
WORKLOADS = {"general": (100, 447, 248), "reasoning": (100, 934, 1448)}  # tokens: system prompt, question, output


@dataclass(frozen=True)
class Case:
    """One run: a model's server, a workload that arrives at a rate that changes linearly, and what is offloaded."""

    model: str
    workload: str
    rate_per_s: tuple[float, float]
    offload: str

    @property
    def pool_blocks(self) -> int:
        gib = {NONE: 0.0, SMALLER: SMALLER_POOL_GIB}.get(self.offload, POOL_GIB)
        return int(gib * 2**30 // (BLOCK_SIZE * MODELS[self.model][0]))


class OffloadDevice(VirtualDevice):
    """The virtual device with a transfer engine: a store takes one step, and is reported once its request ended."""

    def _init_executor(self) -> None:
        super()._init_executor()
        self._store_ends: dict[str, list[int]] = defaultdict(list)  # step numbers
        self._ended: set[str] = set()

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        transfers = self._transfers(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens > 0:
            future = super().execute_model(scheduler_output, non_block)
            self.submitted.output.kv_connector_output = transfers
            return future
        future = super().execute_model(scheduler_output, non_block)
        if transfers is not None:
            future._batch.output = ModelRunnerOutput(
                req_ids=[], req_id_to_index={}, sampled_token_ids=[], kv_connector_output=transfers
            )
        return future

    def _transfers(self, scheduler_output: Any) -> KVConnectorOutput | None:
        now, wanted = self._n_submitted, scheduler_output.kv_connector_metadata
        loaded = set(wanted.reqs_to_load) if wanted is not None else set()
        for request in wanted.reqs_to_store if wanted is not None else ():
            self._store_ends[request].append(now + 1)
        self._ended |= {r for r in scheduler_output.finished_req_ids if r in self._store_ends}
        stored = {r for r in self._ended if max(self._store_ends[r]) <= now}
        for request in stored:
            del self._store_ends[request]
        self._ended -= stored
        if not (loaded or stored):
            return None
        return KVConnectorOutput(finished_sending=stored or None, finished_recving=loaded or None)


def store_outputs(wanted: bool) -> None:
    """Let the connector wait for the hash of a full block (`wanted`), or skip it as released."""
    scheduler_side = offloading_connector.OffloadingConnectorScheduler
    if not hasattr(scheduler_side, "released"):
        scheduler_side.released = scheduler_side._get_reqs_to_store
    source = inspect.cleandoc("\n" + inspect.getsource(scheduler_side.released))
    line = "total_tokens = req.num_computed_tokens + new_tokens"
    assert source.count(line) == 1, "another release: look at _get_reqs_to_store again"
    changed: dict[str, Any] = {}
    exec(
        source.replace(line, f"{line}\n        total_tokens = min(total_tokens, req.num_tokens)"),
        vars(offloading_connector),
        changed,
    )
    scheduler_side._get_reqs_to_store = changed["_get_reqs_to_store"] if wanted else scheduler_side.released


def arrivals_s(rate_per_s: tuple[float, float], seconds: float, seed: int = 0) -> list[float]:
    """Poisson arrivals at a rate that changes linearly."""
    rng, expected, times = random.Random(seed), 0.0, []
    start, growth = rate_per_s[0], (rate_per_s[1] - rate_per_s[0]) / seconds
    while True:
        expected += rng.expovariate(1.0)
        t = expected / start if growth == 0 else ((start**2 + 2 * growth * expected) ** 0.5 - start) / growth
        if t >= seconds:
            return times
        times.append(t)


def time_case(case: Case, seconds: float, model_dir: str) -> list[dict[str, float]]:
    """What each call of ``schedule()`` took and found: running requests, GPU blocks in use, requests rejected."""
    _, gpu_blocks, (empty_ms, full_ms) = MODELS[case.model]
    system, question, output = WORKLOADS[case.workload]
    arrivals = arrivals_s(case.rate_per_s, seconds)
    requests = [
        {
            "index": i,
            "prompt_segments": [(1 + i % N_TEXTS // N_GROUPS, system), (1000 + i % N_TEXTS, question)],
            "output_tokens": output,
            "output_content": None,
            "arrival_step": 0,
        }
        for i in range(len(arrivals))
    ]
    config = {
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "num_gpu_blocks": gpu_blocks + 1,  # and the null block
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
        "async_scheduling": True,
    }
    settings = {}
    store_outputs(case.offload == OUTPUTS)
    if case.pool_blocks:
        settings["kv_transfer_config"] = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": case.pool_blocks * STUB_BLOCK_BYTES},
        )
    engine = make_engine(config, model_dir, OffloadDevice, **settings)
    device, scheduler = engine.model_executor, engine.scheduler
    device.requests = {str(r["index"]): r for r in requests}
    device.duration_us = lambda output: 1e3 * (empty_ms + (full_ms - empty_ms) * len(output.num_scheduled_tokens) / 128)
    scans_us: list[float] = []
    if case.pool_blocks:
        manager = scheduler.connector.connector_scheduler.manager
        prepare_store = manager.prepare_store

        def counted_store(hashes: Any) -> Any:
            start = time.perf_counter_ns()
            result = prepare_store(hashes)
            if result is None:
                scans_us.append((time.perf_counter_ns() - start) / NS_PER_US)
            return result

        manager.prepare_store = counted_store
    calls: list[dict[str, float]] = []
    schedule, gpu_pool = scheduler.schedule, scheduler.kv_cache_manager.block_pool

    def timed_schedule() -> Any:
        scans_us.clear()
        start = time.perf_counter_ns()
        result = schedule()
        schedule_us = (time.perf_counter_ns() - start) / NS_PER_US
        calls.append(
            {
                "schedule_us": schedule_us,
                "running": len(scheduler.running),
                "held_blocks": gpu_pool.num_gpu_blocks - 1 - gpu_pool.get_num_free_blocks(),
                "rejected": len(scans_us),
                "scan_us": sum(scans_us),
            }
        )
        return result

    scheduler.schedule = timed_schedule
    n_added = 0
    gc.collect()
    while device.now_us < 1e6 * seconds:
        if not scheduler.has_requests() and not engine.batch_queue:
            if n_added == len(arrivals):
                break
            device.now_us = max(device.now_us, 1e6 * arrivals[n_added]) + 1
        while n_added < len(arrivals) and 1e6 * arrivals[n_added] <= device.now_us:
            add_request(engine, requests[n_added])
            n_added += 1
        engine.step_fn()
    return calls


def summarised(case: Case, calls: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each bin of running requests."""
    bins: dict[int, list[dict[str, float]]] = defaultdict(list)
    for call in calls:
        bins[max(int(call["running"]) - 1, 0) // RUNNING_BIN].append(call)
    rows = []
    for number, own in sorted(bins.items()):
        times = sorted(c["schedule_us"] for c in own)
        n_rejected = sum(c["rejected"] for c in own)
        means = {name: sum(c[name] for c in own) / len(own) for name in ("running", "held_blocks", "rejected")}
        rows.append(
            {
                "model": case.model,
                "workload": case.workload,
                "offload": case.offload,
                "pool_blocks": case.pool_blocks,
                "output_tokens": WORKLOADS[case.workload][2],
                "bin": f"{RUNNING_BIN * number + 1}-{RUNNING_BIN * (number + 1)}",
                "n_calls": len(own),
                **{name: round(value, 2) for name, value in means.items()},
                "scan_us": round(sum(c["scan_us"] for c in own) / n_rejected, 2) if n_rejected else None,
                "mean_us": round(sum(times) / len(times), 2),
                **{f"p{100 * p:.0f}_us": round(quantile(times, p), 2) for p in QUANTILES},
            }
        )
    return rows


def cases() -> list[Case]:
    steady = [Case(m, "reasoning", STEADY_PER_S, o) for m in MODELS for o in MODES]
    ramps = ("llama-2-70b", "codellama-34b")
    return steady + [Case(m, "general", RAMP_PER_S, o) for m in ramps for o in MODES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="virtual seconds of each case")
    given = parser.parse_args()
    if vllm_version != MEASURED_RELEASE:
        print(f"vLLM {vllm_version} is installed; the servers ran {MEASURED_RELEASE}.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as model_dir, Path(os.devnull).open("w") as nowhere:
        for handler in logging.getLogger("vllm").handlers:
            handler.setStream(nowhere)
        (Path(model_dir) / "config.json").write_text(json.dumps(record_vllm.TINY_LLAMA))
        for case in cases():
            started = time.monotonic()
            rows += summarised(case, time_case(case, given.seconds, model_dir))
            last = rows[-1]
            print(
                f"{case.model} {case.workload} {case.offload}: {last['bin']} running, {last['rejected']} rejected, "
                f"schedule {last['p50_us']} µs ({time.monotonic() - started:.0f} s)",
                file=sys.stderr,
            )
    table = {name: [row[name] for row in rows] for name in rows[0]}
    sizes = {"pool_gib": POOL_GIB, "smaller_pool_gib": SMALLER_POOL_GIB}
    write_recording(given.out, "timing", table, seconds=given.seconds, **sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
