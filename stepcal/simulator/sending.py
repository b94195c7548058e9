"""Who sends which request when: clients with one request at a time, turns of sessions, stages that wait for each other.

A client that is free takes the next request of the list and sends it when its time has come. Free places and requests
that are on their way are two heaps, so that clients act in the order of time whatever the order of events in the engine.
"""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Limits, Requests
from stepcal.units import IntArray


@inlined
def _is_before(requests: Requests, i: int, time: float, request: int) -> bool:
    """Whether an entry of the heap comes before a request at a time; at one time, the list's order decides."""
    return requests.heap.time[i] < time or (requests.heap.time[i] == time and requests.heap.request[i] < request)


@compiled
def push_arrival(requests: Requests, counts: IntArray, time: float, request: int) -> None:
    """A request will reach the engine at a time."""
    i = counts[at.N_HEAP]
    counts[at.N_HEAP] = i + 1
    while i > 0:
        parent = (i - 1) // 2
        if _is_before(requests, parent, time, request):
            break
        requests.heap.time[i], requests.heap.request[i] = requests.heap.time[parent], requests.heap.request[parent]
        i = parent
    requests.heap.time[i], requests.heap.request[i] = time, request


@compiled
def pop_arrival(requests: Requests, counts: IntArray) -> None:
    """Drop the earliest of the requests on their way."""
    counts[at.N_HEAP] -= 1
    n = counts[at.N_HEAP]
    time, request = requests.heap.time[n], requests.heap.request[n]
    i, child = 0, 1
    while child < n:
        if child + 1 < n and _is_before(requests, child + 1, requests.heap.time[child], requests.heap.request[child]):
            child += 1
        if not _is_before(requests, child, time, request):
            break
        requests.heap.time[i], requests.heap.request[i] = requests.heap.time[child], requests.heap.request[child]
        i, child = child, 2 * child + 1
    requests.heap.time[i], requests.heap.request[i] = time, request


@compiled
def _push_place(requests: Requests, counts: IntArray, time: float) -> None:
    i = counts[at.N_PLACES]
    counts[at.N_PLACES] = i + 1
    while i > 0 and requests.places[(i - 1) // 2] > time:
        requests.places[i] = requests.places[(i - 1) // 2]
        i = (i - 1) // 2
    requests.places[i] = time


@compiled
def _pop_place(requests: Requests, counts: IntArray) -> None:
    counts[at.N_PLACES] -= 1
    n = counts[at.N_PLACES]
    time = requests.places[n]
    i, child = 0, 1
    while child < n:
        if child + 1 < n and requests.places[child + 1] < requests.places[child]:
            child += 1
        if requests.places[child] >= time:
            break
        requests.places[i] = requests.places[child]
        i, child = child, 2 * child + 1
    requests.places[i] = time


@inlined
def next_place(limits: Limits, requests: Requests, counts: IntArray) -> float:
    """When the next client is free to take a request of the list; infinity if none is or nothing is left to take."""
    if limits.max_in_flight == 0 or counts[at.N_PLACES] == 0 or counts[at.NEXT_ARRIVAL] == counts[at.LIST_END]:
        return np.inf
    return requests.places[0]


@inlined
def _take_next(requests: Requests, counts: IntArray) -> None:
    """The client that is free first takes the next request: sent when its time has come and the client has thought."""
    request = counts[at.NEXT_ARRIVAL]
    counts[at.NEXT_ARRIVAL] = request + 1
    ready_us = requests.places[0]
    if requests.think_us.size:
        ready_us += requests.think_us[request]
    _pop_place(requests, counts)
    push_arrival(requests, counts, max(requests.rows.arrival_us[request], ready_us), request)


@compiled
def leave(limits: Limits, requests: Requests, counts: IntArray, request: int, time: float) -> None:
    """A client has its answer, or gave up: it is free. After the last one of a stage, the next stage begins.

    As all times here, `time` is when something sent at that moment would reach the engine.
    """
    if requests.rows.has_left[request]:
        return
    requests.rows.has_left[request] = 1
    if requests.stage_first.size:
        stage = requests.rows.stage[request]
        requests.stage_end_us[stage] = max(requests.stage_end_us[stage], time)
        counts[at.N_STAGE_LEFT] -= 1
        if counts[at.N_STAGE_LEFT] == 0:
            begin_stage(limits, requests, counts, stage + 1, requests.stage_end_us[stage] + limits.stage_interval_us)
            return
    if limits.max_in_flight:
        _push_place(requests, counts, time)


@compiled
def begin_stage(limits: Limits, requests: Requests, counts: IntArray, stage: int, time: float) -> None:
    """Open the list up to the end of a stage, or of the next one that has requests; all clients are free."""
    n_stages = requests.stage_first.size - 1
    while stage < n_stages and requests.stage_first[stage] == requests.stage_first[stage + 1]:
        stage += 1
        time += limits.stage_interval_us
    if stage == n_stages:
        return
    first, end = requests.stage_first[stage], requests.stage_first[stage + 1]
    for i in range(first, end):
        requests.rows.arrival_us[i] += time
    counts[at.LIST_END] = end
    counts[at.N_STAGE_LEFT] = end - first
    counts[at.N_PLACES] = min(limits.max_in_flight, end - first)
    for i in range(counts[at.N_PLACES]):
        requests.places[i] = -np.inf


@inlined
def _next_to_give_up(limits: Limits, requests: Requests, counts: IntArray) -> float:
    """When the next client gives up that has not left yet; it is the one at `NEXT_GIVE_UP` of the queue."""
    if limits.timeout_us == np.inf:
        return np.inf
    while counts[at.NEXT_GIVE_UP] < counts[at.QUEUE_TAIL]:
        request = requests.queue[counts[at.NEXT_GIVE_UP]]
        if not requests.rows.has_left[request]:
            return requests.rows.arrival_us[request] + limits.timeout_us
        counts[at.NEXT_GIVE_UP] += 1
    return np.inf


@compiled
def advance_clients(limits: Limits, requests: Requests, counts: IntArray, until: float) -> None:
    """Let clients give up and take requests, in order of time, up to the next arrival and no further than `until`."""
    while True:
        arrival = np.inf
        if counts[at.N_HEAP]:
            arrival = requests.heap.time[0]
        elif limits.max_in_flight == 0 and counts[at.NEXT_ARRIVAL] < counts[at.LIST_END]:
            arrival = requests.rows.arrival_us[counts[at.NEXT_ARRIVAL]]
        give_up, place = _next_to_give_up(limits, requests, counts), next_place(limits, requests, counts)
        if min(give_up, place) > min(until, arrival) or min(give_up, place) == np.inf:
            return
        if give_up <= place:
            leave(limits, requests, counts, requests.queue[counts[at.NEXT_GIVE_UP]], give_up)
        else:
            _take_next(requests, counts)
