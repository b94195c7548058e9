"""Who waits, in the order of admission: a heap. Requests that have ended stay in it until they come to its head."""

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Limits, Requests, Slots, State
from stepcal.simulator.visiting.layout import Visits


@inlined
def arrival_time(requests: Requests, visits: Visits, request: int) -> float:
    """When a request arrived, as the scheduler compares it."""
    return visits.told_arrival[request] if visits.told_arrival.size else requests.rows.arrival_us[request]


@inlined
def _is_before(visits: Visits, i: int, j: int) -> bool:
    waiting = visits.waiting
    if waiting.level[i] != waiting.level[j]:
        return waiting.level[i] < waiting.level[j]
    if waiting.time[i] != waiting.time[j]:
        return waiting.time[i] < waiting.time[j]
    return waiting.tie[i] < waiting.tie[j]


@inlined
def _swap(visits: Visits, i: int, j: int) -> None:
    waiting = visits.waiting
    waiting.time[i], waiting.time[j] = waiting.time[j], waiting.time[i]
    waiting.level[i], waiting.level[j] = waiting.level[j], waiting.level[i]
    waiting.tie[i], waiting.tie[j] = waiting.tie[j], waiting.tie[i]
    waiting.request[i], waiting.request[j] = waiting.request[j], waiting.request[i]
    waiting.slot[i], waiting.slot[j] = waiting.slot[j], waiting.slot[i]


@compiled
def push(limits: Limits, requests: Requests, visits: Visits, request: int, slot: int) -> None:
    """A request waits: a new one (`slot` -1), or one that was preempted.

    First come, first served: new ones behind all others, preempted ones in front of them. By priority: in the order of
    priority and arrival, wherever they come from.
    """
    i, waiting = visits.n.waiting, visits.waiting
    visits.n.waiting = i + 1
    visits.n.moves += 1
    waiting.request[i], waiting.slot[i] = request, slot
    if limits.by_priority:
        waiting.level[i] = visits.priority[request]
        waiting.time[i] = arrival_time(requests, visits, request)
        waiting.tie[i] = visits.tie[request]
    else:
        waiting.level[i], waiting.time[i] = (1 if slot < 0 else 0), 0.0
        waiting.tie[i] = visits.n.moves if slot < 0 else -visits.n.moves
    while i > 0 and _is_before(visits, i, (i - 1) // 2):
        _swap(visits, i, (i - 1) // 2)
        i = (i - 1) // 2


@compiled
def pop(visits: Visits) -> None:
    """Take the head off the heap."""
    n = visits.n.waiting - 1
    visits.n.waiting = n
    _swap(visits, 0, n)
    i, child = 0, 1
    while child < n:
        if child + 1 < n and _is_before(visits, child + 1, child):
            child += 1
        if _is_before(visits, i, child):
            break
        _swap(visits, i, child)
        i, child = child, 2 * child + 1


@inlined
def add_arrived(limits: Limits, requests: Requests, visits: Visits, state: State) -> None:
    """Let wait who has arrived since the last call."""
    while visits.n.seen < state.queue_tail:
        push(limits, requests, visits, requests.queue[visits.n.seen], -1)
        visits.n.seen += 1


@inlined
def head(requests: Requests, slots: Slots, visits: Visits, state: State) -> int:
    """The slot of the request that is next to be admitted, -1 if nobody waits; a new one is shown in a free slot."""
    while visits.n.waiting > 0 and requests.rows.status[visits.waiting.request[0]] >= at.FINISHED:
        pop(visits)  # ended while it waited
    if visits.n.waiting == 0:
        return -1
    slot = visits.waiting.slot[0]
    if slot >= 0:
        return slot
    request = visits.waiting.request[0]
    slot = slots.free[state.n_free_slots - 1]
    slots.rows.request[slot] = request
    slots.rows.prompt[slot] = requests.rows.prompt_tokens[request]
    slots.rows.output[slot] = requests.rows.output_tokens[request]
    slots.rows.generated[slot] = 0
    slots.rows.sampling[slot] = 0
    slots.rows.unprocessed[slot] = 0
    slots.rows.chunk_call[slot] = -1
    return slot
