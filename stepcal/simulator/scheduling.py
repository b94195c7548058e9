"""A call of vLLM's ``schedule()``: who decodes, who is preempted, whose prompt goes on, who is admitted.

Decoding requests are not visited one by one. All of them get one token a call, so a request is described by the calls
in which it starts and finishes, and the batch by a few sums; who needs a new block in call c is the number of
requests whose context length meets the block size in that call (``slots.crossings``).
"""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.blocks import (
    find_cached,
    free_anonymous,
    free_ghost,
    free_keyed,
    free_unfindable,
    register,
    take_blocks,
    touch,
    touch_ghost,
)
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.groups import (
    allocate_running,
    blocks_missing,
    find_hits,
    free_groups,
    register_groups,
    take_hits,
    take_new,
)
from stepcal.simulator.layout import Limits, Pool, Record, Requests, Slots, State


@inlined
def tokens_in_flight(slots: Slots, state: State, slot: int) -> int:
    """Tokens of a running request in the batch before this call, if its output is not processed yet."""
    before = state.n_calls - 1
    if before <= state.last_output:
        return 0
    return slots.rows.chunk[slot] if slots.rows.chunk_call[slot] == before else 1


@inlined
def register_blocks(limits: Limits, pool: Pool, slots: Slots, slot: int, chain: int, n_full: int) -> None:
    """Let others find a request's blocks up to `n_full`."""
    if limits.has_groups:
        register_groups(limits, pool, slots, slot, chain, n_full)
    else:
        register(pool, slots, slot, chain, n_full)


