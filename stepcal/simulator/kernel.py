"""The compiled event loop: vLLM's engine loop, advanced from event to event.

Each round makes one call of ``schedule()``, or, while nothing but decoding happens, as many calls as fit before the
next arrival, finish, abort or shortage of blocks, with their durations summed in closed form.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.blocks import take_blocks
from stepcal.simulator.clock import count_gaps, gap_bin, step_duration
from stepcal.simulator.compilation import cached, inlined
from stepcal.simulator.departures import finish_requests
from stepcal.simulator.intake import abort_before_output, abort_due, next_arrival, receive
from stepcal.simulator.jumps import begin_jump, end_asynchronous_jump, jump_limit, put_in_flight
from stepcal.simulator.layout import Batch, Limits, Pool, Record, Requests, Slots, State, Times
from stepcal.simulator.offload import refresh_rejected
from stepcal.simulator.rows import finish_row, is_full, record_call
from stepcal.simulator.scheduling import (
    admit,
    head_of_queue,
    register_outputs,
    retire_last_tokens,
    schedule_prefill,
    schedule_short_of_blocks,
)
from stepcal.simulator.windows import chunk_window_kv, chunk_window_pairs, decode_window_kv


@inlined
def _process_output(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State) -> None:
    """Wait for the oldest batch in flight, and process its output."""
    call, end = state.flight_call[0], state.flight_end_us[0]
    has_finish = state.flight_finishes[0]
    state.flight_call[0] = state.flight_call[1]
    state.flight_finishes[0] = state.flight_finishes[1]
    state.flight_end_us[0] = state.flight_end_us[1]
    state.n_in_flight -= 1
    state.now_us = max(state.now_us, end)
    abort_before_output(limits, requests, slots, pool, state, call, state.now_us)
    state.last_output = call
    if has_finish:
        finish_requests(limits, requests, slots, pool, state, call, end)


@inlined
def _schedule_decoding(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, record: Record, batch: Batch
) -> int:
    """A token for every decoding request, preempting from the end of the list while blocks are short.

    Returns
    -------
    n_preempted
    """
    call = state.n_calls
    n_needed = slots.crossings[call % limits.block_size]
    n_preempted = 0
    if limits.has_groups or n_needed > pool.n.free:
        # Every token scheduled so far exists by the end of the batch in flight.
        last_token_us = state.flight_end_us[0] if state.n_in_flight else state.now_us
        n_preempted = schedule_short_of_blocks(limits, requests, slots, pool, state, record, last_token_us)
    else:
        take_blocks(pool, n_needed)
        if state.n_keyed_outputs:
            register_outputs(limits, requests, slots, pool, state, call)
    batch.decode_reqs = state.n_decoding
    batch.decode_kv = state.sum_base + state.n_decoding * (call + 1)
    if limits.has_windows:
        batch.window_kv = decode_window_kv(pool, slots, state)
    for stage in range(slots.stage_batch.size):
        slots.stage_batch[stage] = slots.stage_decoding[stage]
    if state.next_finish == call:
        batch.has_finish = retire_last_tokens(limits, requests, slots, state, call)
    return n_preempted


@inlined
def _admit_waiting(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    state: State,
    record: Record,
    batch: Batch,
    budget: int,
) -> None:
    """Admit waiting requests in order, until one does not fit."""
    while (
        budget > 0
        and state.n_preempted + state.n_queued > 0
        and state.n_running < limits.max_num_seqs
        and not state.is_blocked
    ):
        slot = head_of_queue(requests, slots, state)
        chunk, cached = admit(limits, requests, slots, pool, state, slot, budget)
        if chunk == 0:
            state.is_blocked = 1
            break
        budget -= chunk
        _add_to_batch(limits, pool, slots, batch, slot, chunk, state.n_calls)
        if record.is_on:
            record.cached_request[state.n_row_cached] = slots.rows.request[slot]
            record.cached_tokens[state.n_row_cached] = cached
            state.n_row_cached += 1


@inlined
def _schedule(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, record: Record, batch: Batch
) -> bool:
    """One call of ``schedule()``: running requests first, then waiting ones in order. Fills `batch`.

    Returns
    -------
    is_step
        Whether anything was scheduled.
    """
    refresh_rejected(limits, slots, pool, state)
    state.has_ended = 0
    batch.prefill_reqs = batch.prefill_tokens = batch.prefill_kv = batch.prefill_pairs = batch.has_finish = 0
    batch.window_kv = batch.prefill_window_kv = batch.window_pairs = 0
    n_preempted = _schedule_decoding(limits, requests, slots, pool, state, record, batch)
    budget = limits.max_num_batched_tokens - batch.decode_reqs
    if state.prefill_slot >= 0 and budget > 0:
        slot = state.prefill_slot
        chunk = schedule_prefill(limits, requests, slots, pool, state, record, budget)
        state.is_blocked = 0
        if chunk:
            budget -= chunk
            _add_to_batch(limits, pool, slots, batch, slot, chunk, state.n_calls)
        else:
            n_preempted += 1
    if state.n_keyed_outputs or limits.has_groups:
        state.is_blocked = 0
    if n_preempted == 0:  # a call that preempts admits nobody
        _admit_waiting(limits, requests, slots, pool, state, record, batch, budget)
    batch.n_waiting = state.n_preempted + state.n_queued
    is_step = batch.decode_reqs + batch.prefill_reqs > 0
    if record.is_on:
        record_call(slots, pool, state, record, batch, is_step)
    return is_step


@inlined
def _add_to_batch(limits: Limits, pool: Pool, slots: Slots, batch: Batch, slot: int, chunk: int, call: int) -> None:
    context = slots.rows.computed[slot] - chunk
    batch.prefill_reqs += 1
    batch.prefill_tokens += chunk
    batch.prefill_kv += context + chunk
    batch.prefill_pairs += chunk * context + chunk * (chunk + 1) // 2
    if limits.has_windows:
        batch.prefill_window_kv += chunk_window_kv(pool, context, chunk)
        batch.window_pairs += chunk_window_pairs(pool, context, chunk)
    if slots.rows.state[slot] == at.SLOT_DECODE and slots.rows.finish_call[slot] == call:
        batch.has_finish += 1


@inlined
def _start_step(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    state: State,
    record: Record,
    batch: Batch,
    duration_us: float,
) -> None:
    """Put the scheduled batch in flight; note when its prompts are first scheduled and have their first tokens."""
    call = state.n_calls
    start = max(state.now_us, state.gpu_free_us)
    end = start + duration_us
    state.gpu_free_us = end
    finish_row(state, record, duration_us)
    if limits.counts_calls:
        end = float(call)
    if batch.decode_reqs:
        count_gaps(record.gap_counts, record.gap_sums, slots.stage_batch, duration_us, 0.0, 0.0, 1)
    if batch.prefill_reqs:
        for i in range(state.n_running - 1, state.n_running - 1 - batch.prefill_reqs, -1):
            slot = slots.running[i]
            request = slots.rows.request[slot]
            if np.isnan(requests.rows.first_scheduled_us[request]):
                requests.rows.first_scheduled_us[request] = float(call) if limits.counts_calls else start
            if slots.rows.state[slot] == at.SLOT_DECODE:
                if slots.rows.generated[slot] == 0:
                    requests.rows.first_token_us[request] = end
                else:
                    stage = requests.rows.stage[request]
                    record.gap_counts[stage, gap_bin(end - slots.rows.last_token_us[slot])] += 1
                    record.gap_sums[stage] += end - slots.rows.last_token_us[slot]
    put_in_flight(state, call, end, batch.has_finish > 0)
    state.n_steps += 1
    state.n_calls += 1


@inlined
def has_work(state: State, record: Record) -> bool:
    """Whether vLLM would call ``schedule()``: also once after a request ended (recorded on request only)."""
    n_alive = state.n_running + state.n_preempted + state.n_queued
    return n_alive > 0 or record.keep_empty * state.has_ended > 0


@inlined
def note_empty_call(limits: Limits, state: State, record: Record) -> bool:
    """A call that scheduled nothing. Returns whether anything can still happen."""
    if record.keep_empty:
        end = float(state.n_calls) if limits.counts_calls else max(state.now_us, state.gpu_free_us)
        put_in_flight(state, state.n_calls, end, False)
    elif state.n_in_flight + state.n_running == 0 and (state.is_blocked or not limits.has_groups):
        return False  # with groups, a lone request can have preempted itself, and is admitted again
    state.n_calls += 1
    return True


@inlined
def take_in(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    state: State,
    record: Record,
) -> int:
    """Take in what has arrived; an idle engine sleeps until something does. Returns `GO_ON` or why not."""
    if not has_work(state, record) and state.n_in_flight == 0:
        if state.n_ended == requests.rows.size:
            return at.DONE
        time, _ = next_arrival(limits, requests, state)
        if time == np.inf:
            return at.STUCK
        if limits.counts_calls:  # the next arrivals come now, whatever their number
            receive(limits, requests, state, max(time, float(state.n_calls)))
        else:
            state.now_us = max(state.now_us, time)
    if is_full(limits, state, record):
        return at.PAUSED
    now = float(state.n_calls) if limits.counts_calls else state.now_us
    receive(limits, requests, state, now)
    abort_due(limits, requests, slots, pool, state, now, now)
    return at.GO_ON


def compile_advance(source_digest: str) -> Callable[..., Any]:
    """The compiled loop, cached on disk.

    numba's cache knows the file of the function it caches, but not those of the functions that it calls. So a digest
    of all their sources is made a constant of the function, and with it a part of the key.
    """

    @cached
    def advance(
        limits: Limits,
        requests: Requests,
        slots: Slots,
        pool: Pool,
        times: Times,
        record: Record,
        state: State,
        batch: Batch,
        n_rounds: int,
    ) -> int:
        """Run until all requests have ended or something is needed from outside; returns why (see `layout`)."""
        _ = source_digest
        for _round in range(n_rounds):
            n_jump, jump = 0, (0, 0, False, 0.0)
            is_call = is_step = True
            if state.needs_duration:  # the caller has supplied that of the step scheduled before
                state.needs_duration = 0
                duration = state.duration_us
            else:
                reason = take_in(limits, requests, slots, pool, state, record)
                if reason != at.GO_ON:
                    return reason
                is_call = is_step = has_work(state, record)
                duration = 0.0
                if is_call:
                    n_jump = jump_limit(limits, requests, slots, pool, state, record)
                if is_call and n_jump == 0:
                    is_step = _schedule(limits, requests, slots, pool, state, record, batch)
                    if is_step and limits.needs_duration:
                        state.needs_duration = 1
                        return at.NEEDS_DURATION
                    if is_step:
                        duration = step_duration(times, batch, state.rejected)

            if n_jump:
                jump = begin_jump(limits, requests, slots, pool, times, state, record, n_jump)
                if not state.gpu_free_us < np.inf:
                    return at.BAD_DURATION
            elif is_step:
                if not (duration >= 0.0 and duration < np.inf):
                    return at.BAD_DURATION
                _start_step(limits, requests, slots, state, record, batch, duration)
            elif is_call and not note_empty_call(limits, state, record):
                return at.STUCK

            # While another batch may be in flight, scheduling it goes before waiting for an output.
            if n_jump or state.n_in_flight == limits.flight_limit or (state.n_in_flight and not is_step):
                _process_output(limits, requests, slots, pool, state)
            if n_jump and limits.flight_limit > 1:
                end_asynchronous_jump(limits, requests, slots, pool, state, jump)
        return at.PAUSED

    return advance
