"""Run a simulation: check the input, lay out the arrays, drive the compiled loop, collect the result."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from stepcal.errors import InputError, StepcalError
from stepcal.simulator import layout as at
from stepcal.simulator.config import ServerConfig
from stepcal.simulator.kernel import compile_advance
from stepcal.simulator.lay_out import (
    lay_out_pool,
    lay_out_requests,
    lay_out_slots,
    lay_out_state,
    limits_of,
    prefixes_of,
)
from stepcal.simulator.layout import Times
from stepcal.simulator.load.clients import Clients
from stepcal.simulator.load.workload import RequestList
from stepcal.simulator.result import SimulationResult
from stepcal.simulator.step_record import StepRecorder
from stepcal.simulator.steptime import CompiledStepTime, StepTime, add_components, dummy_times
from stepcal.simulator.visiting.kernel import compile_visiting_advance
from stepcal.simulator.visiting.lay_out import grow_slots, lay_out_visits
from stepcal.simulator.visiting.layout import MOST_VAIN_PREEMPTIONS
from stepcal.units import US_PER_S

# Rounds of the compiled loop between two looks at the progress bar and at Ctrl-C; well below a second.
_ROUNDS_PER_VISIT = 1 << 18
_MOST_PREEMPTIONS = 10**5  # of one request; no run that gets on has so many
_ROUNDS_BETWEEN_REPORTS = 1 << 15  # about a sixth of a second
_VISITING_MODULES = tuple(f"visiting/{name}" for name in ("layout", "waiting", "leaving", "scheduling", "kernel"))
_COMPILED_MODULES = (
    "layout",
    "compilation",
    "blocks",
    "groups",
    "scheduling",
    "sending",
    "departures",
    "intake",
    "rows",
    "clock",
    "offload",
    "jumps",
    "kernel",
)


class SimulationInterrupted(StepcalError, RuntimeError):
    """A run was stopped before its end; nothing of it is kept."""


_COMPILING = threading.Lock()


def _compiled(compile_loop: Callable[[str], Callable[..., int]]) -> Callable[..., int]:
    """A compiled loop; threads that ask for it at the same time get the same one."""
    with _COMPILING:
        return _compiled_once(compile_loop)


@cache
def _compiled_once(compile_loop: Callable[[str], Callable[..., int]]) -> Callable[..., int]:
    folder = Path(__file__).parent
    sources = b"".join((folder / f"{name}.py").read_bytes() for name in _COMPILED_MODULES + _VISITING_MODULES)
    return compile_loop(hashlib.sha256(sources).hexdigest())


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
    """Serve requests as the release of vLLM in `config` would, on the clock of a step-time model.

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
        If a request can never fit, if requests preempt each other for ever, or a step time is NaN, negative or infinite
        (the component is named).
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
        self.limits = limits_of(
            requests,
            server,
            clients,
            timeout_us=float(timeout_s) * US_PER_S,
            api_before_us=api_before_us,
            api_after_us=api_after_us,
            max_jump=max_jump,
            asks=self.asks,
            counts_calls=count_calls,
            reads_windows=bool(self.times.window_kv_us or self.times.prefill_window_kv_us or self.times.window_pair_us),
        )
        prefixes = prefixes_of(requests, server)
        us_per_unit = 1.0 if count_calls else US_PER_S
        self.requests = lay_out_requests(requests, clients, server, prefixes.chain, api_before_us, us_per_unit)
        self.slots = lay_out_slots(server, requests, prefixes.max_blocks)
        self.pool = lay_out_pool(server, requests, prefixes)
        self.recorder = StepRecorder(
            server, requests.n_stages, record_steps, seed, keep_empty=keep_empty, asks=self.asks
        )
        self.visits = lay_out_visits(server, requests) if server.visits_each_request else None
        self.state = lay_out_state(self.limits, self.slots.rows.size, clients.first_sent(requests))
        self.batch = at.one_row(at.BATCH)

    def drive(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Run to the end."""
        n_requests = len(self.request_list)
        rounds = _ROUNDS_PER_VISIT if on_progress is None else _ROUNDS_BETWEEN_REPORTS
        try:
            while True:
                reason = self._advance(rounds)
                if reason == at.NEEDS_SLOTS:
                    self.slots, self.pool = grow_slots(self.slots, self.pool, self.state)
                    continue
                if reason == at.NEEDS_DURATION:
                    batch = replace(self.recorder.last_batch(self.state), rejected=float(self.state.rejected))
                    self.state.duration_us = add_components(self.step_time(batch))
                    continue
                self.recorder.drain(self.state)
                if reason == at.DONE:
                    return
                if reason != at.PAUSED or self._runs_in_circles():
                    self._fail(reason)
                if on_progress is not None:
                    on_progress(int(self.state.n_ended), n_requests)
        except KeyboardInterrupt as interrupt:
            raise SimulationInterrupted(
                f"The simulation was interrupted after {self.state.n_ended:,} of {n_requests:,} requests "
                f"({self.state.n_steps:,} steps); there is no result. Start it again, or simulate fewer requests."
            ) from interrupt

    def _runs_in_circles(self) -> bool:
        """Whether a request preempts itself again and again: with windows, blocks can suffice for its end but not before."""
        return self.server.has_groups and int(self.requests.rows["preemptions"].max(initial=0)) > _MOST_PREEMPTIONS

    def _advance(self, n_rounds: int) -> int:
        """Run one of the compiled loops; returns why it came back."""
        before = (self.limits, self.requests, self.slots, self.pool, self.times)
        after = (self.recorder.record, self.state, self.batch, n_rounds)
        if self.visits is None:
            return _compiled(compile_advance)(*before, *after)
        return _compiled(compile_visiting_advance)(*before, self.visits, *after)

    def _fail(self, reason: int) -> None:
        if reason == at.BAD_DURATION:
            raise InputError(
                f"The step time is negative, NaN or infinite in step {self.state.n_steps} "
                f"({self.batch.prefill_tokens} prefill tokens, {self.batch.decode_reqs} decoding requests). "
                "Check the step-time components, or set `floor_us`."
            )
        if reason == at.ENDLESS:
            raise InputError(
                f"`kv_blocks` is {self.server.kv_blocks}, with which vLLM {self.server.release.version} does not come to an "
                f"end: requests preempted each other {MOST_VAIN_PREEMPTIONS:,} times without a token in between (step "
                f"{self.state.n_steps}). Raise it, or lower `max_num_seqs`."
            )
        if self.server.has_groups:
            waiting = np.isin(self.requests.rows["status"], (at.WAITING, at.RUNNING))
            release = self.server.release
            counts_chunks = release.knows_that_windows_slide or not release.admits_whole_sequences
            way_out = (
                ", or lower `max_num_batched_tokens`" if counts_chunks else " (this release counts whole sequences)"
            )
            raise InputError(
                f"Request {self.request_list._name(int(np.argmax(waiting)))} waits for ever: {self.server.usable_blocks} KV "
                f"blocks (`kv_blocks` - 1) are free, and vLLM {self.server.release.version} needs more to admit it, or for "
                f"its next chunk, in all groups together. Raise `kv_blocks`{way_out}."
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
            steps=int(self.state.n_steps),
            preemptions=int(self.state.n_preemptions),
            simulated_s=float(self.state.gpu_free_us) / US_PER_S,
            wall_s=wall_s,
            engine_s=engine_s,
            gap_counts=self.recorder.record.gap_counts,
            gap_sums=self.recorder.record.gap_sums,
            step_rows=self.recorder.rows(),
            kv_blocks=self.server.kv_blocks,
            experiment_id=experiment_id,
        )
