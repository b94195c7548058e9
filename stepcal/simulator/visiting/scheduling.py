"""A call of vLLM's ``schedule()``, request by request, as `vllm/v1/core/sched/scheduler.py` does it."""

from stepcal.simulator import layout as at
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
from stepcal.simulator.layout import Batch, Limits, Pool, Record, Requests, Slots, State
from stepcal.simulator.offload import refresh_rejected
from stepcal.simulator.scheduling import blocks_of, note_preemption
from stepcal.simulator.visiting.layout import Visits
from stepcal.simulator.visiting.leaving import leave_running
from stepcal.simulator.visiting.waiting import arrival_time, head, pop, push
from stepcal.simulator.windows import chunk_window_kv, chunk_window_pairs


@inlined
def _most_tokens(limits: Limits, state: State) -> int:
    """Tokens that a request may get in this call."""
    is_lone = state.n_running + state.n_preempted + state.n_queued <= 1
    if limits.long_prefill_token_threshold == 0 or (is_lone and limits.spares_lone_requests):
        return limits.max_num_batched_tokens
    return limits.long_prefill_token_threshold


@compiled
def _place_of_victim(limits: Limits, requests: Requests, slots: Slots, visits: Visits, state: State) -> int:
    """Where in the running list stands who gives up its blocks: last, or the last to arrive of the least important."""
    if not limits.by_priority:
        return state.n_running - 1
    found = 0
    for i in range(1, state.n_running):
        a, b = slots.rows.request[slots.running[found]], slots.rows.request[slots.running[i]]
        if visits.priority[b] > visits.priority[a] or (
            visits.priority[b] == visits.priority[a]
            and arrival_time(requests, visits, b) > arrival_time(requests, visits, a)
        ):
            found = i
    return found


@compiled
def _preempt(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    visits: Visits,
    state: State,
    record: Record,
    place: int,
) -> None:
    """All blocks of the running request at a place are free; it waits again, with nothing computed."""
    slot = slots.running[place]
    request = slots.rows.request[slot]
    leave_running(slots, state, place)
    free_groups(limits, pool, slots, slot)
    slots.rows.computed[slot] = 0
    slots.rows.chunk_call[slot] = -1
    slots.rows.state[slot] = at.SLOT_PREEMPTED
    push(limits, requests, visits, request, slot)
    state.n_preempted += 1
    state.has_changed = 1
    state.n_preemptions += 1
    visits.n.vain += 1
    requests.rows.preemptions[request] += 1
    note_preemption(record, state, request)


@inlined
def _register(limits: Limits, requests: Requests, slots: Slots, pool: Pool, slot: int, n_tokens: int) -> None:
    """Let others find the full blocks of a request's first tokens, as far as these are known."""
    n_tokens = min(n_tokens, slots.rows.prompt[slot] + slots.rows.generated[slot])
    n_full = n_tokens // limits.block_size
    if n_full > slots.rows.n_keyed[slot]:
        register_groups(limits, pool, slots, slot, requests.rows.chain[slots.rows.request[slot]], n_full)


@inlined
def _needs_no_block(limits: Limits, pool: Pool, slots: Slots, slot: int, n_tokens: int) -> bool:
    """Whether a running request's blocks hold so many tokens, and no window gives back what it has left behind."""
    if limits.has_groups:
        return False
    return blocks_of(n_tokens, limits.block_size) <= slots.table_len[slot, 0]


@compiled
def schedule_running(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    visits: Visits,
    state: State,
    record: Record,
    most_tokens: int,
) -> tuple[int, int]:
    """Tokens for the running requests in order, preempting while blocks are short.

    Returns
    -------
    budget, n_preempted
        Tokens left, and requests that were preempted.
    """
    budget, call = limits.max_num_batched_tokens, state.n_calls
    place, n_preempted = 0, 0
    while place < state.n_running and budget > 0:
        slot = slots.running[place]
        known = slots.rows.prompt[slot] + slots.rows.generated[slot] + slots.rows.sampling[slot]
        if (
            slots.rows.sampling[slot]
            and slots.rows.generated[slot] + slots.rows.sampling[slot] == slots.rows.output[slot]
        ):
            place += 1  # its last token is in flight
            continue
        computed = slots.rows.computed[slot]
        chunk = min(known - computed, most_tokens, budget)
        in_flight = slots.rows.unprocessed[slot] if limits.waits_for_windows_in_flight else 0
        is_victim = False
        while not is_victim and not (
            _needs_no_block(limits, pool, slots, slot, computed + chunk)
            or allocate_running(limits, pool, slots, state, slot, computed, computed + chunk, in_flight)
        ):
            k = _place_of_victim(limits, requests, slots, visits, state)
            victim = slots.running[k]
            is_victim = victim == slot
            had_turn = slots.rows.chunk_call[victim] == call
            if had_turn:  # it gives its tokens back
                budget += slots.rows.chunk[victim]
            if had_turn or (k < place and limits.keeps_place_after_preemption):
                place -= 1
            _preempt(limits, requests, slots, pool, visits, state, record, k)
            n_preempted += 1
        if is_victim:
            if limits.by_priority and limits.keeps_place_after_preemption:
                continue
            break
        _register(limits, requests, slots, pool, slot, computed + chunk)
        slots.rows.chunk[slot], slots.rows.chunk_call[slot] = chunk, call
        budget -= chunk
        place += 1
    return budget, n_preempted


