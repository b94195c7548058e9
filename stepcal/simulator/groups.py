"""KV blocks of models whose layers differ in what they read: full attention beside sliding windows or chunks.

As vLLM's hybrid KV cache: each group of layers has blocks of its own for the same tokens, all out of one pool. What a
window has left behind is given back, and a prefix is a hit only as far as every group can go on from there. Here every
block is told apart and every call is made one by one, because blocks come and go in most of them. Releases differ, see
`versions.VllmRelease`.
"""

from stepcal.simulator import layout as at
from stepcal.simulator.blocks import append, forget, prepend, unlink
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Limits, Pool, Slots, State


@inlined
def _blocks_of(limits: Limits, n_tokens: int) -> int:
    return (n_tokens + limits.block_size - 1) // limits.block_size


@inlined
def _skipped(limits: Limits, pool: Pool, group: int, n_computed: int) -> int:
    """Leading blocks that a group no longer reads when the token after `n_computed` is computed."""
    kind, window = pool.groups.kind[group], pool.groups.window[group]
    if kind == at.SLIDING:
        return max(0, n_computed - window + 1) // limits.block_size
    if kind == at.CHUNKED:
        return n_computed // window * window // limits.block_size
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Names of blocks
# ----------------------------------------------------------------------------------------------------------------------


@compiled
def _shareable(pool: Pool, chain: int) -> int:
    """Leading blocks of a chain that other requests can have too."""
    last = pool.chain_start[chain + 1] - 1
    return pool.segments.end[last] if last >= pool.chain_start[chain] else 0


