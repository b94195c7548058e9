"""The compiled event loop that visits each running request in each call."""

from collections.abc import Callable
from typing import Any

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.clock import gap_bin, step_duration
from stepcal.simulator.compilation import cached, compiled, inlined
from stepcal.simulator.departures import finish
from stepcal.simulator.groups import register_groups
from stepcal.simulator.intake import abort_before_output
from stepcal.simulator.jumps import put_in_flight
from stepcal.simulator.kernel import has_work, note_empty_call, take_in
from stepcal.simulator.layout import Batch, Limits, Pool, Record, Requests, Slots, State, Times
from stepcal.simulator.rows import finish_row, record_items
from stepcal.simulator.visiting.layout import MOST_VAIN_PREEMPTIONS, Visits
from stepcal.simulator.visiting.leaving import leave_lists
from stepcal.simulator.visiting.scheduling import schedule
from stepcal.simulator.visiting.waiting import add_arrived


@inlined
def _count_gap(requests: Requests, slots: Slots, record: Record, slot: int, request: int, end: float) -> None:
    """Note when a request's next token was there, and how long after the one before."""
    if slots.rows.generated[slot] == 0:
        requests.rows.first_token_us[request] = end
    else:
        gap = end - slots.rows.last_token_us[slot]
        stage = requests.rows.stage[request]
        record.gap_counts[stage, gap_bin(gap)] += 1
        record.gap_sums[stage] += gap
    slots.rows.last_token_us[slot] = end


@compiled
def _process_output(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, visits: Visits, state: State, record: Record
) -> None:
    """Wait for the oldest batch in flight, and append the tokens that it sampled."""
    call, end = state.flight_call[0], state.flight_end_us[0]
    state.flight_call[0] = state.flight_call[1]
    state.flight_end_us[0] = state.flight_end_us[1]
    state.n_in_flight -= 1
    state.now_us = max(state.now_us, end)
    abort_before_output(limits, requests, slots, pool, state, call, state.now_us)
    state.last_output = call
    flight = call % 2
    for i in range(visits.flight_size[flight]):
        request, slot = visits.flight_request[flight, i], visits.flight_slot[flight, i]
        if slots.rows.request[slot] != request or slots.rows.state[slot] == at.SLOT_FREE:
            continue  # aborted while the batch was in flight
        slots.rows.unprocessed[slot] -= visits.flight_tokens[flight, i]
        if not visits.flight_samples[flight, i]:
            continue  # a chunk of a prompt
        visits.n.vain = 0
        _count_gap(requests, slots, record, slot, request, end)
        slots.rows.generated[slot] += 1
        slots.rows.sampling[slot] -= 1
        if slots.rows.state[slot] != at.SLOT_PREEMPTED:
            n_full = (slots.rows.computed[slot] - slots.rows.sampling[slot]) // limits.block_size
            if n_full > slots.rows.n_keyed[slot]:
                register_groups(limits, pool, slots, slot, requests.rows.chain[request], n_full)
        if slots.rows.generated[slot] == slots.rows.output[slot]:
            leave_lists(limits, requests, slots, pool, state, slot)
            finish(limits, requests, slots, state, slot, end)


@inlined
def _start_step(
    limits: Limits, requests: Requests, visits: Visits, state: State, record: Record, duration_us: float
) -> None:
    """Put the scheduled batch in flight; note which requests are scheduled for the first time."""
    call = state.n_calls
    start = max(state.now_us, state.gpu_free_us)
    end = start + duration_us
    state.gpu_free_us = end
    finish_row(state, record, duration_us)
    if limits.counts_calls:
        start = end = float(call)
    flight = call % 2
    for i in range(visits.flight_size[flight]):
        request = visits.flight_request[flight, i]
        if np.isnan(requests.rows.first_scheduled_us[request]):
            requests.rows.first_scheduled_us[request] = start
    put_in_flight(state, call, end, False)
    state.n_steps += 1
    state.n_calls += 1


@inlined
def _prepare_call(limits: Limits, requests: Requests, visits: Visits, state: State) -> int:
    """Let wait who has arrived; returns `GO_ON`, or why no call can be made."""
    add_arrived(limits, requests, visits, state)
    if visits.n.vain > MOST_VAIN_PREEMPTIONS:
        return at.ENDLESS
    if state.n_free_slots < min(limits.max_num_seqs - state.n_running, state.n_queued):
        return at.NEEDS_SLOTS
    return at.GO_ON


def compile_visiting_advance(source_digest: str) -> Callable[..., Any]:
    """The compiled loop, cached on disk; see `stepcal.simulator.kernel.compile_advance`."""

    @cached
    def advance(
        limits: Limits,
        requests: Requests,
        slots: Slots,
        pool: Pool,
        times: Times,
        visits: Visits,
        record: Record,
        state: State,
        batch: Batch,
        n_rounds: int,
    ) -> int:
        """Run until all requests have ended or something is needed from outside; returns why (see `layout`)."""
        _ = source_digest
        for _round in range(n_rounds):
            is_call = is_step = True
            if state.needs_duration:  # the caller has supplied that of the step scheduled before
                state.needs_duration = 0
                duration = state.duration_us
            else:
                reason = take_in(limits, requests, slots, pool, state, record)
                if reason == at.GO_ON:
                    reason = _prepare_call(limits, requests, visits, state)
                if reason != at.GO_ON:
                    return reason
                is_call = is_step = has_work(state, record)
                duration = 0.0
                if is_call:
                    is_step = schedule(limits, requests, slots, pool, visits, state, record, batch)
                    if record.is_on:
                        record_items(pool, state, record, batch, is_step)
                    if is_step and limits.needs_duration:
                        state.needs_duration = 1
                        return at.NEEDS_DURATION
                    if is_step:
                        duration = step_duration(times, batch, state.rejected)
            if is_step:
                if not (duration >= 0.0 and duration < np.inf):
                    return at.BAD_DURATION
                _start_step(limits, requests, visits, state, record, duration)
            elif is_call and not note_empty_call(limits, state, record):
                return at.STUCK
            # While another batch may be in flight, scheduling it goes before waiting for an output.
            if state.n_in_flight == limits.flight_limit or (state.n_in_flight and not is_step):
                _process_output(limits, requests, slots, pool, visits, state, record)
        return at.PAUSED

    return advance
