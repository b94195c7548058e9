"""The compiled event loop: vLLM's engine loop, advanced from event to event.

Each round makes one call of ``schedule()``, or, while nothing but decoding happens, as many calls as fit before the
next arrival, finish, abort or shortage of blocks, with their durations summed in closed form.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.blocks import take_blocks
from stepcal.simulator.clock import count_gaps, decode_line, elapsed, gap_bin, step_duration, steps_until
from stepcal.simulator.compilation import cached, inlined
from stepcal.simulator.departures import finish_requests
from stepcal.simulator.intake import abort_before_output, abort_due, next_abort, next_arrival, receive
from stepcal.simulator.layout import Limits, Pool, Record, Requests, Slots, Times
from stepcal.simulator.offload import calls_until_refresh, refresh_rejected
from stepcal.simulator.rows import finish_row, is_full, record_call
from stepcal.simulator.scheduling import (
    admit,
    head_of_queue,
    next_registration,
    register_outputs,
    retire_last_tokens,
    schedule_prefill,
    schedule_short_of_blocks,
)
from stepcal.units import FloatArray, IntArray


@inlined
def _process_output(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, counts: IntArray, clock: FloatArray
) -> None:
    """Wait for the oldest batch in flight, and process its output."""
    call, end = counts[at.FLIGHT_CALL], clock[at.FLIGHT_END]
    has_finish = counts[at.FLIGHT_FINISHES]
    counts[at.FLIGHT_CALL] = counts[at.FLIGHT_CALL + 1]
    counts[at.FLIGHT_FINISHES] = counts[at.FLIGHT_FINISHES + 1]
    clock[at.FLIGHT_END] = clock[at.FLIGHT_END + 1]
    counts[at.N_IN_FLIGHT] -= 1
    clock[at.NOW] = max(clock[at.NOW], end)
    abort_before_output(limits, requests, slots, pool, counts, call, clock[at.NOW])
    counts[at.LAST_OUTPUT] = call
    if has_finish:
        finish_requests(limits, requests, slots, pool, counts, call, end)


@inlined
def _schedule(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    counts: IntArray,
    clock: FloatArray,
    record: Record,
    batch: IntArray,
) -> None:
    """One call of ``schedule()``: running requests first, then waiting ones in order. Fills `batch`."""
    refresh_rejected(limits, slots, pool, counts, clock)
    call = counts[at.N_CALLS]
    counts[at.HAS_ENDED] = 0
    for i in range(batch.size):
        batch[i] = 0
    n_needed = slots.crossings[call % limits.block_size]
    n_preempted = 0
    if n_needed > pool.n[at.N_FREE]:
        # Every token scheduled so far exists by the end of the batch in flight.
        last_token_us = clock[at.FLIGHT_END] if counts[at.N_IN_FLIGHT] else clock[at.NOW]
        n_preempted = schedule_short_of_blocks(limits, requests, slots, pool, counts, record, last_token_us)
    else:
        take_blocks(pool, n_needed)
        if counts[at.N_KEYED_OUTPUTS]:
            register_outputs(limits, requests, slots, pool, counts, call)
    n_decode = counts[at.N_DECODING]
    batch[at.DECODE_REQS] = n_decode
    batch[at.DECODE_KV] = counts[at.SUM_BASE] + n_decode * (call + 1)
    for stage in range(slots.stage_batch.size):
        slots.stage_batch[stage] = slots.stage_decoding[stage]
    budget = limits.max_num_batched_tokens - n_decode
    if counts[at.NEXT_FINISH] == call:
        batch[at.HAS_FINISH] = retire_last_tokens(limits, requests, slots, counts, call)
    if counts[at.PREFILL_SLOT] >= 0 and budget > 0:
        slot = counts[at.PREFILL_SLOT]
        chunk = schedule_prefill(limits, requests, slots, pool, counts, record, budget)
        counts[at.IS_BLOCKED] = 0
        if chunk:
            budget -= chunk
            _add_to_batch(slots, batch, slot, chunk, call)
        else:
            n_preempted += 1
    if counts[at.N_KEYED_OUTPUTS]:
        counts[at.IS_BLOCKED] = 0
    while (
        n_preempted == 0
        and budget > 0
        and counts[at.N_PREEMPTED] + counts[at.N_QUEUED] > 0
        and counts[at.N_RUNNING] < limits.max_num_seqs
        and not counts[at.IS_BLOCKED]
    ):
        slot = head_of_queue(requests, slots, counts)
        chunk, cached = admit(limits, requests, slots, pool, counts, slot, budget)
        if chunk == 0:
            counts[at.IS_BLOCKED] = 1
            break
        budget -= chunk
        _add_to_batch(slots, batch, slot, chunk, call)
        if record.is_on:
            record.cached_request[counts[at.N_ROW_CACHED]] = slots.rows.request[slot]
            record.cached_tokens[counts[at.N_ROW_CACHED]] = cached
            counts[at.N_ROW_CACHED] += 1
    batch[at.N_WAITING] = counts[at.N_PREEMPTED] + counts[at.N_QUEUED]


@inlined
def _add_to_batch(slots: Slots, batch: IntArray, slot: int, chunk: int, call: int) -> None:
    context = slots.rows.computed[slot] - chunk
    batch[at.PREFILL_REQS] += 1
    batch[at.PREFILL_TOKENS] += chunk
    batch[at.PREFILL_KV] += context + chunk
    batch[at.PREFILL_PAIRS] += chunk * context + chunk * (chunk + 1) // 2
    if slots.rows.state[slot] == at.SLOT_DECODE and slots.rows.finish_call[slot] == call:
        batch[at.HAS_FINISH] += 1


@inlined
def _start_step(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    counts: IntArray,
    clock: FloatArray,
    record: Record,
    batch: IntArray,
    duration_us: float,
) -> None:
    """Put the scheduled batch in flight; note when its prompts are first scheduled and have their first tokens."""
    call = counts[at.N_CALLS]
    start = max(clock[at.NOW], clock[at.GPU_FREE])
    end = start + duration_us
    clock[at.GPU_FREE] = end
    finish_row(counts, record, duration_us)
    if limits.counts_calls:
        end = float(call)
    if batch[at.DECODE_REQS]:
        count_gaps(record.gap_counts, record.gap_sums, slots.stage_batch, duration_us, 0.0, 0.0, 1)
    if batch[at.PREFILL_REQS]:
        for i in range(counts[at.N_RUNNING] - 1, counts[at.N_RUNNING] - 1 - batch[at.PREFILL_REQS], -1):
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
    _put_in_flight(counts, clock, call, end, batch[at.HAS_FINISH] > 0)
    counts[at.N_STEPS] += 1


@inlined
def _put_in_flight(counts: IntArray, clock: FloatArray, call: int, end: float, has_finish: bool) -> None:
    i = counts[at.N_IN_FLIGHT]
    counts[at.FLIGHT_CALL + i] = call
    counts[at.FLIGHT_FINISHES + i] = 1 if has_finish else 0
    clock[at.FLIGHT_END + i] = end
    counts[at.N_IN_FLIGHT] = i + 1


@inlined
def _jump_limit(limits: Limits, requests: Requests, slots: Slots, pool: Pool, counts: IntArray, record: Record) -> int:
    """How many of the next calls schedule the present decoding requests and nothing else; 0 if only a call can tell."""
    n_waiting = counts[at.N_PREEMPTED] + counts[at.N_QUEUED]
    n_decode = counts[at.N_DECODING]
    is_async = limits.flight_limit > 1
    if (
        record.is_on
        or n_decode == 0
        or counts[at.PREFILL_SLOT] >= 0
        or counts[at.N_IN_FLIGHT] != limits.flight_limit - 1
    ):
        return 0
    has_pending = is_async and counts[at.FLIGHT_FINISHES] > 0
    if n_waiting and (
        has_pending
        or counts[at.N_KEYED_OUTPUTS]
        or not (counts[at.IS_BLOCKED] or counts[at.N_RUNNING] == limits.max_num_seqs)
    ):
        return 0
    call = counts[at.N_CALLS]
    n = min(limits.max_jump, counts[at.NEXT_FINISH] - call + 1)
    if has_pending and (limits.has_clients or requests.follower.size):
        n = min(n, 1)  # an answer that is processed after the first of these calls can bring another request
    if counts[at.N_KEYED_OUTPUTS]:
        if has_pending:
            return 0
        n = min(n, next_registration(limits, slots, counts) - call + 1)
    n = calls_until_refresh(limits, counts, n, has_pending)
    n_free = pool.n[at.N_FREE]
    if n_free < (n // limits.block_size + 1) * n_decode:
        n_cycles = n_free // n_decode
        n_left = n_free - n_cycles * n_decode
        n_fit = n_cycles * limits.block_size
        while n_fit < n:
            n_left -= slots.crossings[(call + n_fit) % limits.block_size]
            if n_left < 0:
                break
            n_fit += 1
        n = min(n, n_fit)
    return n


@inlined
def _blocks_needed(slots: Slots, n_decode: int, first_call: int, n_calls: int) -> int:
    """Blocks that the decoding requests take in `n_calls` calls."""
    block_size = slots.crossings.size
    n_needed = n_calls // block_size * n_decode
    for k in range(n_calls % block_size):
        n_needed += slots.crossings[(first_call + k) % block_size]
    return n_needed


@inlined
def _begin_jump(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    times: Times,
    counts: IntArray,
    clock: FloatArray,
    record: Record,
    n_most: int,
) -> tuple[int, int, bool, float]:
    """Schedule up to `n_most` decode-only calls at once, but not past one that sees an arrival or an abort.

    Returns
    -------
    n_calls, n_blocks_left, has_finish, last_start_us
        Calls made; blocks that calls after the first of them still have to take, once the output before has freed
        what it frees; whether the last call computes anybody's last token; and when its step starts.
    """
    refresh_rejected(limits, slots, pool, counts, clock)
    call, n_decode = counts[at.N_CALLS], counts[at.N_DECODING]
    is_async = limits.flight_limit > 1
    n_waiting = counts[at.N_PREEMPTED] + counts[at.N_QUEUED]
    a, b, c = decode_line(times, n_decode, counts[at.SUM_BASE] + n_decode * (call + 1), n_waiting, clock[at.REJECTED])
    start = clock[at.FLIGHT_END] if is_async else clock[at.NOW]
    event = min(next_arrival(limits, requests, counts)[0], next_abort(limits, requests, counts))
    n = n_most
    if event < np.inf and n > 1:
        # An asynchronous call is made when the step before it starts: it sees what came until then.
        if not is_async:
            n = steps_until(a, b, c, event - start, n)
        elif event <= start:
            n = 1
        else:
            n = min(n, 1 + steps_until(a, b, c, event - start, n))
    last_call = call + n - 1
    n_needed = _blocks_needed(slots, n_decode, call, n)
    count_gaps(record.gap_counts, record.gap_sums, slots.stage_decoding, a, b, c, n)
    counts[at.N_CALLS] += n
    counts[at.N_STEPS] += n
    counts[at.HAS_ENDED] = 0
    clock[at.GPU_FREE] = start + elapsed(a, b, c, n)
    # Where an output frees blocks, only the first of these calls precedes it.
    n_first = n_needed
    if is_async and counts[at.FLIGHT_FINISHES]:
        n_first = slots.crossings[call % limits.block_size]
    take_blocks(pool, n_first)
    if counts[at.N_KEYED_OUTPUTS]:
        register_outputs(limits, requests, slots, pool, counts, last_call)
    has_finish = counts[at.NEXT_FINISH] == last_call
    if has_finish:
        retire_last_tokens(limits, requests, slots, counts, last_call)
    if not is_async:
        counts[at.LAST_OUTPUT] = last_call - 1
        _put_in_flight(counts, clock, last_call, clock[at.GPU_FREE], has_finish)
    return n, n_needed - n_first, has_finish, start + elapsed(a, b, c, n - 1)


@inlined
def _end_asynchronous_jump(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    counts: IntArray,
    clock: FloatArray,
    jump: tuple[int, int, bool, float],
) -> None:
    """The output before the jump is processed; process those of all its steps but the last, which is in flight."""
    n, n_blocks_left, has_finish, last_start_us = jump
    last_call = counts[at.N_CALLS] - 1
    take_blocks(pool, n_blocks_left)
    if n > 1:
        clock[at.NOW] = last_start_us
        counts[at.LAST_OUTPUT] = last_call - 2
        abort_due(limits, requests, slots, pool, counts, last_start_us, last_start_us)
        counts[at.LAST_OUTPUT] = last_call - 1
    _put_in_flight(counts, clock, last_call, clock[at.GPU_FREE], has_finish)


@inlined
def _has_work(counts: IntArray, record: Record) -> bool:
    """Whether vLLM would call ``schedule()``: also once after a request ended (recorded on request only)."""
    n_alive = counts[at.N_RUNNING] + counts[at.N_PREEMPTED] + counts[at.N_QUEUED]
    return n_alive > 0 or record.keep_empty * counts[at.HAS_ENDED] > 0


@inlined
def _take_in(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    counts: IntArray,
    clock: FloatArray,
    record: Record,
) -> int:
    """Take in what has arrived; an idle engine sleeps until something does. Returns `GO_ON` or why not."""
    if not _has_work(counts, record) and counts[at.N_IN_FLIGHT] == 0:
        if counts[at.N_ENDED] == requests.rows.size:
            return at.DONE
        time, _ = next_arrival(limits, requests, counts)
        if time == np.inf:
            return at.STUCK
        if limits.counts_calls:  # the next arrivals come now, whatever their number
            receive(limits, requests, counts, max(time, float(counts[at.N_CALLS])))
        else:
            clock[at.NOW] = max(clock[at.NOW], time)
    if is_full(limits, counts, record):
        return at.PAUSED
    now = float(counts[at.N_CALLS]) if limits.counts_calls else clock[at.NOW]
    receive(limits, requests, counts, now)
    abort_due(limits, requests, slots, pool, counts, now, now)
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
        counts: IntArray,
        clock: FloatArray,
        batch: IntArray,
        n_rounds: int,
    ) -> int:
        """Run until all requests have ended or something is needed from outside; returns why (see `layout`)."""
        _ = source_digest
        for _round in range(n_rounds):
            n_most, jump = 0, (0, 0, False, 0.0)
            is_call = is_step = True
            duration = clock[at.DURATION]
            if counts[at.RESUME]:
                counts[at.RESUME] = 0
            else:
                reason = _take_in(limits, requests, slots, pool, counts, clock, record)
                if reason != at.GO_ON:
                    return reason
                is_call = is_step = _has_work(counts, record)
                if is_call:
                    n_most = _jump_limit(limits, requests, slots, pool, counts, record)
                if is_call and n_most == 0:
                    _schedule(limits, requests, slots, pool, counts, clock, record, batch)
                    is_step = batch[at.DECODE_REQS] + batch[at.PREFILL_REQS] > 0
                    if record.is_on:
                        record_call(requests, slots, pool, counts, clock, record, batch, is_step)
                    if is_step and limits.needs_duration:
                        counts[at.RESUME] = 1
                        return at.NEEDS_DURATION
                    if is_step:
                        duration = step_duration(times, batch, clock[at.REJECTED])

            if n_most:
                jump = _begin_jump(limits, requests, slots, pool, times, counts, clock, record, n_most)
                if not clock[at.GPU_FREE] < np.inf:
                    return at.BAD_DURATION
            elif is_step:
                if not (duration >= 0.0 and duration < np.inf):
                    return at.BAD_DURATION
                _start_step(limits, requests, slots, counts, clock, record, batch, duration)
                counts[at.N_CALLS] += 1
            elif is_call:
                if record.keep_empty:
                    end = float(counts[at.N_CALLS]) if limits.counts_calls else max(clock[at.NOW], clock[at.GPU_FREE])
                    _put_in_flight(counts, clock, counts[at.N_CALLS], end, False)
                elif counts[at.N_IN_FLIGHT] + counts[at.N_RUNNING] == 0:
                    return at.STUCK
                counts[at.N_CALLS] += 1

            # While another batch may be in flight, scheduling it goes before waiting for an output.
            if n_most or counts[at.N_IN_FLIGHT] == limits.flight_limit or (counts[at.N_IN_FLIGHT] and not is_step):
                _process_output(limits, requests, slots, pool, counts, clock)
            if n_most and limits.flight_limit > 1:
                _end_asynchronous_jump(limits, requests, slots, pool, counts, clock, jump)
        return at.PAUSED

    return advance