@inlined
def blocks_of(n_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return (n_tokens + block_size - 1) // block_size


@inlined
def start_decoding(slots: Slots, state: State, slot: int, block_size: int, stage: int) -> None:
    """The request's last known token is computed in this call; the next calls give it one token each."""
    call = state.n_calls
    finish_call = call + slots.rows.output[slot] - slots.rows.generated[slot] - 1
    slots.rows.state[slot] = at.SLOT_DECODE
    slots.rows.finish_call[slot] = finish_call
    slots.rows.base[slot] = slots.rows.known[slot] - call - 1
    if slots.rows.generated[slot] == 0:
        slots.rows.first_call[slot] = call
    if finish_call == call:
        return
    state.n_decoding += 1
    state.sum_base += slots.rows.base[slot]
    state.next_finish = min(state.next_finish, finish_call)
    slots.crossings[-slots.rows.base[slot] % block_size] += 1
    slots.stage_decoding[stage] += 1
    if slots.rows.keyed_limit[slot] > slots.rows.known[slot] // block_size:
        state.n_keyed_outputs += 1


@inlined
def stop_decoding(slots: Slots, state: State, slot: int, block_size: int, stage: int) -> None:
    """Take a request out of the sums over decoding requests."""
    state.n_decoding -= 1
    state.sum_base -= slots.rows.base[slot]
    slots.crossings[-slots.rows.base[slot] % block_size] -= 1
    slots.stage_decoding[stage] -= 1
    if slots.rows.keyed_limit[slot] > slots.rows.known[slot] // block_size:
        state.n_keyed_outputs -= 1


@inlined
def find_next_finish(slots: Slots, state: State, call: int) -> None:
    """Smallest finish call of the running requests that is not before `call`."""
    smallest = at.NEVER
    for i in range(state.n_running):
        finish = slots.running_finish[i]
        if finish >= call and finish < smallest:
            smallest = finish
    state.next_finish = smallest


@inlined
def retire_last_tokens(limits: Limits, requests: Requests, slots: Slots, state: State, call: int) -> int:
    """Requests whose last token is computed in `call` are not scheduled after it. Returns their number."""
    n_last = 0
    for i in range(state.n_running):
        if slots.running_finish[i] == call:
            slot = slots.running[i]
            stop_decoding(slots, state, slot, limits.block_size, requests.rows.stage[slots.rows.request[slot]])
            n_last += 1
    find_next_finish(slots, state, call + 1)
    return n_last


@compiled
def register_outputs(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, call: int) -> None:
    """Register blocks of generated text: synchronously when scheduled, asynchronously when the token is known."""
    lag = 0 if limits.flight_limit > 1 else 1
    for i in range(state.n_running):
        slot = slots.running[i]
        if slots.rows.state[slot] == at.SLOT_DECODE and slots.rows.finish_call[slot] >= call:
            n_full = (slots.rows.base[slot] + call + lag) // limits.block_size
            register(pool, slots, slot, requests.rows.chain[slots.rows.request[slot]], n_full)


@compiled
def next_registration(limits: Limits, slots: Slots, state: State) -> int:
    """The next call in which a block of generated text that others can hit becomes full."""
    lag = 0 if limits.flight_limit > 1 else 1
    earliest = at.NEVER
    for i in range(state.n_running):
        slot = slots.running[i]
        if slots.rows.state[slot] == at.SLOT_DECODE and slots.rows.n_keyed[slot] < slots.rows.keyed_limit[slot]:
            call = limits.block_size * (slots.rows.n_keyed[slot] + 1) - slots.rows.base[slot] - lag
            earliest = min(earliest, call)
    return earliest


@inlined
def full_blocks(limits: Limits, slots: Slots, slot: int, computed: int) -> int:
    """Full blocks of a decoding request whose tokens are all known; asynchronously the last token is in flight."""
    lag = 1 if limits.flight_limit > 1 else 0
    return max(slots.rows.known[slot], computed - lag) // limits.block_size


@compiled
def _preempt_last(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, now_us: float) -> int:
    """Preempt the last running request: all its blocks are freed, and it goes to the front of the queue."""
    call = state.n_calls
    state.n_running -= 1
    slot = slots.running[state.n_running]
    request = slots.rows.request[slot]
    if slots.rows.state[slot] == at.SLOT_DECODE:
        computed = slots.rows.base[slot] + call
        n_full = full_blocks(limits, slots, slot, computed)
        if slots.rows.finish_call[slot] >= call:
            stop_decoding(slots, state, slot, limits.block_size, requests.rows.stage[request])
            if state.next_finish == slots.rows.finish_call[slot]:
                find_next_finish(slots, state, call)
        slots.rows.generated[slot] = slots.rows.output[slot] - slots.rows.finish_call[slot] + call - 1
        slots.rows.last_token_us[slot] = now_us
    else:
        computed = slots.rows.computed[slot]
        n_full = computed // limits.block_size
        state.prefill_slot = -1
    slots.rows.state[slot] = at.SLOT_PREEMPTED
    n_blocks = blocks_of(computed, limits.block_size)
    n_keyed = slots.rows.n_keyed[slot]
    if limits.has_groups:
        free_groups(limits, pool, slots, slot)
    elif limits.has_caching:
        free_unfindable(limits, pool, n_blocks - max(n_full, n_keyed))
        free_ghost(pool, slot, n_full - n_keyed)
    else:
        free_anonymous(pool, n_blocks)
    if not limits.has_groups:
        free_keyed(pool, slots, slot)
    slots.rows.known[slot] = slots.rows.prompt[slot] + slots.rows.generated[slot]
    slots.preempted[state.n_preempted] = slot
    state.n_preempted += 1
    state.has_changed = 1
    state.n_preemptions += 1
    state.is_blocked = 0
    requests.rows.preemptions[request] += 1
    return slot


@compiled
def schedule_short_of_blocks(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    state: State,
    record: Record,
    last_token_us: float,
) -> int:
    """Give each decoding request its block in list order, preempting from the end of the list while none is free.

    Returns
    -------
    n_preempted
    """
    call = state.n_calls
    lag = 0 if limits.flight_limit > 1 else 1
    n_preempted, i = 0, 0
    while i < state.n_running:
        slot = slots.running[i]
        if slots.rows.state[slot] == at.SLOT_DECODE and slots.rows.finish_call[slot] >= call:
            victim = -1
            computed = slots.rows.base[slot] + call
            if limits.has_groups:
                in_flight = tokens_in_flight(slots, state, slot) if limits.waits_for_windows_in_flight else 0
                while victim != slot and not allocate_running(
                    limits, pool, slots, state, slot, computed, computed + 1, in_flight
                ):
                    victim = _preempt_last(limits, requests, slots, pool, state, last_token_us)
                    note_preemption(record, state, slots.rows.request[victim])
                    n_preempted += 1
                if victim == slot:
                    break
            elif computed % limits.block_size == 0:
                while pool.n.free == 0 and victim != slot:
                    victim = _preempt_last(limits, requests, slots, pool, state, last_token_us)
                    note_preemption(record, state, slots.rows.request[victim])
                    n_preempted += 1
                if victim == slot:
                    break
                take_blocks(pool, 1)
            chain = requests.rows.chain[slots.rows.request[slot]]
            register_blocks(limits, pool, slots, slot, chain, (computed + lag) // limits.block_size)
        i += 1
    return n_preempted


@inlined
def note_preemption(record: Record, state: State, request: int) -> None:
    """Keep a preempted request for the step's row."""
    if record.is_on:
        record.preempted[state.n_row_preempted] = request
        state.n_row_preempted += 1


@compiled
def schedule_prefill(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, record: Record, budget: int
) -> int:
    """The next chunk of the one prompt that is computed in part (always the last of the running list).

    Returns
    -------
    chunk
        Tokens, or 0 if it had to be preempted because its blocks were short.
    """
    slot = state.prefill_slot
    request = slots.rows.request[slot]
    computed = slots.rows.computed[slot]
    chunk = min(slots.rows.known[slot] - computed, budget)
    if limits.has_groups:
        in_flight = tokens_in_flight(slots, state, slot) if limits.waits_for_windows_in_flight else 0
        fits = allocate_running(limits, pool, slots, state, slot, computed, computed + chunk, in_flight)
    else:
        n_new = blocks_of(computed + chunk, limits.block_size) - blocks_of(computed, limits.block_size)
        fits = n_new <= pool.n.free
        if fits:
            take_blocks(pool, n_new)
    if not fits:
        _preempt_last(limits, requests, slots, pool, state, np.nan)
        note_preemption(record, state, request)
        return 0
    _add_chunk(limits, requests, slots, pool, state, slot, computed, chunk)
    if slots.rows.state[slot] == at.SLOT_DECODE:
        state.prefill_slot = -1
        slots.running_finish[state.n_running - 1] = slots.rows.finish_call[slot]
    return chunk


@inlined
def _add_chunk(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    state: State,
    slot: int,
    computed: int,
    chunk: int,
) -> None:
    request = slots.rows.request[slot]
    slots.rows.chunk[slot] = chunk
    slots.rows.chunk_call[slot] = state.n_calls
    slots.rows.computed[slot] = computed + chunk
    register_blocks(limits, pool, slots, slot, requests.rows.chain[request], (computed + chunk) // limits.block_size)
    if computed + chunk == slots.rows.known[slot]:
        start_decoding(slots, state, slot, limits.block_size, requests.rows.stage[request])


@inlined
def head_of_queue(requests: Requests, slots: Slots, state: State) -> int:
    """The slot of the request that is next to be admitted; a fresh one is shown in the next free slot."""
    if state.n_preempted:
        return slots.preempted[state.n_preempted - 1]
    while requests.rows.status[requests.queue[state.queue_head]] != at.WAITING:
        state.queue_head += 1  # aborted while it waited
    request = requests.queue[state.queue_head]
    slot = slots.free[state.n_free_slots - 1]
    slots.rows.request[slot] = request
    slots.rows.prompt[slot] = requests.rows.prompt_tokens[request]
    slots.rows.output[slot] = requests.rows.output_tokens[request]
    slots.rows.generated[slot] = 0
    slots.rows.known[slot] = requests.rows.prompt_tokens[request]
    return slot


@inlined
def _take_first_blocks(limits: Limits, slots: Slots, pool: Pool, slot: int, chain: int, budget: int) -> tuple[int, int]:
    """Cached and new blocks for a request's first chunk: its tokens and those cached, or (0, 0) if it does not fit."""
    block_size, known = limits.block_size, slots.rows.known[slot]
    n_hits, n_evictable = find_cached(pool, slots, slot, chain, (known - 1) // block_size)
    n_own = 0
    if pool.ghost[slot]:
        n_own = pool.entries.count[pool.ghost[slot]]
    cached = (n_hits + n_own) * block_size
    chunk = min(known - cached, budget)
    n_new = blocks_of(chunk, block_size)
    n_needed = blocks_of(known - cached, block_size) if limits.admits_whole_sequences else n_new
    if n_needed + n_evictable + n_own > pool.n.free:
        return 0, 0
    touch(pool, slots, slot, n_hits)
    if n_own:
        touch_ghost(pool, slot)
    take_blocks(pool, n_new)
    return chunk, cached


@compiled
def _take_first_blocks_of_groups(
    limits: Limits, slots: Slots, pool: Pool, slot: int, chain: int, budget: int
) -> tuple[int, int]:
    """The same where layers differ in what they read."""
    known = slots.rows.known[slot]
    n_hits = find_hits(limits, pool, slots, slot, chain, known)
    cached = n_hits * limits.block_size
    chunk = min(known - cached, budget)
    if (
        limits.admits_whole_sequences and blocks_missing(limits, pool, slots, slot, known, n_hits, 1) > pool.n.free
    ) or blocks_missing(limits, pool, slots, slot, cached + chunk, n_hits, 0) > pool.n.free:
        return 0, 0
    take_hits(limits, pool, slots, slot, n_hits)
    take_new(limits, pool, slots, slot, cached + chunk)
    return chunk, cached


@inlined
def admit(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, slot: int, budget: int
) -> tuple[int, int]:
    """Admit the head of the queue if its first chunk fits.

    Returns
    -------
    chunk, cached_tokens
        Tokens to compute in this call and tokens found in the prefix cache; a chunk of 0 if the blocks do not suffice.
    """
    request = slots.rows.request[slot]
    chain = requests.rows.chain[request]
    if limits.has_groups:
        chunk, cached = _take_first_blocks_of_groups(limits, slots, pool, slot, chain, budget)
    else:
        chunk, cached = _take_first_blocks(limits, slots, pool, slot, chain, budget)
    if chunk == 0:
        return 0, 0
    if state.n_preempted:
        state.n_preempted -= 1
    else:
        state.queue_head += 1
        state.n_queued -= 1
        state.n_free_slots -= 1
        requests.rows.status[request] = at.RUNNING
        requests.rows.cached_tokens[request] = cached
        slots.rows.first_call[slot] = at.NEVER
        slots.rows.finish_call[slot] = -1
        slots.rows.keyed_limit[slot] = 0
        if pool.chain_start[chain + 1] > pool.chain_start[chain]:
            slots.rows.keyed_limit[slot] = pool.segments.end[pool.chain_start[chain + 1] - 1]
    slots.rows.state[slot] = at.SLOT_PREFILL
    _add_chunk(limits, requests, slots, pool, state, slot, cached, chunk)
    i = state.n_running
    slots.running[i] = slot
    if slots.rows.state[slot] == at.SLOT_DECODE:
        slots.running_finish[i] = slots.rows.finish_call[slot]
    else:
        slots.running_finish[i] = at.NEVER
        state.prefill_slot = slot
    state.n_running = i + 1
    state.has_changed = 1
    return chunk, cached