@compiled
def _node(pool: Pool, slots: Slots, slot: int, chain: int, group: int, j: int) -> int:
    """What stands for the text up to the end of block `j` in a group: a shared node, or one that only the slot has."""
    shared = pool.nodes.size // pool.groups.size - slots.table.shape[0] * slots.table.shape[2]
    first = group * (pool.nodes.size // pool.groups.size)
    if j >= _shareable(pool, chain):
        return first + shared + slot * slots.table.shape[2] + j
    s = pool.chain_start[chain]
    while j >= pool.segments.end[s]:
        s += 1
    return first + pool.segments.offset[s] + j


@compiled
def _cached(pool: Pool, slots: Slots, slot: int, chain: int, alike: int, j: int) -> bool:
    """Whether block `j` is cached in all groups that are alike; leaves them in the table."""
    for group in range(pool.groups.size):
        if pool.groups.alike[group] == alike:
            block = pool.nodes.first[_node(pool, slots, slot, chain, group, j)]
            if block == 0:
                return False
            slots.table[slot, group, j] = block
    return True


@compiled
def _set_null(pool: Pool, slots: Slots, slot: int, alike: int, j: int) -> None:
    for group in range(pool.groups.size):
        if pool.groups.alike[group] == alike:
            slots.table[slot, group, j] = 0


# ----------------------------------------------------------------------------------------------------------------------
# Prefix hits
# ----------------------------------------------------------------------------------------------------------------------


@compiled
def find_hits(limits: Limits, pool: Pool, slots: Slots, slot: int, chain: int, known: int) -> int:
    """Blocks that every group has cached, or no longer needs; they are left in the slot's table.

    Each kind takes what the ones before it have left, until all agree. Where one had more, the slot's `shared_prefix` says
    how many.
    """
    slots.rows.shared_prefix[slot] = 0
    if not limits.has_caching:
        return 0
    has_full = pool.alike.kind[0] == at.FULL
    is_simple = pool.alike.size == 1 or (pool.alike.size == 2 and has_full)
    length, longest, has_looked = known - 1, 0, False
    while True:
        left = length
        for alike in range(pool.alike.size):
            if has_looked and has_full and alike == 0:
                continue  # a shorter prefix is cached too
            left = _find(limits, pool, slots, slot, chain, alike, left) * limits.block_size
            longest = max(longest, left)
        has_looked = True
        if left >= length:
            break
        length = left
        if is_simple:
            break
    n = length // limits.block_size
    if longest > length:
        slots.rows.shared_prefix[slot] = longest // limits.block_size
    return n


@compiled
def _find(limits: Limits, pool: Pool, slots: Slots, slot: int, chain: int, alike: int, length: int) -> int:
    """Blocks of at most `length` tokens from which groups that are alike can go on."""
    most, kind, window = length // limits.block_size, pool.alike.kind[alike], pool.alike.window[alike]
    if kind == at.SLIDING:
        return _find_tail(pool, slots, slot, chain, alike, most, pool.alike.need[alike])
    n = 0
    if kind == at.CHUNKED:  # what lies before the last chunk counts as there
        n = length // window * window // limits.block_size
        for j in range(n):
            _set_null(pool, slots, slot, alike, j)
    while n < most and _cached(pool, slots, slot, chain, alike, n):
        n += 1
    return n


@compiled
def _find_tail(pool: Pool, slots: Slots, slot: int, chain: int, alike: int, n: int, need: int) -> int:
    """The longest prefix of at most `n` blocks whose last window is cached, or what is cached from the start."""
    run = 0
    for j in range(n - 1, -1, -1):
        if _cached(pool, slots, slot, chain, alike, j):
            run += 1
            if run >= need:
                for i in range(j):
                    _set_null(pool, slots, slot, alike, i)
                return j + run
        else:
            _set_null(pool, slots, slot, alike, j)
            run = 0
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Allocation
# ----------------------------------------------------------------------------------------------------------------------


@compiled
def blocks_missing(
    limits: Limits, pool: Pool, slots: Slots, slot: int, n_tokens: int, n_hits: int, is_whole: int
) -> int:
    """Free blocks that a request's first `n_tokens` take: new ones, and hits that nobody holds.

    `n_hits` is -1 for a running request. With `is_whole`, a window counts with what its release takes for the most.
    """
    total = 0
    for group in range(pool.groups.size):
        required = _blocks_of(limits, n_tokens)
        if is_whole:
            required = min(required, pool.groups.most_blocks[group])
        if n_hits < 0:
            total += max(required - slots.table_len[slot, group], 0)
            continue
        skipped = _skipped(limits, pool, group, n_hits * limits.block_size)
        total += max(required - max(skipped, n_hits), 0)
        for j in range(skipped, n_hits):
            block = slots.table[slot, group, j]
            if block and pool.entries.references[block] == 0:
                total += 1
    return total


@compiled
def take_hits(limits: Limits, pool: Pool, slots: Slots, slot: int, n_hits: int) -> None:
    """Hold the blocks that `find_hits` left in the table, but for those that a window skips."""
    for group in range(pool.groups.size):
        skipped = _skipped(limits, pool, group, n_hits * limits.block_size)
        for j in range(n_hits):
            block = slots.table[slot, group, j]
            if j < skipped:
                slots.table[slot, group, j] = 0
            elif block:
                if pool.entries.references[block] == 0:
                    unlink(pool, block)
                    pool.n.free -= 1
                pool.entries.references[block] += 1
        slots.table_len[slot, group] = n_hits
        slots.first_live[slot, group] = skipped
    slots.rows.n_keyed[slot] = n_hits


@compiled
def take_new(limits: Limits, pool: Pool, slots: Slots, slot: int, n_tokens: int) -> None:
    """Blocks for a request's first `n_tokens`, from the head of the free queue. The caller has checked the number."""
    n_blocks = _blocks_of(limits, n_tokens)
    for group in range(pool.groups.size):
        for j in range(slots.table_len[slot, group], n_blocks):
            block = pool.entries.next[0]
            unlink(pool, block)
            if pool.entries.node[block] >= 0:
                forget(pool, block)
                pool.entries.node[block] = at.ANONYMOUS
            pool.entries.references[block] = 1
            pool.n.free -= 1
            slots.table[slot, group, j] = block
        slots.table_len[slot, group] = max(slots.table_len[slot, group], n_blocks)


@compiled
def _give_back(limits: Limits, pool: Pool, slots: Slots, slot: int, group: int, first: int, end: int) -> None:
    """Blocks `first` up to `end` of a table, the last one first; in newer releases, what nobody can find to the front."""
    for j in range(end - 1, first - 1, -1):
        block = slots.table[slot, group, j]
        if block:
            pool.entries.references[block] -= 1
            is_last = pool.entries.node[block] >= 0 or not limits.reuses_unfindable_first
            if pool.entries.references[block] == 0 and is_last:
                append(pool, block)
                pool.n.free += 1
            if not limits.reuses_unfindable_first:
                slots.table[slot, group, j] = 0
    for j in range(first, end):
        block = slots.table[slot, group, j]
        if block and pool.entries.references[block] == 0 and pool.entries.node[block] < 0:
            prepend(pool, block)
            pool.n.free += 1
        slots.table[slot, group, j] = 0


@compiled
def allocate_running(
    limits: Limits, pool: Pool, slots: Slots, state: State, slot: int, computed: int, n_tokens: int, in_flight: int
) -> bool:
    """Blocks for the next tokens of a running request, after what its windows have left behind is given back.

    In newer releases windows are cut by what is processed: `in_flight` tokens may still read what lies before them.
    """
    for group in range(pool.groups.size):
        end = min(_skipped(limits, pool, group, max(0, computed - in_flight)), slots.table_len[slot, group])
        if end > slots.first_live[slot, group]:
            _give_back(limits, pool, slots, slot, group, slots.first_live[slot, group], end)
            slots.first_live[slot, group] = end
    if blocks_missing(limits, pool, slots, slot, n_tokens, -1, 0) > pool.n.free:
        return False
    take_new(limits, pool, slots, slot, n_tokens)
    return True


@compiled
def register_groups(limits: Limits, pool: Pool, slots: Slots, slot: int, chain: int, n_full: int) -> None:
    """Let others find a request's blocks up to `n_full`; in newer releases, of a sliding window, where prompts go on."""
    if not limits.has_caching or n_full <= slots.rows.n_keyed[slot]:
        return
    prompt_end = (slots.rows.prompt[slot] - 1) // limits.block_size
    shared_end = slots.rows.shared_prefix[slot]
    for group in range(pool.groups.size):
        need = pool.groups.need[group]
        for j in range(slots.rows.n_keyed[slot], n_full):
            block = slots.table[slot, group, j]
            is_kept = (
                not limits.keeps_windows_where_prompts_end
                or pool.groups.kind[group] != at.SLIDING
                or prompt_end - need <= j < prompt_end
                or shared_end - need <= j < shared_end
            )
            if block and is_kept:
                node = _node(pool, slots, slot, chain, group, j)
                pool.entries.node[block] = node
                last = pool.nodes.last[node]
                pool.entries.same_prev[block] = last
                pool.entries.same_next[block] = 0
                if last:
                    pool.entries.same_next[last] = block
                else:
                    pool.nodes.first[node] = block
                pool.nodes.last[node] = block
    slots.rows.n_keyed[slot] = n_full


@compiled
def free_groups(limits: Limits, pool: Pool, slots: Slots, slot: int) -> None:
    """Give back all blocks of a request, group by group."""
    for group in range(pool.groups.size):
        _give_back(limits, pool, slots, slot, group, slots.first_live[slot, group], slots.table_len[slot, group])
        slots.table_len[slot, group] = 0
        slots.first_live[slot, group] = 0
    slots.rows.n_keyed[slot] = 0


@compiled
def forget_private(limits: Limits, pool: Pool, slots: Slots, slot: int, chain: int) -> None:
    """A request has ended: nobody can hit the blocks that only it could; they stay where they are in the queue."""
    if not limits.has_caching:
        return
    n_blocks = (slots.rows.prompt[slot] + slots.rows.output[slot]) // limits.block_size
    for group in range(pool.groups.size):
        for j in range(_shareable(pool, chain), n_blocks):
            node = _node(pool, slots, slot, chain, group, j)
            block = pool.nodes.first[node]
            while block:
                pool.entries.node[block] = at.ANONYMOUS
                block = pool.entries.same_next[block]
            pool.nodes.first[node] = 0
            pool.nodes.last[node] = 0
