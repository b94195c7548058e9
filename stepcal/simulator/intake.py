"""What reaches the engine from outside: requests that arrive, follow-up turns of sessions, and clients that give up."""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.departures import abort_request
from stepcal.simulator.layout import Limits, Pool, Requests, Slots, State
from stepcal.simulator.sending import advance_clients, next_place, pop_arrival


@inlined
def next_arrival(limits: Limits, requests: Requests, state: State) -> tuple[float, int]:
    """Time of the next arrival, and its request; infinity and -1 if there is none.

    Where a client will be free before that, its time is returned, with -1: what it sends can arrive then or later.
    """
    if limits.max_in_flight:
        place = next_place(limits, requests, state)
        if state.n_heap > 0 and requests.heap.time[0] <= place:
            return requests.heap.time[0], requests.heap.request[0]
        return place, -1
    n = state.list_end
    if requests.follower.size:
        while state.next_arrival < n and requests.rows.is_follow_up[state.next_arrival]:
            state.next_arrival += 1
    time, request = np.inf, -1
    if state.next_arrival < n:
        request = state.next_arrival
        time = requests.rows.arrival_us[request]
    if state.n_heap > 0 and requests.heap.time[0] < time:
        return requests.heap.time[0], requests.heap.request[0]
    return time, request


@inlined
def receive(limits: Limits, requests: Requests, state: State, until: float) -> None:
    """Queue the requests that have arrived."""
    while True:
        if limits.has_clients:
            advance_clients(limits, requests, state, until)
        time, request = next_arrival(limits, requests, state)
        if request < 0 or time > until:
            return
        if limits.max_in_flight or (requests.follower.size and requests.rows.is_follow_up[request]):
            pop_arrival(requests, state)
            requests.rows.arrival_us[request] = time
        else:
            state.next_arrival += 1
        requests.rows.status[request] = at.WAITING
        requests.queue[state.queue_tail] = request
        state.queue_tail += 1
        state.n_queued += 1


@inlined
def _abort_time(limits: Limits, requests: Requests, request: int) -> float:
    return (
        requests.abort_at[request] if limits.has_abort_times else requests.rows.arrival_us[request] + limits.timeout_us
    )


@inlined
def next_abort(limits: Limits, requests: Requests, state: State) -> float:
    """When the next client gives up; requests that ended are skipped."""
    if limits.has_abort_times:
        order, n = requests.abort_order, requests.abort_order.size
    elif limits.timeout_us < np.inf:
        order, n = requests.queue, state.queue_tail
    else:
        return np.inf
    while state.next_abort < n and requests.rows.status[order[state.next_abort]] >= at.FINISHED:
        state.next_abort += 1
    if state.next_abort == n:
        return np.inf
    return _abort_time(limits, requests, order[state.next_abort])


@compiled
def abort_due(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, until: float, now: float
) -> None:
    """Abort the requests whose client gave up by `until`, in the order in which they did."""
    if next_abort(limits, requests, state) > until:
        return
    if limits.has_abort_times:
        order, n = requests.abort_order, requests.abort_order.size
    else:
        order, n = requests.queue, state.queue_tail
    k = state.next_abort
    while k < n and _abort_time(limits, requests, order[k]) <= until:
        request = order[k]
        if requests.rows.status[request] == at.WAITING or requests.rows.status[request] == at.RUNNING:
            abort_request(limits, requests, slots, pool, state, request, now)
        k += 1
    if limits.counts_calls:
        state.next_abort = k  # an abort of a request that is not there is lost


@compiled
def abort_before_output(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, state: State, call: int, now: float
) -> None:
    """Aborts that reach the engine while a batch runs take effect before its output is processed."""
    if not limits.counts_calls:
        abort_due(limits, requests, slots, pool, state, now, now)
        return
    order = requests.output_abort_order
    while state.next_output_abort < order.size:
        request = order[state.next_output_abort]
        if requests.output_abort_at[request] > call:
            return
        is_alive = requests.rows.status[request] == at.WAITING or requests.rows.status[request] == at.RUNNING
        if is_alive and requests.output_abort_at[request] == call:
            abort_request(limits, requests, slots, pool, state, request, now)
        state.next_output_abort += 1
