"""KV blocks as vLLM hands them out: a FIFO queue of free blocks that keep their content until they are taken.

A block that no other request can hit is anonymous: only the number of such blocks matters, so runs of them share an
entry and a request's decode allocations cost one subtraction. Blocks of shared prefixes are told apart one by one,
because the order in which they are freed decides which of them survive until the next hit.
"""

from stepcal.simulator.compilation import inlined
from stepcal.simulator.layout import ANONYMOUS, Limits, Pool, Slots


@inlined
def unlink(pool: Pool, entry: int) -> None:
    """Take an entry out of the free queue."""
    before, after = pool.entries.prev[entry], pool.entries.next[entry]
    pool.entries.next[before] = after
    pool.entries.prev[after] = before


@inlined
def append(pool: Pool, entry: int) -> None:
    """Put an entry at the end of the free queue."""
    last = pool.entries.prev[0]
    pool.entries.next[last] = entry
    pool.entries.prev[entry] = last
    pool.entries.next[entry] = 0
    pool.entries.prev[0] = entry


@inlined
def prepend(pool: Pool, entry: int) -> None:
    """Put an entry at the front of the free queue."""
    first = pool.entries.next[0]
    pool.entries.prev[entry] = 0
    pool.entries.next[entry] = first
    pool.entries.prev[first] = entry
    pool.entries.next[0] = entry


@inlined
def _take_spare(pool: Pool) -> int:
    pool.n.spare -= 1
    return pool.entries.spare[pool.n.spare]


@inlined
def _give_spare(pool: Pool, entry: int) -> None:
    pool.entries.spare[pool.n.spare] = entry
    pool.n.spare += 1


@inlined
def forget(pool: Pool, entry: int) -> None:
    """A cached block is taken for something else: its prefix loses this copy."""
    node = pool.entries.node[entry]
    before, after = pool.entries.same_prev[entry], pool.entries.same_next[entry]
    if before:
        pool.entries.same_next[before] = after
    else:
        pool.nodes.first[node] = after
    if after:
        pool.entries.same_prev[after] = before
    else:
        pool.nodes.last[node] = before


@inlined
def take_blocks(pool: Pool, n_blocks: int) -> None:
    """Take blocks from the head of the free queue, evicting cached ones. The caller has checked the number."""
    pool.n.free -= n_blocks
    while n_blocks > 0:
        entry = pool.entries.next[0]
        node = pool.entries.node[entry]
        if node >= 0:
            unlink(pool, entry)
            forget(pool, entry)
            _give_spare(pool, entry)
            n_blocks -= 1
        elif pool.entries.count[entry] > n_blocks:
            pool.entries.count[entry] -= n_blocks
            n_blocks = 0
        else:
            n_blocks -= pool.entries.count[entry]
            if node != ANONYMOUS:
                pool.ghost[-2 - node] = 0
            unlink(pool, entry)
            _give_spare(pool, entry)


@inlined
def free_anonymous(pool: Pool, n_blocks: int) -> None:
    """Append blocks that nobody can hit to the free queue."""
    if n_blocks <= 0:
        return
    pool.n.free += n_blocks
    last = pool.entries.prev[0]
    if last and pool.entries.node[last] == ANONYMOUS:
        pool.entries.count[last] += n_blocks
        return
    entry = _take_spare(pool)
    pool.entries.node[entry] = ANONYMOUS
    pool.entries.count[entry] = n_blocks
    append(pool, entry)


@inlined
def free_unfindable(limits: Limits, pool: Pool, n_blocks: int) -> None:
    """Free blocks that hold no full block of text, so that nobody can ever hit them."""
    if not limits.reuses_unfindable_first or n_blocks <= 0:
        free_anonymous(pool, n_blocks)
        return
    pool.n.free += n_blocks
    first = pool.entries.next[0]
    if first and pool.entries.node[first] == ANONYMOUS:
        pool.entries.count[first] += n_blocks
        return
    entry = _take_spare(pool)
    pool.entries.node[entry] = ANONYMOUS
    pool.entries.count[entry] = n_blocks
    prepend(pool, entry)


