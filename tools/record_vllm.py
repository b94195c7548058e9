"""Record what the real vLLM scheduler does, step by step, on a CPU.

vLLM's own engine loop (``EngineCore.step`` and, with asynchronous scheduling, ``EngineCore.step_with_batch_queue``)
runs unchanged; only the executor is a stub: it has no GPU and no weights, "samples" a prescribed token for every
request, and keeps a virtual clock. What is recorded is therefore vLLM's own order of adding, scheduling, processing
and aborting, not our idea of it.

The recordings are the ground truth of the simulator's conformance tests. ``tests/conformance/README.md`` describes
the format and the order of events. To make the environment (2.1 to 2.6 GB, Python 3.11, any CPU build of torch)::

    python -m venv vllm-env
    vllm-env/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    vllm-env/bin/pip install --no-deps -r tools/record_vllm_requirements/0.33.0.txt
    vllm-env/bin/python tools/record_vllm.py --out tests/conformance

The script serves all recorded releases; the same one writes the same bytes. With ``--check N`` it records nothing, but
compares the slow reference with the real scheduler on N random scenarios, and exits with status 1 if any differs.
"""

import argparse
import contextlib
import gzip
import importlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "simulator"), str(TESTS / "conformance")]

import scenarios  # noqa: E402
import torch  # noqa: E402
import vllm_reference  # noqa: E402
from random_scenarios import random_scenario, random_timed_scenario, with_groups, with_policies  # noqa: E402
from vllm import __version__ as vllm_version  # noqa: E402
from vllm.config import (  # noqa: E402
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402
from vllm.v1.engine import EngineCoreRequest  # noqa: E402
from vllm.v1.engine.core import EngineCore  # noqa: E402
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput  # noqa: E402

# Scenarios to record, of each kind, of models whose layers differ in what they read.
N_RANDOM_GROUPS = 60
# The same with priorities and thresholds.
N_RANDOM_POLICIES = 60
# Of scenarios with few requests only, so that the recordings stay small.
MOST_REQUESTS_WITH_GROUPS = 8
MOST_REQUESTS_WITH_POLICIES = 12

# A step longer than any scenario means that the engine spins without progress.
MAX_STEPS = 20_000

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "float16",
}


def token_id(content: int, offset: int) -> int:
    """The token at an offset of a content. The scheduler takes any integer; only equality matters."""
    return content * (1 << 20) + offset


def of_this_version(scenario: dict) -> dict:
    """The scenario for the installed release."""
    return {**scenario, "config": {**scenario["config"], "vllm_version": vllm_version}}


def n_known_outputs(new: Any) -> int:
    """Output tokens of a request that is admitted: none, or, where newer releases list resumed ones too, its outputs."""
    known = getattr(new, "prefill_token_ids", None)
    return 0 if known is None else len(known) - len(new.prompt_token_ids)


def output_content(request: dict) -> int:
    """The content that a request generates; one of its own where the scenario prescribes none."""
    if request["output_content"] is not None:
        return request["output_content"]
    return (1 << 30) + request["index"]


class DeviceFuture(Future):
    """The result of a batch that the virtual device is still computing; waiting for it moves the clock."""

    def __init__(self, device: "VirtualDevice", batch: "DeviceBatch"):
        super().__init__()
        self._device = device
        self._batch = batch

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        if not self.done():
            self.set_result(self._device.finish(self._batch))
        return super().result(timeout)


class DeviceBatch:
    """One scheduled batch on the virtual device."""

    def __init__(self, step: int, output: ModelRunnerOutput, end_us: float):
        self.step = step
        self.output = output
        self.end_us = end_us


def layer_specs(kv_groups: list) -> dict[str, Any]:
    """A layer for each group ``[kind, window]``; vLLM puts layers of one kind and window in groups of one layer each."""
    specs: dict[str, Any] = {}
    sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float16}
    for i, (kind, window) in enumerate(kv_groups):
        if kind == "full":
            specs[f"layer.{i}"] = FullAttentionSpec(**sizes)
        elif kind == "sliding":
            specs[f"layer.{i}"] = SlidingWindowSpec(**sizes, sliding_window=window)
        else:
            specs[f"layer.{i}"] = ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=window)
    return specs


