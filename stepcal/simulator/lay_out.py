"""Lay out the arrays of a run from what the caller gives: requests, server, clients."""

from typing import Any

import numpy as np

from stepcal.errors import InputError
from stepcal.simulator import layout as at
from stepcal.simulator.config import KV_KINDS, ServerConfig
from stepcal.simulator.layout import Int32Array, Limits, Pool, Requests, Slots, State
from stepcal.simulator.load.clients import Clients
from stepcal.simulator.load.workload import RequestList
from stepcal.simulator.prefix import PrefixTable, find_shared_prefixes, no_prefixes
from stepcal.simulator.visiting.lay_out import SLOTS_PER_SEQUENCE
from stepcal.units import US_PER_S


def limits_of(
    requests: RequestList,
    server: ServerConfig,
    clients: Clients,
    *,
    timeout_us: float,
    api_before_us: float,
    api_after_us: float,
    max_jump: int | None,
    asks: bool,
    counts_calls: bool,
    reads_windows: bool,
) -> Limits:
    """Limits and modes of a run as plain numbers."""
    return Limits(
        max_num_seqs=server.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens,
        block_size=server.block_size,
        flight_limit=2 if server.async_scheduling else 1,
        counts_calls=int(counts_calls),
        max_jump=at.NEVER if max_jump is None else max_jump,
        needs_duration=int(asks),
        has_caching=int(server.enable_prefix_caching),
        has_groups=int(server.has_groups),
        has_windows=int(reads_windows and server.window_share > 0.0),
        visits_each=int(server.visits_each_request),
        by_priority=int(server.scheduling_policy == "priority"),
        long_prefill_token_threshold=server.long_prefill_token_threshold,
        chunks_prompts=int(server.enable_chunked_prefill),
        spares_lone_requests=int(server.release.spares_lone_requests),
        keeps_place_after_preemption=int(server.release.keeps_place_after_preemption),
        admits_whole_sequences=int(server.release.admits_whole_sequences),
        reuses_unfindable_first=int(server.release.reuses_unfindable_blocks_first),
        waits_for_windows_in_flight=int(server.release.waits_for_windows_in_flight),
        keeps_windows_where_prompts_end=int(server.release.keeps_windows_where_prompts_end),
        api_after_us=float(api_after_us),
        api_before_us=float(api_before_us),
        timeout_us=timeout_us,
        has_abort_times=int(requests.abort_s is not None),
        usable_blocks=server.usable_blocks,
        offload_blocks=server.pool_blocks,
        has_clients=int(clients.waits),
        max_in_flight=min(clients.max_in_flight or 0, len(requests)),
        stage_interval_us=clients.stage_interval_s * US_PER_S,
    )


def lay_out_state(limits: Limits, n_slots: int, n_listed: int) -> State:
    """Nothing has happened yet; the first `n_listed` requests of the list can be sent."""
    state = at.one_row(at.STATE)
    state.next_finish, state.prefill_slot, state.last_output = at.NEVER, -1, -1
    state.n_free_slots = n_slots
    state.list_end = state.n_stage_left = n_listed
    state.n_places = min(limits.max_in_flight, n_listed)
    return state