@compiled
def _take_first_blocks(
    limits: Limits, slots: Slots, pool: Pool, slot: int, chain: int, most_tokens: int, budget: int
) -> tuple[int, int]:
    """Cached and new blocks for a request's first chunk: its tokens and those cached, or (0, 0) if it does not fit."""
    known = slots.rows.prompt[slot] + slots.rows.generated[slot]
    n_hits = find_hits(limits, pool, slots, slot, chain, known)
    cached = n_hits * limits.block_size
    chunk = min(known - cached, most_tokens)
    if chunk > budget and not limits.chunks_prompts:
        return 0, 0
    chunk = min(chunk, budget)
    if limits.admits_whole_sequences and blocks_missing(limits, pool, slots, slot, known, n_hits, 1) > pool.n.free:
        return 0, 0
    if blocks_missing(limits, pool, slots, slot, cached + chunk, n_hits, 0) > pool.n.free:
        return 0, 0
    take_hits(limits, pool, slots, slot, n_hits)
    take_new(limits, pool, slots, slot, cached + chunk)
    return chunk, cached


@compiled
def admit_waiting(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    visits: Visits,
    state: State,
    record: Record,
    most_tokens: int,
    budget: int,
) -> None:
    """Admit waiting requests in order, until one does not fit."""
    while budget > 0 and state.n_running < limits.max_num_seqs:
        slot = head(requests, slots, visits, state)
        if slot < 0:
            return
        request = slots.rows.request[slot]
        chain = requests.rows.chain[request]
        chunk, cached = _take_first_blocks(limits, slots, pool, slot, chain, most_tokens, budget)
        if chunk == 0:
            return
        if visits.waiting.slot[0] >= 0:
            state.n_preempted -= 1
        else:
            state.n_queued -= 1
            state.n_free_slots -= 1
            requests.rows.status[request] = at.RUNNING
            requests.rows.cached_tokens[request] = cached
        pop(visits)
        slots.rows.known[slot] = slots.rows.prompt[slot] + slots.rows.generated[slot]
        slots.rows.computed[slot] = cached
        slots.rows.chunk[slot], slots.rows.chunk_call[slot] = chunk, state.n_calls
        slots.rows.state[slot] = at.SLOT_PREFILL
        _register(limits, requests, slots, pool, slot, cached + chunk)
        slots.running[state.n_running] = slot
        state.n_running += 1
        state.has_changed = 1
        budget -= chunk
        if record.is_on:
            record.cached_request[state.n_row_cached] = request
            record.cached_tokens[state.n_row_cached] = cached
            state.n_row_cached += 1


@inlined
def _add_to_batch(limits: Limits, pool: Pool, batch: Batch, context: int, chunk: int, is_prefill: bool) -> None:
    if not is_prefill:
        batch.decode_reqs += 1
        batch.decode_kv += context + 1
        if limits.has_windows:
            batch.window_kv += chunk_window_kv(pool, context, 1)
        return
    batch.prefill_reqs += 1
    batch.prefill_tokens += chunk
    batch.prefill_kv += context + chunk
    batch.prefill_pairs += chunk * context + chunk * (chunk + 1) // 2
    if limits.has_windows:
        batch.prefill_window_kv += chunk_window_kv(pool, context, chunk)
        batch.window_pairs += chunk_window_pairs(pool, context, chunk)


@compiled
def commit(
    limits: Limits, slots: Slots, pool: Pool, visits: Visits, state: State, record: Record, batch: Batch
) -> None:
    """What this call has scheduled counts as computed from here on. Fills `batch` and the flight's list."""
    call, n, item = state.n_calls, 0, state.n_row_items
    flight = call % 2
    for i in range(state.n_running):
        slot = slots.running[i]
        if slots.rows.chunk_call[slot] != call:
            continue
        chunk, context = slots.rows.chunk[slot], slots.rows.computed[slot]
        is_prefill = context < slots.rows.known[slot]
        _add_to_batch(limits, pool, batch, context, chunk, is_prefill)
        slots.rows.computed[slot] = context + chunk
        slots.rows.unprocessed[slot] += chunk
        outputs = slots.rows.generated[slot] + slots.rows.sampling[slot]
        samples = context + chunk == slots.rows.prompt[slot] + outputs
        if samples:
            slots.rows.sampling[slot] += 1
            if outputs + 1 == slots.rows.output[slot]:
                batch.has_finish += 1
        visits.flight_request[flight, n] = slots.rows.request[slot]
        visits.flight_slot[flight, n] = slot
        visits.flight_tokens[flight, n] = chunk
        visits.flight_samples[flight, n] = samples
        n += 1
        if record.is_on:
            record.item_request[item] = slots.rows.request[slot]
            record.item_tokens[item] = chunk
            record.item_kv[item] = context + chunk
            record.item_is_prefill[item] = is_prefill
            item += 1
    visits.flight_size[flight] = n
    state.n_row_items = item


@inlined
def schedule(
    limits: Limits,
    requests: Requests,
    slots: Slots,
    pool: Pool,
    visits: Visits,
    state: State,
    record: Record,
    batch: Batch,
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
    batch.decode_reqs = batch.decode_kv = 0
    batch.window_kv = batch.prefill_window_kv = batch.window_pairs = 0
    most_tokens = _most_tokens(limits, state)
    budget, n_preempted = schedule_running(limits, requests, slots, pool, visits, state, record, most_tokens)
    if n_preempted == 0:  # a call that preempts admits nobody
        admit_waiting(limits, requests, slots, pool, visits, state, record, most_tokens, budget)
    commit(limits, slots, pool, visits, state, record, batch)
    batch.n_waiting = state.n_preempted + state.n_queued
    return batch.decode_reqs + batch.prefill_reqs > 0
