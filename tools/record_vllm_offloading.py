"""Record what a release of vLLM does with KV offloading to CPU memory: what it stores, refuses, releases and loads.

Same engine loop and stub executor as ``record_vllm.py``, with vLLM's own ``OffloadingConnector`` beside the scheduler. Its
bookkeeping runs, no byte is copied: a copy takes a given number of steps and is reported as the release's own worker does
(until 0.19.0 a store with the end of its request, from 0.24.0 on each job when it is done). Five short experiments, each
with and without asynchronous scheduling, answer one question each:

- `stored`: which blocks of a request are in the pool at its end, those of its prompt alone or generated ones too?
- `refused`: a pool that one running request fills; when is another request's store taken?
- `loaded`: a prompt that the GPU has forgotten and the pool has not; how many tokens are loaded, and when do they run?
- `waiting`: the same with a slow copy, while another request runs; who waits for the load?
- `preempted`: what comes back from the pool to a request that was preempted?

    vllm-env/bin/python tools/record_vllm_offloading.py --out tests/conformance

writes ``OUT/offloading/VERSION.json``.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import record_vllm
from record_vllm import VirtualDevice, add_request, make_engine, vllm_version
from vllm.config import KVTransferConfig
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

BLOCK_SIZE = 16
STUB_BLOCK_BYTES = 512
"""Of the stub model: one layer, one head of eight values, two bytes each, keys and values."""
PAGE_BYTES = 4096
"""Newer releases round a block in CPU memory up to a page."""
FILLER = 1000
"""Contents of prompts that only take room start here."""


class CopyingDevice(VirtualDevice):
    """The virtual device with a transfer engine: copies take a number of steps."""

    store_steps = load_steps = 1

    def _init_executor(self) -> None:
        super()._init_executor()
        self._stores: dict[str, int] = {}  # until 0.19.0 by request: the step in which the last store ends
        self._loads: dict[str, int] = {}
        self._jobs: dict[int, tuple[int, str | None]] = {}  # from 0.24.0 on: its last step, and the request of a load
        self._ended: set[str] = set()

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        transfers = self._transfers(scheduler_output)
        future = super().execute_model(scheduler_output, non_block)
        if scheduler_output.total_num_scheduled_tokens > 0:
            self.submitted.output.kv_connector_output = transfers
        elif transfers is not None:
            future._batch.output = ModelRunnerOutput(
                req_ids=[], req_id_to_index={}, sampled_token_ids=[], kv_connector_output=transfers
            )
        return future

    def _transfers(self, scheduler_output: Any) -> KVConnectorOutput | None:
        """What the worker reports with this step's output. A store begins one step after it was asked for."""
        now, wanted = self._n_submitted, scheduler_output.kv_connector_metadata
        if wanted is None:
            return None
        if hasattr(wanted, "store_jobs"):
            return self._jobs_done(now, wanted)
        for request in wanted.reqs_to_load:
            self._loads[request] = now + self.load_steps - 1
        for request in wanted.reqs_to_store:
            self._stores[request] = now + self.store_steps
        for request in scheduler_output.preempted_req_ids or ():
            self._stores.pop(request, None)  # the worker waits for these, and the connector has forgotten them
        self._ended |= {r for r in scheduler_output.finished_req_ids if r in self._stores}
        sent = {r for r in self._ended if self._stores[r] <= now}
        received = {r for r, end in self._loads.items() if end <= now}
        for request in sent:
            del self._stores[request]
        self._ended -= sent
        for request in received:
            del self._loads[request]
        return KVConnectorOutput(finished_sending=sent or None, finished_recving=received or None)

    def _jobs_done(self, now: int, wanted: Any) -> KVConnectorOutput:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

        for job, entry in wanted.load_jobs.items():
            is_sync = getattr(entry, "sync", False)
            self._jobs[job] = (now if is_sync else now + self.load_steps - 1, None if is_sync else entry.req_id)
        for job in wanted.store_jobs:
            self._jobs[job] = (now + self.store_steps, None)
        flushed = set(wanted.jobs_to_flush or ())
        done = {job: request for job, (end, request) in self._jobs.items() if end <= now or job in flushed}
        for job in done:
            del self._jobs[job]
        meta = OffloadingWorkerMetadata(completed_jobs=dict.fromkeys(done, 1))
        received = {request for request in done.values() if request is not None}
        return KVConnectorOutput(finished_recving=received or None, kv_connector_worker_meta=meta)


