"""What reaches the engine from outside: requests that arrive, follow-up turns of sessions, and clients that give up."""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.departures import abort_request
from stepcal.simulator.layout import Limits, Pool, Requests, Slots
from stepcal.simulator.sending import advance_clients, next_place, pop_arrival
from stepcal.units import IntArray


@inlined
def next_arrival(limits: Limits, requests: Requests, counts: IntArray) -> tuple[float, int]:
    """Time of the next arrival, and its request; infinity and -1 if there is none.

    Where a client will be free before that, its time is returned, with -1: what it sends can arrive then or later.
    """
    if limits.max_in_flight:
        place = next_place(limits, requests, counts)
        if counts[at.N_HEAP] > 0 and requests.heap.time[0] <= place:
            return requests.heap.time[0], requests.heap.request[0]
        return place, -1
    n = counts[at.LIST_END]
    if requests.follower.size:
        while counts[at.NEXT_ARRIVAL] < n and requests.rows.is_follow_up[counts[at.NEXT_ARRIVAL]]:
            counts[at.NEXT_ARRIVAL] += 1
    time, request = np.inf, -1
    if counts[at.NEXT_ARRIVAL] < n:
        request = counts[at.NEXT_ARRIVAL]
        time = requests.rows.arrival_us[request]
    if counts[at.N_HEAP] > 0 and requests.heap.time[0] < time:
        return requests.heap.time[0], requests.heap.request[0]
    return time, request


@inlined
def receive(limits: Limits, requests: Requests, counts: IntArray, until: float) -> None:
    """Queue the requests that have arrived."""
    while True:
        if limits.has_clients:
            advance_clients(limits, requests, counts, until)
        time, request = next_arrival(limits, requests, counts)
        if request < 0 or time > until:
            return
        if limits.max_in_flight or (requests.follower.size and requests.rows.is_follow_up[request]):
            pop_arrival(requests, counts)
            requests.rows.arrival_us[request] = time
        else:
            counts[at.NEXT_ARRIVAL] += 1
        requests.rows.status[request] = at.WAITING
        requests.queue[counts[at.QUEUE_TAIL]] = request
        counts[at.QUEUE_TAIL] += 1
        counts[at.N_QUEUED] += 1


@inlined
def _abort_time(limits: Limits, requests: Requests, request: int) -> float:
    return (
        requests.abort_at[request] if limits.has_abort_times else requests.rows.arrival_us[request] + limits.timeout_us
    )


@inlined
def next_abort(limits: Limits, requests: Requests, counts: IntArray) -> float:
    """When the next client gives up; requests that ended are skipped."""
    if limits.has_abort_times:
        order, n = requests.abort_order, requests.abort_order.size
    elif limits.timeout_us < np.inf:
        order, n = requests.queue, counts[at.QUEUE_TAIL]
    else:
        return np.inf
    while counts[at.NEXT_ABORT] < n and requests.rows.status[order[counts[at.NEXT_ABORT]]] >= at.FINISHED:
        counts[at.NEXT_ABORT] += 1
    if counts[at.NEXT_ABORT] == n:
        return np.inf
    return _abort_time(limits, requests, order[counts[at.NEXT_ABORT]])


@compiled
def abort_due(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, counts: IntArray, until: float, now: float
) -> None:
    """Abort the requests whose client gave up by `until`, in the order in which they did."""
    if next_abort(limits, requests, counts) > until:
        return
    if limits.has_abort_times:
        order, n = requests.abort_order, requests.abort_order.size
    else:
        order, n = requests.queue, counts[at.QUEUE_TAIL]
    k = counts[at.NEXT_ABORT]
    while k < n and _abort_time(limits, requests, order[k]) <= until:
        request = order[k]
        if requests.rows.status[request] == at.WAITING or requests.rows.status[request] == at.RUNNING:
            abort_request(limits, requests, slots, pool, counts, request, now)
        k += 1
    if limits.counts_calls:
        counts[at.NEXT_ABORT] = k  # an abort of a request that is not there is lost


@compiled
def abort_before_output(
    limits: Limits, requests: Requests, slots: Slots, pool: Pool, counts: IntArray, call: int, now: float
) -> None:
    """Aborts that reach the engine while a batch runs take effect before its output is processed."""
    if not limits.counts_calls:
        abort_due(limits, requests, slots, pool, counts, now, now)
        return
    order = requests.output_abort_order
    while counts[at.NEXT_OUTPUT_ABORT] < order.size:
        request = order[counts[at.NEXT_OUTPUT_ABORT]]
        if requests.output_abort_at[request] > call:
            return
        is_alive = requests.rows.status[request] == at.WAITING or requests.rows.status[request] == at.RUNNING
        if is_alive and requests.output_abort_at[request] == call:
            abort_request(limits, requests, slots, pool, counts, request, now)
        counts[at.NEXT_OUTPUT_ABORT] += 1