def random_groups(kind: Callable[[int], dict]) -> dict[str, list[dict]]:
    """The random scenarios to record on models whose layers differ in what they read."""
    small = (seed for seed in itertools.count() if len(kind(seed)["requests"]) <= MOST_REQUESTS_WITH_GROUPS)
    return {
        "random_groups": [
            with_groups(kind(seed), seed, vllm_version) for seed in itertools.islice(small, N_RANDOM_GROUPS)
        ]
    }


def random_policies(kind: Callable[[int], dict]) -> dict[str, list[dict]]:
    """The random scenarios to record with priorities and with a threshold for long prefills, those that end."""

    def made() -> Iterator[dict]:
        for seed in itertools.count():
            scenario = with_policies(kind(seed), seed)
            if len(scenario["requests"]) > MOST_REQUESTS_WITH_POLICIES:
                continue
            step_time = scenario.get("step_time")
            step_time_us = None if step_time is None else vllm_reference.affine_step_time_us(step_time)
            with contextlib.suppress(vllm_reference.EndlessError):
                vllm_reference.simulate(of_this_version(scenario), step_time_us)
                yield scenario

    return {"random_policies": list(itertools.islice(made(), N_RANDOM_POLICIES))}


def groups_of(engine: EngineCore) -> list[list]:
    """The groups that vLLM made of the layers, as ``[kind, window]``, in its order."""
    groups = []
    for group in engine.scheduler.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, SlidingWindowSpec):
            groups.append(["sliding", spec.sliding_window])
        elif isinstance(spec, ChunkedLocalAttentionSpec):
            groups.append(["chunked", spec.attention_chunk_size])
        else:
            groups.append(["full", 0])
    return groups


class VirtualDevice(Executor):
    """An executor without a device: prescribed tokens, a virtual clock, one batch at a time."""

    kv_groups: list = [["full", 0]]  # noqa: RUF012  set before an engine is made

    def _init_executor(self) -> None:
        self.now_us = 0.0
        self.free_at_us = 0.0
        self.last_finished_step = -1
        self.requests: dict[str, dict] = {}
        self.submitted: DeviceBatch | None = None
        self.duration_us: Callable[[SchedulerOutput], float] = lambda _: 1.0
        # Called with the step number when a batch ends, before vLLM sees its output.
        self.on_finish: Callable[[int], None] = lambda _: None
        # Called with the step number, start and duration when a batch is submitted.
        self.on_start: Callable[[int, float, float], None] = lambda *_: None
        self._n_submitted = 0

    @property
    def max_concurrent_batches(self) -> int:
        # As in vLLM's UniProcExecutor and MultiprocExecutor without pipeline parallelism.
        return 2 if self.scheduler_config.async_scheduling else 1

    def get_kv_cache_specs(self) -> list[dict]:
        return [layer_specs(self.kv_groups)]

    def determine_available_memory(self) -> list[int]:
        return [1 << 40]  # never the limit: num_gpu_blocks_override is

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBNHC", "LBHNC", "BLNHC", "BLHNC"]]

    def set_kv_cache_layout(self, *arguments: Any) -> None: ...

    def compile_or_warm_up_model(self) -> None: ...

    def initialize_from_config(self, kv_cache_configs: list) -> None: ...

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None, non_block=False) -> list[None]:
        return [None]

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_health(self) -> None: ...

    def shutdown(self) -> None: ...

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        step = self._n_submitted
        self._n_submitted += 1
        if scheduler_output.total_num_scheduled_tokens == 0:
            # Like vLLM's model runner: an empty batch comes back at once, or right after the batch before it.
            start_us = max(self.now_us, self.free_at_us)
            self.on_start(step, start_us, 0.0)
            batch = DeviceBatch(step, EMPTY_MODEL_RUNNER_OUTPUT, start_us)
            return DeviceFuture(self, batch)
        start_us = max(self.now_us, self.free_at_us)
        duration_us = self.duration_us(scheduler_output)
        self.free_at_us = start_us + duration_us
        self.on_start(step, start_us, duration_us)
        self.submitted = DeviceBatch(step, self._sample(scheduler_output), self.free_at_us)
        future: Future = Future()
        future.set_result(None)  # None: "ask sample_tokens", as vLLM's model runner answers
        return future

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        batch, self.submitted = self.submitted, None
        return DeviceFuture(self, batch) if non_block else self.finish(batch)

    def finish(self, batch: DeviceBatch) -> ModelRunnerOutput:
        self.now_us = max(self.now_us, batch.end_us)
        self.last_finished_step = batch.step
        self.on_finish(batch.step)
        return batch.output

    def _sample(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """A token for every request whose last known token is in this batch, as vLLM's model runner does."""
        computed: dict[str, int] = {}
        known_output: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id], known_output[new.req_id] = new.num_computed_tokens, n_known_outputs(new)
        cached = scheduler_output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            # num_output_tokens counts the tokens still in flight (vLLM's placeholders) too.
            computed[req_id], known_output[req_id] = cached.num_computed_tokens[i], cached.num_output_tokens[i]
        req_ids = list(scheduler_output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for req_id in req_ids:
            request = self.requests[req_id]
            known = vllm_reference.num_tokens(request["prompt_segments"]) + known_output[req_id]
            last = computed[req_id] + scheduler_output.num_scheduled_tokens[req_id]
            is_complete = last == known
            sampled.append([token_id(output_content(request), known_output[req_id])] if is_complete else [])
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
        )


