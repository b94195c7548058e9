"""The step record: one row a step, with the requests of its batch, written into buffers that the caller drains."""

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Batch, Limits, Pool, Record, Slots, State


@compiled
def _write_row(slots: Slots, pool: Pool, state: State, record: Record, batch: Batch) -> None:
    """Write the scheduled batch into the step record."""
    call, item = state.n_calls, state.n_row_items
    for i in range(state.n_running):
        slot = slots.running[i]
        is_prefill = slots.rows.chunk_call[slot] == call
        if not is_prefill and (slots.rows.state[slot] != at.SLOT_DECODE or slots.rows.finish_call[slot] < call):
            continue  # its last token is in flight
        record.item_request[item] = slots.rows.request[slot]
        record.item_tokens[item] = slots.rows.chunk[slot] if is_prefill else 1
        record.item_kv[item] = slots.rows.computed[slot] if is_prefill else slots.rows.base[slot] + call + 1
        record.item_is_prefill[item] = is_prefill
        item += 1
    state.n_row_items = item
    _write_totals(pool, state, record, batch)


@compiled
def _write_totals(pool: Pool, state: State, record: Record, batch: Batch) -> None:
    """The row of a batch whose requests are written."""
    row, rows = state.n_rows, record.rows
    rows.call[row] = state.n_calls
    rows.running_depth[row] = state.n_running
    rows.waiting_depth[row] = batch.n_waiting
    rows.num_prefill_reqs[row] = batch.prefill_reqs
    rows.num_decode_reqs[row] = batch.decode_reqs
    rows.prefill_tokens[row] = batch.prefill_tokens
    rows.decode_tokens[row] = batch.decode_reqs
    rows.num_finished[row] = batch.has_finish
    rows.num_preempted[row] = state.n_row_preempted - (rows.preempted_end[row - 1] if row else 0)
    rows.kv_blocks_free[row] = pool.n.free
    rows.decode_kv_tokens[row] = batch.decode_kv
    rows.prefill_kv_tokens[row] = batch.prefill_kv
    rows.prefill_pairs[row] = batch.prefill_pairs
    rows.items_end[row] = state.n_row_items
    rows.preempted_end[row] = state.n_row_preempted
    rows.cached_end[row] = state.n_row_cached
    rows.schedule_us[row] = state.now_us
    rows.start_us[row] = rows.end_us[row] = max(state.now_us, state.gpu_free_us)
    state.n_rows = row + 1


@compiled
def _drop_row(state: State, record: Record) -> None:
    """Forget what was noted for a step that is not in the sample."""
    row = state.n_rows
    state.n_row_items = record.rows.items_end[row - 1] if row else 0
    state.n_row_preempted = record.rows.preempted_end[row - 1] if row else 0
    state.n_row_cached = record.rows.cached_end[row - 1] if row else 0


@inlined
def is_full(limits: Limits, state: State, record: Record) -> bool:
    """Whether the step record might not take another step."""
    room = limits.max_num_seqs
    return record.is_on == 1 and (
        state.n_rows == record.rows.size
        or state.n_row_items + room > record.item_request.size
        or state.n_row_preempted + room > record.preempted.size
        or state.n_row_cached + room > record.cached_request.size
        or state.n_drawn == record.sample.size
    )


@compiled
def record_call(slots: Slots, pool: Pool, state: State, record: Record, batch: Batch, is_step: bool) -> None:
    """Record the call just made if it is in the sample."""
    if _is_kept(state, record, is_step):
        _write_row(slots, pool, state, record, batch)
    else:
        _drop_row(state, record)


@compiled
def record_items(pool: Pool, state: State, record: Record, batch: Batch, is_step: bool) -> None:
    """The same where the requests of the batch are written already."""
    if _is_kept(state, record, is_step):
        _write_totals(pool, state, record, batch)
    else:
        _drop_row(state, record)


@inlined
def _is_kept(state: State, record: Record, is_step: bool) -> bool:
    """Whether a call is in the sample. Empty calls are recorded on request, and are not sampled."""
    if not is_step:
        return record.keep_empty > 0
    state.n_drawn += 1
    return record.sample[state.n_drawn - 1] > 0


@inlined
def finish_row(state: State, record: Record, duration_us: float) -> None:
    """Note how long the step took, if it was recorded."""
    row = state.n_rows - 1
    if row >= 0 and record.rows.call[row] == state.n_calls:
        record.rows.end_us[row] += duration_us