def lay_out_requests(
    requests: RequestList,
    clients: Clients,
    server: ServerConfig,
    chain: Int32Array,
    api_before_us: float,
    us_per_unit: float,
) -> Requests:
    """Per-request arrays; refuses requests that could never be served."""
    n = len(requests)
    prompt_tokens = requests.prompt_tokens
    _check_fits(requests, prompt_tokens, server)
    rows = np.zeros(n, at.REQUEST_ROW)
    for name in ("first_scheduled_us", "first_token_us", "finish_us"):
        rows[name] = np.nan
    rows["prompt_tokens"], rows["output_tokens"], rows["chain"] = prompt_tokens, requests.output_tokens, chain
    np.multiply(requests.arrival_s, us_per_unit, out=rows["arrival_us"])
    rows["has_left"] = not clients.waits
    if requests.stage is not None:
        rows["stage"] = requests.stage
    follower, n_sessions = np.zeros(0, np.int32), 0
    n_clients = min(clients.max_in_flight or 0, n)
    if clients.stage_starts_s is not None:
        # Later stages count from their begin, which is known when the one before has ended.
        rows["arrival_us"] -= clients.stage_offsets_s(requests) * us_per_unit
        rows["arrival_us"][: clients.first_sent(requests)] += (
            clients.first_begin_s(requests) * us_per_unit + api_before_us
        )
    elif requests.follows is None:
        rows["arrival_us"] += api_before_us
    else:
        rows["is_follow_up"] = requests.follows >= 0
        rows["arrival_us"][requests.follows < 0] += api_before_us
        n_sessions = int((requests.follows < 0).sum())
        follower = np.full(n, -1, np.int32)
        turns = np.flatnonzero(requests.follows >= 0).astype(np.int32)
        follower[requests.follows[turns]] = turns
    abort_at, abort_order = np.zeros(0), np.zeros(0, np.int32)
    if requests.abort_s is not None:
        abort_at = requests.abort_s * us_per_unit + api_before_us
        abort_order = np.argsort(abort_at, kind="stable").astype(np.int32)[: int(np.isfinite(abort_at).sum())]
    return Requests(
        rows=rows,
        queue=np.empty(n, np.int32),
        follower=follower,
        heap=np.zeros(n_sessions + n_clients, at.HEAP_ROW),
        places=np.full(n_clients, -np.inf),
        think_us=clients.think_times_s(requests) * US_PER_S,
        stage_first=clients.stage_firsts(requests),
        stage_end_us=np.full(requests.n_stages, -np.inf),
        abort_at=abort_at,
        abort_order=abort_order,
        output_abort_at=np.zeros(0),
        output_abort_order=np.zeros(0, np.int32),
    )


