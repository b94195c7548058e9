"""The step record: one row a step, with the requests of its batch, written into buffers that the caller drains."""

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Limits, Pool, Record, Requests, Slots
from stepcal.units import FloatArray, IntArray


@compiled
def _write_row(
    requests: Requests,
    slots: Slots,
    pool: Pool,
    counts: IntArray,
    clock: FloatArray,
    record: Record,
    batch: IntArray,
) -> None:
    """Write the scheduled batch into the step record."""
    row, call, item = counts[at.N_ROWS], counts[at.N_CALLS], counts[at.N_ROW_ITEMS]
    for i in range(counts[at.N_RUNNING]):
        slot = slots.running[i]
        is_prefill = slots.rows.chunk_call[slot] == call
        if not is_prefill and (slots.rows.state[slot] != at.SLOT_DECODE or slots.rows.finish_call[slot] < call):
            continue  # its last token is in flight
        record.item_request[item] = slots.rows.request[slot]
        record.item_tokens[item] = slots.rows.chunk[slot] if is_prefill else 1
        record.item_kv[item] = slots.rows.computed[slot] if is_prefill else slots.rows.base[slot] + call + 1
        record.item_is_prefill[item] = is_prefill
        item += 1
    n_preempted = counts[at.N_ROW_PREEMPTED] - (record.ints[row - 1, at.ROW_PREEMPTED_END] if row else 0)
    ints = record.ints[row]
    ints[0] = call
    ints[1] = counts[at.N_RUNNING]
    ints[2] = batch[at.N_WAITING]
    ints[3] = batch[at.PREFILL_REQS]
    ints[4] = batch[at.DECODE_REQS]
    ints[5] = batch[at.PREFILL_TOKENS]
    ints[6] = batch[at.DECODE_REQS]
    ints[7] = batch[at.HAS_FINISH]
    ints[8] = n_preempted
    ints[9] = pool.n[at.N_FREE]
    ints[10] = batch[at.DECODE_KV]
    ints[11] = batch[at.PREFILL_KV]
    ints[12] = batch[at.PREFILL_PAIRS]
    ints[at.ROW_ITEMS_END] = item
    ints[at.ROW_PREEMPTED_END] = counts[at.N_ROW_PREEMPTED]
    ints[at.ROW_CACHED_END] = counts[at.N_ROW_CACHED]
    counts[at.N_ROW_ITEMS] = item
    counts[at.N_ROWS] = row + 1
    start = max(clock[at.NOW], clock[at.GPU_FREE])
    record.floats[row, 0] = clock[at.NOW]
    record.floats[row, 1] = start
    record.floats[row, 2] = start


@compiled
def _drop_row(counts: IntArray, record: Record) -> None:
    """Forget what was noted for a step that is not in the sample."""
    row = counts[at.N_ROWS]
    counts[at.N_ROW_PREEMPTED] = record.ints[row - 1, at.ROW_PREEMPTED_END] if row else 0
    counts[at.N_ROW_CACHED] = record.ints[row - 1, at.ROW_CACHED_END] if row else 0


@inlined
def is_full(limits: Limits, counts: IntArray, record: Record) -> bool:
    """Whether the step record might not take another step."""
    room = limits.max_num_seqs
    return record.is_on == 1 and (
        counts[at.N_ROWS] == record.ints.shape[0]
        or counts[at.N_ROW_ITEMS] + room > record.item_request.size
        or counts[at.N_ROW_PREEMPTED] + room > record.preempted.size
        or counts[at.N_ROW_CACHED] + room > record.cached_request.size
        or counts[at.N_DRAWN] == record.sample.size
    )


@compiled
def record_call(
    requests: Requests,
    slots: Slots,
    pool: Pool,
    counts: IntArray,
    clock: FloatArray,
    record: Record,
    batch: IntArray,
    is_step: bool,
) -> None:
    """Record the call just made if it is in the sample. Empty calls are recorded on request, and are not sampled."""
    keep = record.keep_empty > 0
    if is_step:
        keep = record.sample[counts[at.N_DRAWN]] > 0
        counts[at.N_DRAWN] += 1
    if keep:
        _write_row(requests, slots, pool, counts, clock, record, batch)
    else:
        _drop_row(counts, record)


@inlined
def finish_row(counts: IntArray, record: Record, duration_us: float) -> None:
    """Note how long the step took, if it was recorded."""
    row = counts[at.N_ROWS] - 1
    if row >= 0 and record.ints[row, 0] == counts[at.N_CALLS]:
        record.floats[row, 2] += duration_us
