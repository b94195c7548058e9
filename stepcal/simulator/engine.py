"""Run a simulation: check the input, lay out the arrays, drive the compiled loop, collect the result."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from stepcal.errors import InputError, StepcalError
from stepcal.simulator import layout as at
from stepcal.simulator.clients import Clients
from stepcal.simulator.config import ServerConfig
from stepcal.simulator.kernel import compile_advance
from stepcal.simulator.layout import Int32Array, Limits, Pool, Requests, Slots, Times
from stepcal.simulator.prefix import PrefixTable, find_shared_prefixes, no_prefixes
from stepcal.simulator.result import SimulationResult
from stepcal.simulator.step_record import StepRecorder
from stepcal.simulator.steptime import CompiledStepTime, StepTime, add_components, dummy_times
from stepcal.simulator.workload import RequestList

# Rounds of the compiled loop between two looks at the progress bar and at Ctrl-C; well below a second.
_ROUNDS_PER_VISIT = 1 << 18
_US_PER_S = 1e6
_COMPILED_MODULES = (
    "layout",
    "compilation",
    "blocks",
    "scheduling",
    "sending",
    "departures",
    "intake",
    "rows",
    "clock",
    "offload",
    "kernel",
)


class SimulationInterrupted(StepcalError, RuntimeError):
    """A run was stopped before its end; nothing of it is kept."""


_COMPILING = threading.Lock()


def _compiled() -> Callable[..., int]:
    """The compiled loop; threads that ask for it at the same time get the same one."""
    with _COMPILING:
        return _compiled_once()


@cache
def _compiled_once() -> Callable[..., int]:
    folder = Path(__file__).parent
    sources = b"".join((folder / f"{name}.py").read_bytes() for name in _COMPILED_MODULES)
    return compile_advance(hashlib.sha256(sources).hexdigest())


def simulate(
    requests: RequestList,
    server: ServerConfig,
    step_time: CompiledStepTime | StepTime,
    *,
    clients: Clients | None = None,
    timeout_s: float = np.inf,
    api_before_us: float = 0.0,
    api_after_us: float = 0.0,
    record_steps: float | None = None,
    seed: int = 0,
    experiment_id: str = "simulated",
    max_jump: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Serve requests as vLLM 0.15.1 would, on the clock of a step-time model.

    Parameters
    ----------
    requests : RequestList
    server : ServerConfig
    step_time : CompiledStepTime or callable
        See `stepcal.simulator.steptime`. A callable is asked at every step, which is slower.
    clients : Clients, optional
        How many requests are in flight at most, and whether stages of load wait for each other. By default every
        request is sent at its time.
    timeout_s : float
        How long a client waits before it gives up; the request is then aborted.
    api_before_us, api_after_us : float
        Time between client and engine, on the way in and on the way back. Both are part of the latencies that the
        client sees.
    record_steps : float, optional
        Fraction of the steps to keep in the step table, 1 for all; by default there is none.
    seed : int
        Of the sample of steps. The same seed gives the same bytes.
    experiment_id : str
        Name in the step table.
    max_jump : int, optional
        Most decode steps advanced in one go; 1 steps through them all (for tests).
    on_progress : callable, optional
        Called now and then with the number of requests that ended and their total.

    Returns
    -------
    SimulationResult

    Raises
    ------
    InputError
        If a request can never fit, or a step time is NaN, negative or infinite (the component is named).
    SimulationInterrupted
        On Ctrl-C.
    """
    started = time.perf_counter()
    for name, value in (("api_before_us", api_before_us), ("api_after_us", api_after_us)):
        if not (0.0 <= value < np.inf):
            raise InputError(f"`{name}` is {value}; it must be finite and not negative.")
    if not timeout_s > 0.0:
        raise InputError(f"`timeout_s` is {timeout_s}; it must be positive, or infinite for clients that wait forever.")
    if record_steps is not None and not 0.0 < record_steps <= 1.0:
        raise InputError(f"`record_steps` is {record_steps}; it must be a fraction above 0, up to 1 (every step).")
    run = EngineRun(
        requests,
        server,
        step_time,
        clients=clients,
        timeout_s=timeout_s,
        api_before_us=api_before_us,
        api_after_us=api_after_us,
        record_steps=record_steps,
        seed=seed,
        max_jump=max_jump,
    )
    laid_out = time.perf_counter()
    run.drive(on_progress)
    ended = time.perf_counter()
    return run.result(experiment_id, wall_s=ended - started, engine_s=ended - laid_out)