@inlined
def free_keyed(pool: Pool, slots: Slots, slot: int) -> None:
    """Release a request's cached blocks, last one first; those that nobody else holds join the free queue."""
    for j in range(slots.rows.n_keyed[slot] - 1, -1, -1):
        entry = slots.blocks[slot, j]
        pool.entries.references[entry] -= 1
        if pool.entries.references[entry] == 0:
            append(pool, entry)
            pool.n.free += 1
    slots.rows.n_keyed[slot] = 0


@inlined
def free_ghost(pool: Pool, slot: int, n_blocks: int) -> None:
    """Free the cached blocks that only a preempted request itself can hit when it resumes."""
    if n_blocks <= 0:
        return
    entry = _take_spare(pool)
    pool.entries.node[entry] = -2 - slot
    pool.entries.count[entry] = n_blocks
    pool.ghost[slot] = entry
    append(pool, entry)
    pool.n.free += n_blocks


@inlined
def drop_ghost(pool: Pool, slot: int) -> None:
    """Nobody can hit these blocks any more; they stay where they are in the queue."""
    if pool.ghost[slot]:
        pool.entries.node[pool.ghost[slot]] = ANONYMOUS
        pool.ghost[slot] = 0


@inlined
def touch_ghost(pool: Pool, slot: int) -> None:
    """A resumed request takes back its own blocks."""
    entry = pool.ghost[slot]
    pool.n.free -= pool.entries.count[entry]
    unlink(pool, entry)
    _give_spare(pool, entry)
    pool.ghost[slot] = 0


@inlined
def find_cached(pool: Pool, slots: Slots, slot: int, chain: int, max_blocks: int) -> tuple[int, int]:
    """Longest run of cached blocks at the front of a prompt.

    Returns
    -------
    n_hits, n_evictable
        Blocks found (their entries are left in ``slots.blocks[slot]``), and how many of them are in the free queue.
    """
    n_hits, n_evictable = 0, 0
    for s in range(pool.chain_start[chain], pool.chain_start[chain + 1]):
        end = min(pool.segments.end[s], max_blocks)
        offset = pool.segments.offset[s]
        while n_hits < end:
            entry = pool.nodes.first[offset + n_hits]
            if entry == 0:
                return n_hits, n_evictable
            slots.blocks[slot, n_hits] = entry
            if pool.entries.references[entry] == 0:
                n_evictable += 1
            n_hits += 1
        if n_hits == max_blocks:
            break
    return n_hits, n_evictable


@inlined
def touch(pool: Pool, slots: Slots, slot: int, n_hits: int) -> None:
    """Hold the blocks that `find_cached` found."""
    for j in range(n_hits):
        entry = slots.blocks[slot, j]
        if pool.entries.references[entry] == 0:
            unlink(pool, entry)
            pool.n.free -= 1
        pool.entries.references[entry] += 1
    slots.rows.n_keyed[slot] = n_hits


@inlined
def register(pool: Pool, slots: Slots, slot: int, chain: int, n_full: int) -> None:
    """Make a request's blocks up to `n_full` findable; a prefix that is cached already gets one more copy."""
    n_full = min(n_full, slots.rows.keyed_limit[slot])
    j = slots.rows.n_keyed[slot]
    if j >= n_full:
        return
    s = pool.chain_start[chain]
    while j < n_full:
        while j >= pool.segments.end[s]:
            s += 1
        node = pool.segments.offset[s] + j
        entry = _take_spare(pool)
        pool.entries.node[entry] = node
        pool.entries.count[entry] = 1
        pool.entries.references[entry] = 1
        last = pool.nodes.last[node]
        pool.entries.same_prev[entry] = last
        pool.entries.same_next[entry] = 0
        if last:
            pool.entries.same_next[last] = entry
        else:
            pool.nodes.first[node] = entry
        pool.nodes.last[node] = entry
        slots.blocks[slot, j] = entry
        j += 1
    slots.rows.n_keyed[slot] = n_full
