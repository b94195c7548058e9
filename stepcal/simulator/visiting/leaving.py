"""How requests leave the lists of the loop that visits each of them."""

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled
from stepcal.simulator.groups import forget_private, free_groups
from stepcal.simulator.layout import Limits, Pool, Requests, Slots, State


@compiled
def leave_running(slots: Slots, state: State, i: int) -> None:
    """Take a request off the running list."""
    state.n_running -= 1
    for j in range(i, state.n_running):
        slots.running[j] = slots.running[j + 1]


@compiled
def leave_lists(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, slot: int) -> None:
    """A request has ended: it is off its list, and its blocks are free. (The waiting heap drops it at its head.)"""
    if slots.rows.state[slot] == at.SLOT_PREEMPTED:
        state.n_preempted -= 1
    else:
        i = 0
        while slots.running[i] != slot:
            i += 1
        leave_running(slots, state, i)
        free_groups(limits, pool, slots, slot)
    forget_private(limits, pool, slots, slot, requests.rows.chain[slots.rows.request[slot]])


@compiled
def abort_visited(limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, request: int) -> int:
    """Abort a request that is running or preempted. Returns its slot."""
    slot = 0
    while slots.rows.request[slot] != request or slots.rows.state[slot] == at.SLOT_FREE:
        slot += 1
    requests.rows.generated_tokens[request] = slots.rows.generated[slot]
    leave_lists(limits, requests, slots, pool, state, slot)
    return slot