def accept_few_blocks() -> None:
    """Let an engine start whose blocks do not hold `max_model_len` tokens, as 0.15.1 does; no decision depends on it."""
    for name in ("kv_cache_planning", "kv_cache_utils"):
        try:
            module = importlib.import_module(f"vllm.v1.core.{name}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, "_check_enough_kv_cache_memory"):
            module._check_enough_kv_cache_memory = lambda *_, **__: None


def make_engine(
    config: dict, model_dir: str, device_class: type[VirtualDevice] = VirtualDevice, **settings: Any
) -> EngineCore:
    """VLLM's EngineCore for a scenario's configuration, on the virtual device; `settings` go to `VllmConfig`."""
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=model_dir,
            skip_tokenizer_init=True,
            dtype="float16",
            max_model_len=config["max_model_len"],
            generation_config="vllm",
            enforce_eager=True,
        ),
        cache_config=CacheConfig(
            block_size=config["block_size"],
            enable_prefix_caching=config["enable_prefix_caching"],
            num_gpu_blocks_override=config["num_gpu_blocks"],
        ),
        parallel_config=ParallelConfig(distributed_executor_backend="uni"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            max_model_len=config["max_model_len"],
            is_encoder_decoder=False,
            enable_chunked_prefill=config.get("enable_chunked_prefill", True),
            async_scheduling=config["async_scheduling"],
            policy=config.get("scheduling_policy", "fcfs"),
            long_prefill_token_threshold=config.get("long_prefill_token_threshold", 0),
        ),
        device_config=DeviceConfig(device="cpu"),
        **settings,
    )
    if "kv_groups" in config:  # a CPU has no hybrid KV cache of its own; what is recorded is a GPU's
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = False
    device_class.kv_groups = config.get("kv_groups", [["full", 0]])
    engine = EngineCore(vllm_config, device_class, log_stats=False)
    assert groups_of(engine) == device_class.kv_groups, groups_of(engine)
    assert engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == config["num_gpu_blocks"]
    return engine


def add_request(engine: EngineCore, request: dict) -> None:
    """Hand a request of a scenario to the engine."""
    prompt = [token_id(content, i) for content, n in request["prompt_segments"] for i in range(n)]
    fields = {
        "request_id": str(request["index"]),
        "prompt_token_ids": prompt,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=request["output_tokens"], ignore_eos=True, temperature=0.0),
        "pooling_params": None,
        "eos_token_id": None,
        "arrival_time": vllm_reference.arrival_time(request),
        "priority": request.get("priority", 0),
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    known = EngineCoreRequest.__struct_fields__  # `eos_token_id` has gone in newer releases
    message = EngineCoreRequest(**{name: value for name, value in fields.items() if name in known})
    engine.add_request(*engine.preprocess_add_request(message))