def _check_fits(requests: RequestList, prompt_tokens: Any, server: ServerConfig) -> None:
    total = prompt_tokens.astype(np.int64) + requests.output_tokens
    if (total > server.max_model_len).any():
        i = int(np.argmax(total > server.max_model_len))
        raise InputError(
            f"Request {requests._name(i)} has {prompt_tokens[i]} prompt and {requests.output_tokens[i]} output tokens, "
            f"{total[i]} in all; `max_model_len` is {server.max_model_len}. Raise it, or shorten the request."
        )
    # The last output token is never computed, so it needs no KV.
    n_blocks = -(-(total - 1) // server.block_size)
    if server.has_groups:
        lengths, which = np.unique(total - 1, return_inverse=True)
        n_blocks = np.array([sum(server.least_blocks(g, n) for g in server.groups) for n in lengths.tolist()])[which]
    if (n_blocks > server.usable_blocks).any():
        i = int(np.argmax(n_blocks > server.usable_blocks))
        raise InputError(
            f"Request {requests._name(i)} needs {n_blocks[i]} KV blocks of {server.block_size} tokens before it ends "
            f"and can never fit: the server has {server.usable_blocks} (`kv_blocks` - 1). "
            f"Give it at least {n_blocks[i] + 1}."
        )


def prefixes_of(requests: RequestList, server: ServerConfig) -> PrefixTable:
    """Which blocks requests can share; none without prefix caching."""
    if not server.enable_prefix_caching:
        return no_prefixes(len(requests))
    return find_shared_prefixes(
        requests.prompt,
        requests.prompt_start,
        requests.segment_content,
        requests.segment_tokens,
        requests.output_content,
        requests.output_tokens,
        server.block_size,
    )


def lay_out_slots(server: ServerConfig, requests: RequestList, max_keyed_blocks: int) -> Slots:
    """All slots free."""
    n, n_stages = n_slots_of(server), requests.n_stages
    n_groups = len(server.groups)
    n_blocks = table_blocks(server, requests) if server.tells_blocks_apart else 0
    rows = np.zeros(n, at.SLOT_ROW)
    for name in ("chunk_call", "finish_call"):
        rows[name] = -1
    return Slots(
        rows=rows,
        blocks=np.zeros((n, max(1, max_keyed_blocks)), np.int32),
        table=np.zeros((n, n_groups, n_blocks), np.int32),
        table_len=np.zeros((n, n_groups), np.int32),
        first_live=np.zeros((n, n_groups), np.int32),
        free=np.arange(n - 1, -1, -1, dtype=np.int32),
        running=np.zeros(n, np.int32),
        running_finish=np.zeros(n, np.int64),
        preempted=np.zeros(n, np.int32),
        crossings=np.zeros(server.block_size, np.int64),
        stage_decoding=np.zeros(n_stages, np.int64),
        stage_batch=np.zeros(n_stages, np.int64),
    )


def n_slots_of(server: ServerConfig) -> int:
    """Slots at the begin: requests that run, or wait, preempted, in front of all others."""
    return server.max_num_seqs * (SLOTS_PER_SEQUENCE if server.visits_each_request else 1)


def table_blocks(server: ServerConfig, requests: RequestList) -> int:
    """Blocks of the longest request."""
    longest = int((requests.prompt_tokens + requests.output_tokens).max(initial=0))
    return longest // server.block_size + 1


def _lay_out_groups(server: ServerConfig) -> tuple[Any, Any]:
    """A row for each group, and one for all that are alike, full attention first, else in the order of the groups."""
    groups = np.zeros(len(server.groups), at.GROUP_ROW)
    kinds = [(KV_KINDS.index(group.kind), group.window) for group in server.groups]
    alike = sorted(dict.fromkeys(kinds), key=lambda kind: kind[0] != at.FULL)
    for row, group, kind in zip(groups, server.groups, kinds, strict=True):
        row["kind"], row["window"] = kind
        row["need"] = -(-(group.window - 1) // server.block_size) if group.kind == "sliding" else 0
        row["most_blocks"] = server.most_blocks(group, server.max_model_len)
        row["alike"] = alike.index(kind)
    return groups, groups[[kinds.index(kind) for kind in alike]]


def _lay_out_windows(server: ServerConfig) -> Any:
    """The windows that layers read, and the share of the layers with a window that read each."""
    layers: dict[tuple[int, int], int] = {}
    for group in server.kv_groups:
        if group.kind != "full":
            kind = (KV_KINDS.index(group.kind), group.window)
            layers[kind] = layers.get(kind, 0) + group.layers
    windows = np.zeros(len(layers), at.WINDOW_ROW)
    for row, (kind, n) in zip(windows, layers.items(), strict=True):
        row["kind"], row["window"], row["share"] = *kind, n / sum(layers.values())
    return windows


def lay_out_pool(server: ServerConfig, requests: RequestList, prefixes: PrefixTable) -> Pool:
    """All blocks free: as one run, or, where each is told apart, one by one."""
    n = server.usable_blocks + 2
    entries = np.zeros(n, at.ENTRY_ROW)
    entries["node"] = at.ANONYMOUS
    entries["spare"] = np.arange(n - 1, -1, -1)
    # Row 0 is the sentinel, row 1 the run of all blocks.
    entries["next"][0] = entries["prev"][0] = 1
    entries["count"][1] = server.usable_blocks
    n_nodes = prefixes.n_nodes
    if server.tells_blocks_apart:
        order = np.arange(n - 1)
        entries["next"][:-1], entries["prev"][:-1] = np.roll(order, -1), np.roll(order, 1)
        entries["count"] = 1
        n_nodes = len(server.groups) * (n_nodes + n_slots_of(server) * table_blocks(server, requests))
    counts = at.one_row(at.BLOCK_COUNTS)
    counts.free, counts.spare = server.usable_blocks, n - 2
    segments = np.zeros(prefixes.segment_end.size, at.SEGMENT_ROW)
    segments["offset"], segments["end"] = prefixes.segment_offset, prefixes.segment_end
    groups, alike = _lay_out_groups(server)
    return Pool(
        entries=entries,
        nodes=np.zeros(n_nodes, at.NODE_ROW),
        groups=groups,
        alike=alike,
        windows=_lay_out_windows(server),
        chain_start=prefixes.chain_start,
        segments=segments,
        ghost=np.zeros(server.max_num_seqs, np.int32),
        n=counts,
    )
