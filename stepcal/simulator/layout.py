"""The arrays of a running simulation: what the compiled functions read and write, and in which unit.

Everything lives in flat or structured numpy arrays, grouped by who owns it, because compiled code is fastest on them.
Scalars that survive from one call of the compiled loop to the next are the fields of one row, `STATE`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepcal.units import FloatArray, IntArray

Int8Array = NDArray[np.int8]
Int32Array = NDArray[np.int32]
# A structured array, of which compiled code reads the fields as attributes.
Rows = Any

# A step number beyond any simulation: "never".
NEVER = 1 << 60

# Status of a request. It ends in exactly one of the last three.
NOT_ARRIVED, WAITING, RUNNING, FINISHED, ABORTED, NOT_SENT = 0, 1, 2, 3, 4, 5
STATUS_NAMES = ("not_arrived", "waiting", "running", "finished", "aborted", "not_sent")

# State of a slot (a request that is admitted, or was and is preempted).
SLOT_FREE, SLOT_PREFILL, SLOT_DECODE, SLOT_PREEMPTED = 0, 1, 2, 3

# What an entry of the free queue is, where it is not the prefix node of a cached block (>= 0).
# Values below ANONYMOUS name the preempted request whose cached blocks the entry holds: -2 - slot.
ANONYMOUS = -1

# Why the compiled loop came back.
DONE, PAUSED, NEEDS_DURATION, STUCK, BAD_DURATION, GO_ON, NEEDS_SLOTS, ENDLESS = 0, 1, 2, 3, 4, 5, 6, 7

# What survives from one call of the compiled loop to the next, one row.
STATE = np.dtype(
    [
        ("n_calls", np.int64),  # schedule() calls so far; also the number of the next one
        ("n_steps", np.int64),  # calls that scheduled something
        ("n_preemptions", np.int64),
        ("n_ended", np.int64),  # requests with a final status
        ("last_output", np.int64),  # number of the last call whose output was processed
        # queues
        ("n_running", np.int64),
        ("n_preempted", np.int64),  # preempted requests that wait, in front of all others
        ("n_queued", np.int64),  # arrived requests that were never admitted and still wait
        ("queue_head", np.int64),
        ("queue_tail", np.int64),
        ("is_blocked", np.int64),  # 1 if the head of the queue does not fit, until blocks are freed
        ("has_ended", np.int64),  # 1 if a request ended since the last call: vLLM then makes one more call
        ("n_free_slots", np.int64),
        # what comes from outside
        ("next_arrival", np.int64),  # in the list
        ("list_end", np.int64),  # requests of the list that may be sent, as far as stages have begun
        ("n_heap", np.int64),
        ("next_abort", np.int64),
        ("next_output_abort", np.int64),
        ("n_places", np.int64),
        ("n_stage_left", np.int64),  # requests of the present stage whose clients still wait
        ("next_give_up", np.int64),
        # the batch
        ("n_decoding", np.int64),  # requests that the next call schedules one token for
        ("sum_base", np.int64),  # sum of `slots.rows.base` over them
        ("next_finish", np.int64),  # smallest `slots.rows.finish_call` over them
        ("prefill_slot", np.int64),  # the one request whose prompt is computed in part, or -1
        ("n_keyed_outputs", np.int64),  # decoding requests whose output other requests can hit
        ("n_in_flight", np.int64),
        ("flight_call", np.int64, (2,)),  # oldest first
        ("flight_finishes", np.int64, (2,)),
        ("flight_end_us", np.float64, (2,)),
        ("needs_duration", np.int64),  # 1 if the loop waits for the duration of the step it just scheduled
        ("duration_us", np.float64),  # which is given here
        ("now_us", np.float64),
        ("gpu_free_us", np.float64),
        ("has_changed", np.int64),  # 1 if a request was admitted, preempted or has ended since `rejected` was computed
        ("rejected", np.float64),  # requests that the offload pool rejects, see `offload`
        # the step record
        ("n_rows", np.int64),
        ("n_row_items", np.int64),
        ("n_row_preempted", np.int64),
        ("n_row_cached", np.int64),
        ("n_drawn", np.int64),  # steps drawn for the sample of steps
    ],
    align=True,
)

# The batch just scheduled, one row: what the step time depends on.
BATCH = np.dtype(
    [
        ("prefill_reqs", np.int64),
        ("prefill_tokens", np.int64),
        ("prefill_kv", np.int64),
        ("prefill_pairs", np.int64),
        ("decode_reqs", np.int64),
        ("decode_kv", np.int64),
        ("window_kv", np.float64),  # what layers with a window read of it in the mean, see `windows`
        ("prefill_window_kv", np.float64),
        ("window_pairs", np.float64),
        ("n_waiting", np.int64),
        ("has_finish", np.int64),
    ],
    align=True,
)

BLOCK_COUNTS = np.dtype([("free", np.int64), ("spare", np.int64)])  # blocks in the free queue; rows of it not in use

# Single rows of these kinds.
State = Any
Batch = Any


def one_row(kind: np.dtype) -> Any:
    """A row of zeros whose fields are attributes, here and in compiled code."""
    return np.zeros(1, kind).view(np.recarray)[0]


class Limits(NamedTuple):
    """Scheduler limits and modes, as plain integers."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    flight_limit: int  # batches that may be in flight: 2 with asynchronous scheduling, else 1
    counts_calls: int  # 1: arrivals and aborts are numbers of schedule() calls, not times
    max_jump: int  # most decode steps advanced at once
    needs_duration: int  # 1: the caller supplies every step's duration
    has_caching: int
    has_groups: int  # 1: KV blocks are kept by groups of layers, see `groups`
    has_windows: int  # 1: some layers read a window only
    visits_each: int  # 1: each request is visited in each call, see `visiting`; also the following
    by_priority: int
    long_prefill_token_threshold: int  # most tokens of a request in a call, 0 for no limit
    chunks_prompts: int
    spares_lone_requests: int  # see `versions.VllmRelease`
    keeps_place_after_preemption: int
    admits_whole_sequences: int  # see `versions.VllmRelease`
    reuses_unfindable_first: int
    waits_for_windows_in_flight: int
    keeps_windows_where_prompts_end: int
    api_after_us: float
    api_before_us: float
    timeout_us: float
    has_abort_times: int
    usable_blocks: int
    offload_blocks: int  # of the pool in CPU memory, 0 without one
    has_clients: int  # 1: requests wait for the end of others, see `sending`
    max_in_flight: int  # clients, 0 for no limit
    stage_interval_us: float