class EngineRun:
    """The arrays of one simulation and the loop around the compiled loop. `simulate` is the way to use it.

    Two further modes serve the conformance tests: with `count_calls`, arrivals and aborts are numbers of
    ``schedule()`` calls instead of seconds; with `keep_empty`, calls that schedule nothing are recorded too.
    """

    def __init__(
        self,
        requests: RequestList,
        server: ServerConfig,
        step_time: CompiledStepTime | StepTime,
        *,
        clients: Clients | None = None,
        timeout_s: float = np.inf,
        api_before_us: float = 0.0,
        api_after_us: float = 0.0,
        record_steps: float | None = None,
        seed: int = 0,
        max_jump: int | None = None,
        count_calls: bool = False,
        keep_empty: bool = False,
    ) -> None:
        self.request_list, self.server, self.step_time = requests, server, step_time
        clients = Clients() if clients is None else clients
        clients.check(requests)
        self.api_after_us = api_after_us
        self.asks = not isinstance(step_time, CompiledStepTime)
        self.times: Times = step_time.bind(server) if isinstance(step_time, CompiledStepTime) else dummy_times()
        self.limits = Limits(
            max_num_seqs=server.max_num_seqs,
            max_num_batched_tokens=server.max_num_batched_tokens,
            block_size=server.block_size,
            flight_limit=2 if server.async_scheduling else 1,
            counts_calls=int(count_calls),
            max_jump=at.NEVER if max_jump is None else max_jump,
            needs_duration=int(self.asks),
            has_caching=int(server.enable_prefix_caching),
            api_after_us=float(api_after_us),
            api_before_us=float(api_before_us),
            timeout_us=float(timeout_s) * _US_PER_S,
            has_abort_times=int(requests.abort_s is not None),
            usable_blocks=server.usable_blocks,
            offload_blocks=server.offload_blocks,
            has_clients=int(clients.waits),
            max_in_flight=min(clients.max_in_flight or 0, len(requests)),
            stage_interval_us=clients.stage_interval_s * _US_PER_S,
        )
        prefixes = _prefixes(requests, server)
        us_per_unit = 1.0 if count_calls else _US_PER_S
        self.requests = _lay_out_requests(requests, clients, server, prefixes.chain, api_before_us, us_per_unit)
        self.slots = _lay_out_slots(server, prefixes.max_blocks, requests.n_stages)
        self.pool = _lay_out_pool(server, prefixes)
        self.recorder = StepRecorder(
            server, requests.n_stages, record_steps, seed, keep_empty=keep_empty, asks=self.asks
        )
        self.counts = np.zeros(at.SIZE_COUNTS, np.int64)
        self.counts[[at.NEXT_FINISH, at.PREFILL_SLOT, at.LAST_OUTPUT]] = at.NEVER, -1, -1
        self.counts[at.N_FREE_SLOTS] = server.max_num_seqs
        self.counts[[at.LIST_END, at.N_STAGE_LEFT]] = clients.first_sent(requests)
        self.counts[at.N_PLACES] = min(self.limits.max_in_flight, self.counts[at.LIST_END])
        self.clock = np.zeros(at.SIZE_CLOCK)
        self.batch = np.zeros(at.SIZE_BATCH, np.int64)

    def drive(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Run to the end."""
        advance = _compiled()
        n_requests = len(self.request_list)
        try:
            while True:
                reason = advance(
                    self.limits,
                    self.requests,
                    self.slots,
                    self.pool,
                    self.times,
                    self.recorder.record,
                    self.counts,
                    self.clock,
                    self.batch,
                    _ROUNDS_PER_VISIT,
                )
                if reason == at.NEEDS_DURATION:
                    batch = replace(self.recorder.last_batch(self.counts), rejected=float(self.clock[at.REJECTED]))
                    self.clock[at.DURATION] = add_components(self.step_time(batch))
                    continue
                self.recorder.drain(self.counts)
                if reason == at.DONE:
                    return
                if reason != at.PAUSED:
                    self._fail(reason)
                if on_progress is not None:
                    on_progress(int(self.counts[at.N_ENDED]), n_requests)
        except KeyboardInterrupt as interrupt:
            raise SimulationInterrupted(
                f"The simulation was interrupted after {self.counts[at.N_ENDED]:,} of {n_requests:,} requests "
                f"({self.counts[at.N_STEPS]:,} steps); there is no result. Start it again, or simulate fewer requests."
            ) from interrupt

    def _fail(self, reason: int) -> None:
        if reason == at.BAD_DURATION:
            raise InputError(
                f"The step time is negative, NaN or infinite in step {self.counts[at.N_STEPS]} "
                f"({self.batch[at.PREFILL_TOKENS]} prefill tokens, {self.batch[at.DECODE_REQS]} decoding requests). "
                "Check the step-time components, or set `floor_us`."
            )
        raise RuntimeError(
            f"The engine stopped with requests left (reason {reason}): this is a defect of the simulator."
        )

    def _fail_late_answers(self) -> None:
        """An answer that leaves the engine in time can still reach the client after it gave up."""
        if self.limits.timeout_us == np.inf or self.limits.api_before_us + self.api_after_us == 0.0:
            return
        rows = self.requests.rows
        latency = rows["finish_us"] + self.api_after_us - (rows["arrival_us"] - self.limits.api_before_us)
        rows["status"][(rows["status"] == at.FINISHED) & (latency > self.limits.timeout_us)] = at.ABORTED

    def result(self, experiment_id: str, *, wall_s: float, engine_s: float) -> SimulationResult:
        """Collect what the loop left behind."""
        self._fail_late_answers()
        return SimulationResult(
            requests=self.request_list,
            rows=self.requests.rows,
            api_before_us=self.limits.api_before_us,
            api_after_us=self.api_after_us,
            steps=int(self.counts[at.N_STEPS]),
            preemptions=int(self.counts[at.N_PREEMPTIONS]),
            simulated_s=float(self.clock[at.GPU_FREE]) / _US_PER_S,
            wall_s=wall_s,
            engine_s=engine_s,
            gap_counts=self.recorder.record.gap_counts,
            gap_sums=self.recorder.record.gap_sums,
            step_rows=self.recorder.rows(),
            kv_blocks=self.server.kv_blocks,
            experiment_id=experiment_id,
        )


def _lay_out_requests(
    requests: RequestList,
    clients: Clients,
    server: ServerConfig,
    chain: Int32Array,
    api_before_us: float,
    us_per_unit: float,
) -> Requests:
    """Per-request arrays; refuses requests that could never be served."""
    n = len(requests)
    prompt_tokens = requests.prompt_tokens
    _check_fits(requests, prompt_tokens, server)
    rows = np.zeros(n, at.REQUEST_ROW)
    for name in ("first_scheduled_us", "first_token_us", "finish_us"):
        rows[name] = np.nan
    rows["prompt_tokens"], rows["output_tokens"], rows["chain"] = prompt_tokens, requests.output_tokens, chain
    np.multiply(requests.arrival_s, us_per_unit, out=rows["arrival_us"])
    rows["has_left"] = not clients.waits
    if requests.stage is not None:
        rows["stage"] = requests.stage
    follower, n_sessions = np.zeros(0, np.int32), 0
    n_clients = min(clients.max_in_flight or 0, n)
    if clients.stage_starts_s is not None:
        # Later stages count from their begin, which is known when the one before has ended.
        rows["arrival_us"] -= clients.stage_offsets_s(requests) * us_per_unit
        rows["arrival_us"][: clients.first_sent(requests)] += (
            clients.first_begin_s(requests) * us_per_unit + api_before_us
        )
    elif requests.follows is None:
        rows["arrival_us"] += api_before_us
    else:
        rows["is_follow_up"] = requests.follows >= 0
        rows["arrival_us"][requests.follows < 0] += api_before_us
        n_sessions = int((requests.follows < 0).sum())
        follower = np.full(n, -1, np.int32)
        turns = np.flatnonzero(requests.follows >= 0).astype(np.int32)
        follower[requests.follows[turns]] = turns
    abort_at, abort_order = np.zeros(0), np.zeros(0, np.int32)
    if requests.abort_s is not None:
        abort_at = requests.abort_s * us_per_unit + api_before_us
        abort_order = np.argsort(abort_at, kind="stable").astype(np.int32)[: int(np.isfinite(abort_at).sum())]
    return Requests(
        rows=rows,
        queue=np.empty(n, np.int32),
        follower=follower,
        heap=np.zeros(n_sessions + n_clients, at.HEAP_ROW),
        places=np.full(n_clients, -np.inf),
        think_us=clients.think_times_s(requests) * _US_PER_S,
        stage_first=clients.stage_firsts(requests),
        stage_end_us=np.full(requests.n_stages, -np.inf),
        abort_at=abort_at,
        abort_order=abort_order,
        output_abort_at=np.zeros(0),
        output_abort_order=np.zeros(0, np.int32),
    )


def _check_fits(requests: RequestList, prompt_tokens: Any, server: ServerConfig) -> None:
    total = prompt_tokens.astype(np.int64) + requests.output_tokens
    if (total > server.max_model_len).any():
        i = int(np.argmax(total > server.max_model_len))
        raise InputError(
            f"Request {requests._name(i)} has {prompt_tokens[i]} prompt and {requests.output_tokens[i]} output tokens, "
            f"{total[i]} in all; `max_model_len` is {server.max_model_len}. Raise it, or shorten the request."
        )
    # The last output token is never computed, so it needs no KV.
    n_blocks = -(-(total - 1) // server.block_size)
    if (n_blocks > server.usable_blocks).any():
        i = int(np.argmax(n_blocks > server.usable_blocks))
        raise InputError(
            f"Request {requests._name(i)} needs {n_blocks[i]} KV blocks of {server.block_size} tokens before it ends "
            f"and can never fit: the server has {server.usable_blocks} (`kv_blocks` - 1). "
            f"Give it at least {n_blocks[i] + 1}."
        )


def _prefixes(requests: RequestList, server: ServerConfig) -> PrefixTable:
    if not server.enable_prefix_caching:
        return no_prefixes(len(requests))
    return find_shared_prefixes(
        requests.prompt,
        requests.prompt_start,
        requests.segment_content,
        requests.segment_tokens,
        requests.output_content,
        requests.output_tokens,
        server.block_size,
    )


def _lay_out_slots(server: ServerConfig, max_keyed_blocks: int, n_stages: int) -> Slots:
    n = server.max_num_seqs
    rows = np.zeros(n, at.SLOT_ROW)
    for name in ("chunk_call", "finish_call"):
        rows[name] = -1
    return Slots(
        rows=rows,
        blocks=np.zeros((n, max(1, max_keyed_blocks)), np.int32),
        free=np.arange(n - 1, -1, -1, dtype=np.int32),
        running=np.zeros(n, np.int32),
        running_finish=np.zeros(n, np.int64),
        preempted=np.zeros(n, np.int32),
        crossings=np.zeros(server.block_size, np.int64),
        stage_decoding=np.zeros(n_stages, np.int64),
        stage_batch=np.zeros(n_stages, np.int64),
    )


def _lay_out_pool(server: ServerConfig, prefixes: PrefixTable) -> Pool:
    """All blocks free, as one run."""
    n = server.usable_blocks + 2
    entries = np.zeros(n, at.ENTRY_ROW)
    entries["node"] = at.ANONYMOUS
    entries["spare"] = np.arange(n - 1, -1, -1)
    # Row 0 is the sentinel, row 1 the run of all blocks.
    entries["next"][0] = entries["prev"][0] = 1
    entries["count"][1] = server.usable_blocks
    segments = np.zeros(prefixes.segment_end.size, at.SEGMENT_ROW)
    segments["offset"], segments["end"] = prefixes.segment_offset, prefixes.segment_end
    return Pool(
        entries=entries,
        nodes=np.zeros(prefixes.n_nodes, at.NODE_ROW),
        chain_start=prefixes.chain_start,
        segments=segments,
        ghost=np.zeros(server.max_num_seqs, np.int32),
        n=np.array([server.usable_blocks, n - 2], np.int64),
    )