class Watch:
    """What the connector's calls say: blocks taken and refused by `schedule()` call, and tokens found in the pool."""

    def __init__(self, engine: Any) -> None:
        self.n_calls = 0
        self.stored: dict[int, int] = defaultdict(int)
        self.refused: list[int] = []
        self.found: list[list[int]] = []
        connector = engine.scheduler.connector
        self.manager = connector.connector_scheduler.manager
        prepare_store, matched = self.manager.prepare_store, connector.get_num_new_matched_tokens

        def watched_store(*arguments: Any, **options: Any) -> Any:
            result = prepare_store(*arguments, **options)
            if result is None:
                self.refused.append(self.n_calls)
            else:
                keys = getattr(result, "block_hashes_to_store", None)
                new = len(result.keys_to_store if keys is None else keys)
                if new:
                    self.stored[self.n_calls] += new
            return result

        def watched_match(request: Any, n_computed: int) -> Any:
            n_tokens, is_asynchronous = matched(request, n_computed)
            if n_tokens != 0:
                self.found.append([self.n_calls, int(request.request_id), n_computed, n_tokens, is_asynchronous])
            return n_tokens, is_asynchronous

        self.manager.prepare_store, connector.get_num_new_matched_tokens = watched_store, watched_match


def offloading_engine(config: dict, model_dir: str, pool_blocks: int) -> Any:
    """The engine with a pool of a number of blocks, whatever this release rounds a block up to."""
    for block_bytes in (STUB_BLOCK_BYTES, PAGE_BYTES):
        transfer = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": pool_blocks * block_bytes},
        )
        engine = make_engine(config, model_dir, CopyingDevice, kv_transfer_config=transfer)
        manager = engine.scheduler.connector.connector_scheduler.manager
        pool = manager.backend if hasattr(manager, "backend") else manager
        found = next(
            getattr(pool, name) for name in ("num_blocks", "_num_blocks", "_num_chunks") if hasattr(pool, name)
        )
        if found == pool_blocks:
            return engine
    raise AssertionError(f"the pool has {found} blocks, not {pool_blocks}: look at CPUOffloadingSpec again")


def play(
    requests: list[dict],
    *,
    pool_blocks: int,
    gpu_blocks: int,
    is_async: bool,
    model_dir: str,
    store_steps: int = 1,
    load_steps: int = 1,
) -> dict:
    """Serve requests that are added before a `schedule()` call each; the call numbers of what happened."""
    CopyingDevice.store_steps, CopyingDevice.load_steps = store_steps, load_steps
    config = {
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": True,
        "num_gpu_blocks": gpu_blocks + 1,  # and the null block
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
        "async_scheduling": is_async,
    }
    engine = offloading_engine(config, model_dir, pool_blocks)
    device, scheduler, watch = engine.model_executor, engine.scheduler, Watch(engine)
    device.requests = {str(r["index"]): r for r in requests}
    schedule, calls = scheduler.schedule, []

    def watched_schedule(*arguments: Any) -> Any:
        watch.n_calls = len(calls)
        output = schedule(*arguments)
        waits = [r for r in scheduler.requests.values() if "REMOTE" in str(r.status)]
        calls.append(
            {
                "scheduled": [[int(i), n] for i, n in output.num_scheduled_tokens.items()],
                "preempted": sorted(int(i) for i in output.preempted_req_ids or ()),
                "waiting_for_load": sorted(int(r.request_id) for r in waits),
            }
        )
        return output

    scheduler.schedule = watched_schedule
    pending = sorted(requests, key=lambda r: r["arrival_step"])
    while pending or scheduler.has_requests() or engine.batch_queue:
        while pending and (pending[0]["arrival_step"] <= len(calls) or not scheduler.has_requests()):
            add_request(engine, pending.pop(0))
        engine.step_fn()
        assert len(calls) < 1000, "the engine schedules without end"
    for _ in range(5):  # what is reported with empty steps
        engine.step_fn()
    return {
        "calls": calls,
        "stored": dict(watch.stored),
        "refused": watch.refused,
        "found": watch.found,
    }