# One row a request: what it asks for and what became of it.
REQUEST_ROW = np.dtype(
    [
        (
            "arrival_us",
            np.float64,
        ),  # at the engine; of a follow-up turn the think time, until the turn before has ended
        ("first_scheduled_us", np.float64),
        ("first_token_us", np.float64),
        ("finish_us", np.float64),
        ("prompt_tokens", np.int32),
        ("output_tokens", np.int32),
        ("chain", np.int32),
        ("preemptions", np.int32),
        ("cached_tokens", np.int32),
        ("generated_tokens", np.int32),
        ("stage", np.int16),
        ("status", np.int8),
        ("is_follow_up", np.int8),
        ("has_left", np.int8),  # its client has its answer, or gave up
    ],
    align=True,
)

# One row a slot: a request that is admitted, or was and is preempted.
SLOT_ROW = np.dtype(
    [
        ("base", np.int64),  # while decoding: tokens computed before call c are base + c
        ("finish_call", np.int64),  # the call that computes the last output token
        ("first_call", np.int64),  # the call that computes the first output token
        ("chunk_call", np.int64),  # the call of the last chunk
        ("last_token_us", np.float64),  # when preempted
        ("request", np.int32),
        ("prompt", np.int32),
        ("output", np.int32),
        ("generated", np.int32),  # output tokens that existed when the request was last admitted
        ("known", np.int32),  # prompt + generated: tokens to compute before the next one is generated
        ("computed", np.int32),  # while prefilling
        ("chunk", np.int32),  # tokens of the last chunk
        ("n_keyed", np.int32),  # cached blocks at the front of the block table
        ("keyed_limit", np.int32),  # blocks that other requests can hit
        ("shared_prefix", np.int32),  # cached blocks that a sliding window could not go on from, see `groups`
        ("state", np.int32),
        # where each request is visited; `generated` then counts all output tokens that exist
        ("sampling", np.int32),  # output tokens that batches in flight sample
        ("unprocessed", np.int32),  # tokens in batches whose output was not processed
    ],
    align=True,
)

# One row an entry of the free queue: a block that can be hit, or a run of blocks that cannot. Row 0 is the queue's
# sentinel.
ENTRY_ROW = np.dtype(
    [
        ("next", np.int32),
        ("prev", np.int32),
        ("node", np.int32),  # prefix that the block holds, or ANONYMOUS and below
        ("count", np.int32),
        ("references", np.int32),
        ("same_next", np.int32),  # cached copies of the same prefix, oldest first
        ("same_prev", np.int32),
        ("spare", np.int32),  # stack of unused rows
    ],
    align=True,
)

# Kinds of attention of a group of layers.
FULL, SLIDING, CHUNKED = 0, 1, 2

# One row a group of layers.
GROUP_ROW = np.dtype(
    [
        ("kind", np.int32),
        ("window", np.int32),  # tokens of the window or chunk
        ("need", np.int32),  # blocks before a position that a sliding window needs to go on from there
        ("most_blocks", np.int32),  # that admission counts at most
        ("alike", np.int32),  # row of the groups that are alike, by which prefixes are looked up
    ],
    align=True,
)
# One row a window that layers read, of which groups can be several.
WINDOW_ROW = np.dtype([("kind", np.int32), ("window", np.int32), ("share", np.float64)])  # of layers with a window