class Player:
    """Plays one scenario on the real engine and writes down what it does."""

    def __init__(self, scenario: dict, model_dir: str):
        self.engine = make_engine(scenario["config"], model_dir)
        self.device: VirtualDevice = self.engine.model_executor
        self.scheduler = self.engine.scheduler
        self.requests = scenario["requests"]
        self.device.requests = {str(r["index"]): r for r in self.requests}
        self.steps: list[dict] = []
        self.outcome = {
            r["index"]: {
                "index": r["index"],
                "first_token_step": None,
                "finish_step": None,
                "status": None,
                "preemptions": 0,
            }
            for r in self.requests
        }
        self._preempted: list[int] = []
        self._instrument()

    def _instrument(self) -> None:
        """Observe ``schedule()`` and ``_preempt_request()``: the output names the preempted only as a set."""
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def observed_preempt(request: Any, timestamp: float, **options: Any) -> None:
            self._preempted.append(int(request.request_id))
            preempt(request, timestamp, **options)

        def observed_schedule(*arguments: Any) -> SchedulerOutput:
            self._preempted = []
            output = schedule(*arguments)
            self._record(output)
            return output

        self.scheduler.schedule, self.scheduler._preempt_request = observed_schedule, observed_preempt

    def _record(self, output: SchedulerOutput) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        hits = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for req_id, n_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id in cached.resumed_req_ids:
                hits[req_id] = n_computed
        assert {int(i) for i in output.preempted_req_ids or ()} == set(self._preempted)
        for index in self._preempted:
            self.outcome[index]["preemptions"] += 1
        self.steps.append(
            {
                "scheduled": [[int(req_id), n] for req_id, n in output.num_scheduled_tokens.items()],
                "preempted": self._preempted,
                "blocks_in_use": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                "cached_tokens": [[int(i), hits[i]] for i in output.num_scheduled_tokens if i in hits],
            }
        )
        if len(self.steps) >= MAX_STEPS:
            raise vllm_reference.EndlessError("the engine schedules without end")

    def is_idle(self) -> bool:
        """The condition under which vLLM's own loop blocks on its input queue."""
        return not self.scheduler.has_requests() and not self.engine.batch_queue

    def add(self, request: dict) -> None:
        add_request(self.engine, request)

    def is_alive(self, index: int) -> bool:
        return str(index) in self.scheduler.requests

    def abort(self, index: int, *, in_flight: bool) -> bool:
        """Abort as vLLM does: through the queue that is drained before an output, or between two steps."""
        if not self.is_alive(index):
            return False
        if in_flight:
            # One message at a time: vLLM merges waiting messages into a set of strings, whose order is arbitrary.
            self.engine.aborts_queue.put_nowait([str(index)])
            self.engine._process_aborts_queue()
        else:
            self.engine.abort_requests([str(index)])
        self.outcome[index]["status"] = "aborted"
        return True

    def step(self) -> list[tuple[int, bool]]:
        """Call the engine's own step function; returns who got a token, and whether it was the last one."""
        outputs, _ = self.engine.step_fn()
        emitted: list[tuple[int, bool]] = []
        for client_outputs in (outputs or {}).values():
            for output in client_outputs.outputs:
                index, outcome = int(output.request_id), self.outcome[int(output.request_id)]
                assert len(output.new_token_ids) == 1
                if outcome["first_token_step"] is None:
                    outcome["first_token_step"] = self.device.last_finished_step
                if output.finish_reason is not None:
                    outcome["finish_step"], outcome["status"] = self.device.last_finished_step, "finished"
                emitted.append((index, output.finish_reason is not None))
        return emitted


def play(scenario: dict, model_dir: str) -> dict:
    """Play a scenario whose arrivals and aborts are numbered by ``schedule()`` calls.

    Where the engine is idle, the next arrivals are pulled to the current step, and the recording says so: its
    ``arrival_step`` is the number of the call before which the request was really added.
    """
    requests = [dict(r) for r in scenario["requests"]]
    player = Player({**scenario, "requests": requests}, model_dir)
    pending = list(requests)

    schedule_us: list[float] = []
    finish_us: list[float] = []  # outputs are processed in the order of the steps

    def abort_in_flight(step: int) -> None:
        finish_us.append(player.device.now_us)
        for request in requests:
            if request.get("abort_before_output_of_step") == step:
                player.abort(request["index"], in_flight=True)

    player.device.on_finish = abort_in_flight
    player.device.on_start = lambda *_: schedule_us.append(player.device.now_us)
    while True:
        n = len(player.steps)
        if player.is_idle():
            if not pending:
                break
            player.device.now_us += 1.0  # an arrival at an idle engine comes some time after its last step
            earliest = min(r["arrival_step"] for r in pending)
            for request in pending:
                if request["arrival_step"] == earliest:
                    request["arrival_step"] = n
        for request in [r for r in pending if r["arrival_step"] <= n]:
            player.add(request)
            pending.remove(request)
        for request in requests:
            if request["abort_step"] == n:
                player.abort(request["index"], in_flight=False)
        player.step()
    recording = {
        "name": scenario["name"],
        "driver": "EngineCore",
        "config": scenario["config"],
        "requests": requests,
        "steps": player.steps,
        "outcome": list(player.outcome.values()),
    }
    recording["clock"] = clock_times(recording, schedule_us, finish_us)
    return recording