def request(index: int, content: int, prompt: int, output: int, call: int = 0) -> dict:
    """A request whose prompt is the beginning of a content."""
    return {
        "index": index,
        "prompt_segments": [(content, prompt)],
        "output_tokens": output,
        "output_content": None,
        "arrival_step": call,
    }


def experiments(is_async: bool, model_dir: str) -> dict[str, Any]:
    """The five experiments, summed up."""
    fixed = {"is_async": is_async, "model_dir": model_dir}
    one = play([request(0, 1, 64, 48)], pool_blocks=64, gpu_blocks=64, **fixed)
    long = [request(0, 1, 128, 64), request(1, 2, 32, 100, call=10)]
    refused = play(long, pool_blocks=8, gpu_blocks=64, **fixed)
    slow = play(long, pool_blocks=8, gpu_blocks=64, store_steps=20, **fixed)
    again = [request(0, 1, 64, 2), request(1, FILLER, 192, 2, call=10), request(2, 1, 64, 4, call=20)]
    loaded = play(again, pool_blocks=64, gpu_blocks=13, **fixed)
    beside = [*again, request(3, FILLER + 1, 16, 30, call=18)]
    waiting = play(beside, pool_blocks=64, gpu_blocks=16, load_steps=5, **fixed)
    tight = [request(0, 1, 64, 100), request(1, 2, 64, 100, call=1)]
    preempted = play(tight, pool_blocks=64, gpu_blocks=14, **fixed)
    return {
        "stored": {"prompt_blocks": 4, "full_blocks": (64 + 48 - 1) // BLOCK_SIZE, "blocks_by_call": one["stored"]},
        "refused": {"first_ends": last_call(refused, 0), **stores_of(refused)},
        "refused_slow": {"first_ends": last_call(slow, 0), **stores_of(slow)},
        "loaded": {"found": loaded["found"][-1:], "of_request": calls_of(loaded, 2)},
        "waiting": {"found": waiting["found"][-1:], "of_request": calls_of(waiting, 2), "beside": calls_of(waiting, 3)},
        "preempted": {
            "preempted_in": [i for i, call in enumerate(preempted["calls"]) if call["preempted"]],
            "found": preempted["found"][-1:],
            "blocks_by_call": preempted["stored"],
        },
    }


def stores_of(result: dict) -> dict[str, Any]:
    """Blocks taken by call, and the first call, the last one and the number of refusals."""
    refused = result["refused"]
    return {
        "blocks_by_call": result["stored"],
        "refusals": len(refused),
        "first_refused": refused[0] if refused else None,
        "last_refused": refused[-1] if refused else None,
    }


def calls_of(result: dict, index: int) -> list[list]:
    """Calls in which a request was scheduled (how many tokens) or waited for a load (`load`)."""
    rows = []
    for i, call in enumerate(result["calls"]):
        tokens = dict(map(tuple, call["scheduled"])).get(index)
        if tokens is not None:
            rows.append([i, tokens])
        elif index in call["waiting_for_load"]:
            rows.append([i, "load"])
    return rows


def last_call(result: dict, index: int) -> int:
    """The last call that scheduled a request."""
    return max(i for i, call in enumerate(result["calls"]) if index in dict(map(tuple, call["scheduled"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="writes OUT/offloading/VERSION.json")
    out = parser.parse_args().out / "offloading" / f"{vllm_version}.json"
    record_vllm.accept_few_blocks()
    with tempfile.TemporaryDirectory() as model_dir:
        (Path(model_dir) / "config.json").write_text(json.dumps(record_vllm.TINY_LLAMA))
        record = {
            "vllm_version": vllm_version,
            "sync": experiments(False, model_dir),
            "async": experiments(True, model_dir),
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        kind: ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in record[kind].items())
        for kind in ("sync", "async")
    }
    tables = ",\n".join(f' "{kind}": {{\n{text}\n }}' for kind, text in rows.items())
    out.write_text(f'{{\n "vllm_version": "{vllm_version}",\n{tables}\n}}\n', encoding="utf-8")
    print(f"{out}: {out.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