NODE_ROW = np.dtype([("first", np.int32), ("last", np.int32)])  # entries of the copies of a prefix, or 0
SEGMENT_ROW = np.dtype([("offset", np.int64), ("end", np.int64)])
HEAP_ROW = np.dtype([("time", np.float64), ("request", np.int64)])


class Requests(NamedTuple):
    """The request list, and the queues in front of the scheduler."""

    rows: Rows  # REQUEST_ROW
    queue: Int32Array  # requests in order of arrival
    follower: Int32Array  # the next turn of each request's session, or -1; empty without sessions
    heap: Rows  # HEAP_ROW: requests on their way that are not sent in the order of the list, earliest first
    places: FloatArray  # heap of the times from which clients are free
    think_us: FloatArray  # per request; empty without
    stage_first: IntArray  # (stages + 1,): where each stage begins in the list; empty unless stages drain
    stage_end_us: FloatArray  # (stages,)
    abort_at: FloatArray
    abort_order: Int32Array
    output_abort_at: FloatArray  # conformance only: before the output of this call
    output_abort_order: Int32Array


class Slots(NamedTuple):
    """Requests that are admitted or preempted, at most `max_num_seqs`, and their lists."""

    rows: Rows  # SLOT_ROW
    blocks: Int32Array  # (slots, blocks): entries of the cached blocks
    table: Int32Array  # (slots, groups, blocks): entries of all blocks, 0 for none, where layers differ
    table_len: Int32Array  # (slots, groups)
    first_live: Int32Array  # (slots, groups): blocks at the front that a window has left behind
    free: Int32Array  # stack of free slots
    running: Int32Array  # slots in the order of vLLM's running list
    running_finish: IntArray  # their finish_call (NEVER while prefilling)
    preempted: Int32Array  # stack: the last is the head of the waiting queue
    crossings: IntArray  # (block_size,): decoding requests that need a block in calls with this remainder
    stage_decoding: IntArray  # (stages,): decoding requests of each stage of load
    stage_batch: IntArray  # (stages,): the same for the batch just scheduled


class Pool(NamedTuple):
    """KV blocks: the free queue in eviction order, and which cached block stands for which prefix.

    Only blocks that another request can hit are told apart. All others are interchangeable, so a run of them is one
    entry with a count.
    """

    entries: Rows  # ENTRY_ROW
    nodes: Rows  # NODE_ROW
    chain_start: IntArray  # see `prefix.PrefixTable`
    segments: Rows  # SEGMENT_ROW
    groups: Rows  # GROUP_ROW: one row, full attention, unless layers differ; see `groups`
    alike: Rows  # GROUP_ROW: one row for groups that are alike, full attention first
    windows: Rows  # WINDOW_ROW
    ghost: Int32Array  # per slot: the entry of a preempted request's own cached blocks, or 0
    n: Any  # BLOCK_COUNTS


class Times(NamedTuple):
    """Step time in microseconds, see `steptime.CompiledStepTime`."""

    constant_us: float
    tokens_us: FloatArray
    prefill_tokens_us: FloatArray
    requests_us: FloatArray
    decode_requests_us: FloatArray
    batch_us: FloatArray  # (prefill tokens, decode requests), or (1, 1) where there is no such table
    kv_us: float
    prefill_kv_us: float
    prefill_pair_us: float
    window_kv_us: float
    prefill_window_kv_us: float
    window_pair_us: float
    waiting_us: float
    host_constant_us: float
    host_requests_us: FloatArray
    host_waiting_us: float
    host_rejected_us: float
    floor_us: float
    overlap: int


# One row a recorded step.
STEP_ROW = np.dtype(
    [
        ("call", np.int64),
        ("running_depth", np.int64),
        ("waiting_depth", np.int64),
        ("num_prefill_reqs", np.int64),
        ("num_decode_reqs", np.int64),
        ("prefill_tokens", np.int64),
        ("decode_tokens", np.int64),
        ("num_finished", np.int64),
        ("num_preempted", np.int64),
        ("kv_blocks_free", np.int64),
        ("decode_kv_tokens", np.int64),
        ("prefill_kv_tokens", np.int64),
        ("prefill_pairs", np.int64),
        ("items_end", np.int64),
        ("preempted_end", np.int64),
        ("cached_end", np.int64),
        ("schedule_us", np.float64),
        ("start_us", np.float64),
        ("end_us", np.float64),
    ],
    align=True,
)


class Record(NamedTuple):
    """The step record, filled and drained by turns, and the distribution of gaps between tokens."""

    is_on: int
    keep_empty: int
    sample: Int8Array  # 1: keep the step
    rows: Rows  # STEP_ROW
    item_request: Int32Array
    item_tokens: Int32Array
    item_kv: Int32Array
    item_is_prefill: Int8Array
    preempted: Int32Array
    cached_request: Int32Array
    cached_tokens: Int32Array
    gap_counts: IntArray  # (stages, bins)
    gap_sums: FloatArray  # (stages,)