def clock_times(recording: dict, schedule_us: list[float], finish_us: list[float]) -> dict | None:
    """Arrival and abort times with which a simulator that knows only a clock makes the same run, or None.

    Every step with something in it lasts 1 µs, an empty one nothing. Some step numbers are no times: with asynchronous
    scheduling two calls can follow each other at one instant, and an abort between an output and the next call comes,
    for a clock, before that output. Whether the times do it is tried on the reference.
    """

    def at(times: list[float], step: int | None) -> float | None:
        return None if step is None or step >= len(times) else times[step]

    requests = recording["requests"]
    arrival_us = [at(schedule_us, r["arrival_step"]) for r in requests]
    abort_us = [
        at(schedule_us, r["abort_step"])
        if r["abort_step"] is not None
        else at(finish_us, r.get("abort_before_output_of_step"))
        for r in requests
    ]
    timed_requests = [
        {**r, "arrival_us": arrival, "abort_us": abort}
        for r, arrival, abort in zip(requests, arrival_us, abort_us, strict=True)
    ]
    run = vllm_reference.simulate({**recording, "requests": timed_requests}, step_time_us=lambda _: 1.0)
    keys = ("scheduled", "preempted", "blocks_in_use", "cached_tokens")
    is_same_run = [{key: step[key] for key in keys} for step in run["steps"]] == recording["steps"] and [
        {key: o[key] for key in recording["outcome"][0]} for o in run["outcome"]
    ] == recording["outcome"]
    return {"step_us": 1.0, "arrival_us": arrival_us, "abort_us": abort_us} if is_same_run else None


def play_timed(scenario: dict, model_dir: str) -> dict:
    """Play a scenario whose arrivals and aborts are times, with an affine step time on the virtual device's clock."""
    requests = scenario["requests"]
    player = Player(scenario, model_dir)
    device = player.device
    pending = list(requests)
    first_scheduled_us: dict[int, float] = {}
    first_token_us: dict[int, float] = {}
    finish_us: dict[int, float] = {}

    def duration_us(output: SchedulerOutput) -> float:
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        batch = vllm_reference.Batch(
            scheduled=[(int(i), n, computed[i]) for i, n in output.num_scheduled_tokens.items()],
            n_waiting=len(player.scheduler.waiting),
            n_running=len(player.scheduler.running),
        )
        return vllm_reference.affine_step_time_us(scenario["step_time"])(batch)

    def on_start(step: int, start_us: float, duration_us: float) -> None:
        player.steps[step].update(schedule_us=device.now_us, start_us=start_us, duration_us=duration_us)
        for index, _ in player.steps[step]["scheduled"]:
            first_scheduled_us.setdefault(index, start_us)

    def abort_due(*, in_flight: bool) -> None:
        due = [r for r in requests if r["abort_us"] is not None and r["abort_us"] <= device.now_us]
        for request in sorted(due, key=lambda r: (r["abort_us"], r["index"])):
            if player.abort(request["index"], in_flight=in_flight):
                finish_us[request["index"]] = device.now_us

    device.duration_us = duration_us
    device.on_start = on_start
    device.on_finish = lambda _: abort_due(in_flight=True)
    while True:
        if player.is_idle():
            if not pending:
                break
            device.now_us = max(device.now_us, pending[0]["arrival_us"])
        while pending and pending[0]["arrival_us"] <= device.now_us:
            player.add(pending.pop(0))
        abort_due(in_flight=False)
        for index, is_last in player.step():
            first_token_us.setdefault(index, device.now_us)
            if is_last:
                finish_us[index] = device.now_us
    outcome = [
        {
            **o,
            "first_scheduled_us": first_scheduled_us.get(o["index"]),
            "first_token_us": first_token_us.get(o["index"]),
            "finish_us": finish_us.get(o["index"]),
        }
        for o in player.outcome.values()
    ]
    return {**scenario, "driver": "EngineCore", "steps": player.steps, "outcome": outcome}


