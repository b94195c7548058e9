"""How requests end: finished when the output with their last token is processed, or aborted by their client."""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.blocks import drop_ghost, free_anonymous, free_keyed, free_unfindable
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.groups import forget_private, free_groups
from stepcal.simulator.layout import Limits, Pool, Requests, Slots, State
from stepcal.simulator.scheduling import blocks_of, find_next_finish, full_blocks, register_blocks, stop_decoding
from stepcal.simulator.sending import leave, push_arrival
from stepcal.simulator.visiting.leaving import abort_visited


@compiled
def _tokens_generated(slots: Slots, slot: int, last_output: int) -> int:
    """Output tokens that exist once the output of call `last_output` is processed."""
    if slots.rows.state[slot] == at.SLOT_DECODE:
        return max(
            slots.rows.generated[slot], slots.rows.output[slot] - max(0, slots.rows.finish_call[slot] - last_output)
        )
    return slots.rows.generated[slot]


@inlined
def _end(requests: Requests, slots: Slots, state: State, request: int, status: int, now_us: float) -> None:
    requests.rows.status[request] = status
    requests.rows.finish_us[request] = now_us
    state.n_ended += 1
    state.has_ended = 1
    state.has_changed = 1
    state.is_blocked = 0


@inlined
def _free_slot(slots: Slots, state: State, slot: int) -> None:
    slots.rows.state[slot] = at.SLOT_FREE
    slots.free[state.n_free_slots] = slot
    state.n_free_slots += 1


@compiled
def _follow_up(limits: Limits, requests: Requests, state: State, request: int, now_us: float) -> None:
    """Send the next turn of a session, its think time after the answer reached the client."""
    follower = requests.follower[request]
    if follower < 0:
        return
    due = now_us + limits.api_after_us + requests.rows.arrival_us[follower] + limits.api_before_us
    push_arrival(requests, state, due, follower)


@inlined
def _free_all(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, slot: int, n_blocks: int, n_full: int
) -> None:
    """A running request gives back its blocks, of which `n_full` are full and their tokens known."""
    if limits.has_groups:
        free_groups(limits, pool, slots, slot)
        _forget_own(limits, requests, slots, pool, slot)
        return
    free_unfindable(limits, pool, n_blocks - n_full)
    free_anonymous(pool, n_full - slots.rows.n_keyed[slot])
    free_keyed(pool, slots, slot)


@inlined
def _forget_own(limits: Limits, requests: Requests, slots: Slots, pool: Pool, slot: int) -> None:
    """Nobody can hit the blocks any more that only an ended request could."""
    if limits.has_groups:
        forget_private(limits, pool, slots, slot, requests.rows.chain[slots.rows.request[slot]])
    else:
        drop_ghost(pool, slot)


@compiled
def finish_requests(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, call: int, now_us: float
) -> None:
    """Process the output of `call`: requests whose last token it computed give back slot and blocks, in list order."""
    n_kept = 0
    for i in range(state.n_running):
        slot = slots.running[i]
        if slots.running_finish[i] != call:
            slots.running[n_kept] = slot
            slots.running_finish[n_kept] = slots.running_finish[i]
            n_kept += 1
            continue
        request = slots.rows.request[slot]
        kv_tokens = slots.rows.prompt[slot] + slots.rows.output[slot] - 1
        n_full = kv_tokens // limits.block_size
        register_blocks(limits, pool, slots, slot, requests.rows.chain[request], n_full)
        _free_all(limits, requests, slots, pool, slot, blocks_of(kv_tokens, limits.block_size), n_full)
        finish(limits, requests, slots, state, slot, now_us)
    state.n_running = n_kept
    i = 0
    while i < state.n_preempted:  # preempted while its last token was in flight
        slot = slots.preempted[i]
        if slots.rows.generated[slot] == slots.rows.output[slot] and slots.rows.finish_call[slot] == call:
            _forget_own(limits, requests, slots, pool, slot)
            _remove_preempted(slots, state, i)
            finish(limits, requests, slots, state, slot, now_us)
        else:
            i += 1


