"""Many calls at once: while the same requests decode and nothing else happens, calls differ only in their KV tokens.

A jump goes up to the next arrival, finish, abort or shortage of blocks; its durations are summed in closed form.
"""

import numpy as np

from stepcal.simulator.blocks import take_blocks
from stepcal.simulator.clock import count_gaps, decode_line, elapsed, steps_until
from stepcal.simulator.compilation import inlined
from stepcal.simulator.intake import abort_due, next_abort, next_arrival
from stepcal.simulator.layout import Limits, Pool, Record, Requests, Slots, State, Times
from stepcal.simulator.offload import calls_until_refresh, refresh_rejected
from stepcal.simulator.scheduling import next_registration, register_outputs, retire_last_tokens


@inlined
def put_in_flight(state: State, call: int, end: float, has_finish: bool) -> None:
    """A batch is submitted: it runs after those before it."""
    i = state.n_in_flight
    state.flight_call[i] = call
    state.flight_finishes[i] = 1 if has_finish else 0
    state.flight_end_us[i] = end
    state.n_in_flight = i + 1


@inlined
def jump_limit(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, record: Record) -> int:
    """How many of the next calls schedule the present decoding requests and nothing else; 0 if only a call can tell."""
    n_waiting = state.n_preempted + state.n_queued
    n_decode = state.n_decoding
    is_async = limits.flight_limit > 1
    if record.is_on or limits.has_groups or limits.has_windows or n_decode == 0 or state.prefill_slot >= 0:
        return 0
    if state.n_in_flight != limits.flight_limit - 1:
        return 0
    has_pending = is_async and state.flight_finishes[0] > 0
    if n_waiting and (
        has_pending or state.n_keyed_outputs or not (state.is_blocked or state.n_running == limits.max_num_seqs)
    ):
        return 0
    call = state.n_calls
    n = min(limits.max_jump, state.next_finish - call + 1)
    if has_pending and (limits.has_clients or requests.follower.size):
        n = min(n, 1)  # an answer that is processed after the first of these calls can bring another request
    if state.n_keyed_outputs:
        if has_pending:
            return 0
        n = min(n, next_registration(limits, slots, state) - call + 1)
    n = calls_until_refresh(limits, state, n, has_pending)
    n_free = pool.n.free
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
def begin_jump(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    times: Times,
    state: State,
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
    refresh_rejected(limits, slots, pool, state)
    call, n_decode = state.n_calls, state.n_decoding
    is_async = limits.flight_limit > 1
    n_waiting = state.n_preempted + state.n_queued
    a, b, c = decode_line(times, n_decode, state.sum_base + n_decode * (call + 1), n_waiting, state.rejected)
    start = state.flight_end_us[0] if is_async else state.now_us
    event = min(next_arrival(limits, requests, state)[0], next_abort(limits, requests, state))
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
    state.n_calls += n
    state.n_steps += n
    state.has_ended = 0
    state.gpu_free_us = start + elapsed(a, b, c, n)
    # Where an output frees blocks, only the first of these calls precedes it.
    n_first = n_needed
    if is_async and state.flight_finishes[0]:
        n_first = slots.crossings[call % limits.block_size]
    take_blocks(pool, n_first)
    if state.n_keyed_outputs:
        register_outputs(limits, requests, slots, pool, state, last_call)
    has_finish = state.next_finish == last_call
    if has_finish:
        retire_last_tokens(limits, requests, slots, state, last_call)
    if not is_async:
        state.last_output = last_call - 1
        put_in_flight(state, last_call, state.gpu_free_us, has_finish)
    return n, n_needed - n_first, has_finish, start + elapsed(a, b, c, n - 1)


@inlined
def end_asynchronous_jump(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    state: State,
    jump: tuple[int, int, bool, float],
) -> None:
    """The output before the jump is processed; process those of all its steps but the last, which is in flight."""
    n, n_blocks_left, has_finish, last_start_us = jump
    last_call = state.n_calls - 1
    take_blocks(pool, n_blocks_left)
    if n > 1:
        state.now_us = last_start_us
        state.last_output = last_call - 2
        abort_due(limits, requests, slots, pool, state, last_start_us, last_start_us)
        state.last_output = last_call - 1
    put_in_flight(state, last_call, state.gpu_free_us, has_finish)