def write_recordings(path: Path, recordings: list[dict]) -> int:
    """Write a group of recordings so that the same recordings give the same bytes; returns the size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recordings, separators=(",", ":"))
    # No file name and no time in the gzip header.
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path.stat().st_size


def first_difference(expected: dict, actual: dict) -> str | None:
    """The first step or outcome in which two results differ, or None."""
    for kind in ("steps", "outcome"):
        for i, (a, b) in enumerate(zip(expected[kind], actual[kind], strict=False)):
            if a != b:
                return f"{kind}[{i}]\n  vLLM      {a}\n  reference {b}"
        if len(expected[kind]) != len(actual[kind]):
            return f"{len(expected[kind])} {kind} in vLLM, {len(actual[kind])} in the reference"
    return None


KINDS: dict[str, Callable[[dict, int], dict]] = {
    "plain": lambda scenario, _: scenario,
    "policies": with_policies,
    "groups": lambda scenario, seed: with_groups(scenario, seed, vllm_version),
    "groups-and-policies": lambda scenario, seed: with_groups(with_policies(scenario, seed), seed, vllm_version),
}
"""What `--check` makes of a random scenario."""


def random_plays(seed: int, kinds: list[str], model_dir: str) -> Iterator[tuple[dict, dict]]:
    """Random scenarios as the real scheduler plays them, and as the reference does."""
    for kind in kinds:
        for player, scenario in ((play, random_scenario(seed)), (play_timed, random_timed_scenario(seed))):
            described = of_this_version(KINDS[kind](scenario, seed))
            step_time = described.get("step_time")
            step_time_us = None if step_time is None else vllm_reference.affine_step_time_us(step_time)
            without_end = {"steps": ["without end"], "outcome": []}
            try:
                recording = player(described, model_dir)
            except vllm_reference.EndlessError:
                recording = {**described, **without_end}
            try:
                result = vllm_reference.simulate(recording, step_time_us)
            except vllm_reference.EndlessError:
                result = without_end
            yield recording, result


def check(n_scenarios: int, first_seed: int, kinds: list[str], model_dir: str) -> int:
    """Compare the slow reference with the real scheduler on random scenarios; returns the number of differences."""
    n_different = n_played = n_steps = n_preemptions = n_aborted = n_endless = 0
    for seed in range(first_seed, first_seed + n_scenarios):
        for recording, result in random_plays(seed, kinds, model_dir):
            n_played += 1
            n_steps += len(recording["steps"])
            n_endless += not recording["outcome"]
            n_preemptions += sum(o["preemptions"] for o in recording["outcome"])
            n_aborted += sum(o["status"] == "aborted" for o in recording["outcome"])
            difference = first_difference(recording, result)
            if difference:
                n_different += 1
                print(f"{recording['name']}: {difference}")
    print(
        f"vLLM {vllm_version}, {n_played} random scenarios of {n_scenarios} seeds: {n_steps} steps, "
        f"{n_preemptions} preemptions, {n_aborted} aborts, {n_endless} without end; {n_different} differ",
        file=sys.stderr,
    )
    return n_different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the recordings: OUT/recordings and OUT/recordings_timed")
    parser.add_argument("--check", type=int, metavar="N", help="compare the reference with vLLM on N random scenarios")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="kinds of scenarios of --check; by default all")
    parser.add_argument("--first-seed", type=int, default=100_000, help="first seed of --check (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.check is None):
        parser.error("give either --out or --check")
    if vllm_version not in vllm_reference.RULES:
        parser.error(
            f"vLLM {vllm_version} is installed. Known to the reference: {', '.join(vllm_reference.RULES)}. To follow a new "
            "release, give it the rules of the one before in tests/simulator/vllm_reference.py, and run --check."
        )
    accept_few_blocks()
    with tempfile.TemporaryDirectory() as model_dir:
        (Path(model_dir) / "config.json").write_text(json.dumps(TINY_LLAMA))
        if arguments.check is not None:
            return 1 if check(arguments.check, arguments.first_seed, arguments.only or list(KINDS), model_dir) else 0
        n_scenarios = n_bytes = 0
        for folder, player, kind, groups in (
            ("recordings", play, random_scenario, scenarios.groups()),
            ("recordings_timed", play_timed, random_timed_scenario, scenarios.timed_groups()),
        ):
            groups |= {**random_groups(kind), **random_policies(kind)}
            for group, members in groups.items():
                recordings = [player(of_this_version(scenario), model_dir) for scenario in members]
                size = write_recordings(arguments.out / folder / vllm_version / f"{group}.json.gz", recordings)
                n_scenarios, n_bytes = n_scenarios + len(recordings), n_bytes + size
                print(f"{folder}/{group}: {len(recordings)} scenarios, {size} bytes", file=sys.stderr)
        print(f"{n_scenarios} scenarios, {n_bytes} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