@inlined
def finish(limits: Limits, requests: Requests, slots: Slots, state: State, slot: int, now_us: float) -> None:
    """A request has its last token: its slot is free, and its client may go on."""
    request = slots.rows.request[slot]
    requests.rows.generated_tokens[request] = slots.rows.output[slot]
    _end(requests, slots, state, request, at.FINISHED, now_us)
    _free_slot(slots, state, slot)
    if requests.follower.size:
        _follow_up(limits, requests, state, request, now_us)
    if limits.has_clients:
        answered_us = now_us + limits.api_after_us + limits.api_before_us
        gives_up_us = requests.rows.arrival_us[request] + limits.timeout_us
        leave(limits, requests, state, request, min(answered_us, gives_up_us))


@compiled
def _remove_preempted(slots: Slots, state: State, i: int) -> None:
    state.n_preempted -= 1
    for j in range(i, state.n_preempted):
        slots.preempted[j] = slots.preempted[j + 1]


@compiled
def abort_request(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, request: int, now_us: float
) -> None:
    """The client gave up: the request leaves its queue and its blocks are free at once."""
    if requests.rows.status[request] == at.WAITING:
        state.n_queued -= 1
    elif limits.visits_each:
        _free_slot(slots, state, abort_visited(limits, requests, slots, pool, state, request))
    else:
        _abort_admitted(limits, requests, slots, pool, state, request)
    _end(requests, slots, state, request, at.ABORTED, now_us)
    if limits.has_clients:
        leave(limits, requests, state, request, requests.rows.arrival_us[request] + limits.timeout_us)
    if requests.follower.size:  # the turns that would have followed are never sent
        turn = requests.follower[request]
        while turn >= 0:
            requests.rows.status[turn] = at.NOT_SENT
            state.n_ended += 1
            turn = requests.follower[turn]


@compiled
def _abort_admitted(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, request: int) -> None:
    call = state.n_calls
    last_output = state.last_output
    for i in range(state.n_preempted):
        slot = slots.preempted[i]
        if slots.rows.request[slot] == request:
            # A token in flight when it was preempted counts only if its output was processed.
            in_flight = (
                slots.rows.finish_call[slot] - (slots.rows.output[slot] - slots.rows.generated[slot]) > last_output
            )
            requests.rows.generated_tokens[request] = slots.rows.generated[slot] - (1 if in_flight else 0)
            if slots.rows.first_call[slot] > last_output:
                requests.rows.first_token_us[request] = np.nan
                requests.rows.generated_tokens[request] = 0
            _forget_own(limits, requests, slots, pool, slot)
            _remove_preempted(slots, state, i)
            _free_slot(slots, state, slot)
            return
    i = 0
    while slots.rows.request[slots.running[i]] != request:
        i += 1
    slot = slots.running[i]
    requests.rows.generated_tokens[request] = _tokens_generated(slots, slot, last_output)
    if slots.rows.first_call[slot] > last_output:
        requests.rows.first_token_us[request] = np.nan
    if slots.rows.state[slot] == at.SLOT_DECODE:
        computed = slots.rows.base[slot] + min(call, slots.rows.finish_call[slot] + 1)
        if slots.rows.finish_call[slot] >= call:
            stop_decoding(slots, state, slot, limits.block_size, requests.rows.stage[request])
        n_full = full_blocks(limits, slots, slot, computed)
    else:
        computed = slots.rows.computed[slot]
        n_full = computed // limits.block_size
        state.prefill_slot = -1
    n_full = max(n_full, slots.rows.n_keyed[slot])
    _free_all(limits, requests, slots, pool, slot, blocks_of(computed, limits.block_size), n_full)
    state.n_running -= 1
    for j in range(i, state.n_running):
        slots.running[j] = slots.running[j + 1]
        slots.running_finish[j] = slots.running_finish[j + 1]
    _free_slot(slots, state, slot)
    find_next_finish(slots, state, call)
