"""What reaches the engine from outside: requests that arrive, follow-up turns of sessions, and clients that give up."""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.departures import abort_request
from stepcal.simulator.layout import Limits, Pool, Requests, Slots
from stepcal.units import IntArray


@inlined
def next_arrival(requests: Requests, counts: IntArray) -> tuple[float, int]:
    """Time of the next arrival, and its request; infinity and -1 if there is none."""
    n = requests.rows.size
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


@compiled
def _pop_heap(requests: Requests, counts: IntArray) -> None:
    counts[at.N_HEAP] -= 1
    n = counts[at.N_HEAP]
    time, request = requests.heap.time[n], requests.heap.request[n]
    i, child = 0, 1
    while child < n:
        if child + 1 < n and requests.heap.time[child + 1] < requests.heap.time[child]:
            child += 1
        if requests.heap.time[child] >= time:
            break
        requests.heap.time[i], requests.heap.request[i] = requests.heap.time[child], requests.heap.request[child]
        i, child = child, 2 * child + 1
    requests.heap.time[i], requests.heap.request[i] = time, request


@inlined
def receive(requests: Requests, counts: IntArray, until: float) -> None:
    """Queue the requests that have arrived."""
    while True:
        time, request = next_arrival(requests, counts)
        if request < 0 or time > until:
            return
        if requests.follower.size and requests.rows.is_follow_up[request]:
            _pop_heap(requests, counts)
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
