"""Who sends which request when: clients with one request at a time, turns of sessions, stages that wait for each other.

A client that is free takes the next request of the list and sends it when its time has come. Free places and requests
that are on their way are two heaps, so that clients act in the order of time whatever the order of events in the engine.
"""

import numpy as np

from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Limits, Requests, State


@inlined
def _is_before(requests: Requests, i: int, time: float, request: int) -> bool:
    """Whether an entry of the heap comes before a request at a time; at one time, the list's order decides."""
    return requests.heap.time[i] < time or (requests.heap.time[i] == time and requests.heap.request[i] < request)


@compiled
def push_arrival(requests: Requests, state: State, time: float, request: int) -> None:
    """A request will reach the engine at a time."""
    i = state.n_heap
    state.n_heap = i + 1
    while i > 0:
        parent = (i - 1) // 2
        if _is_before(requests, parent, time, request):
            break
        requests.heap.time[i], requests.heap.request[i] = requests.heap.time[parent], requests.heap.request[parent]
        i = parent
    requests.heap.time[i], requests.heap.request[i] = time, request


@compiled
def pop_arrival(requests: Requests, state: State) -> None:
    """Drop the earliest of the requests on their way."""
    state.n_heap -= 1
    n = state.n_heap
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
def _push_place(requests: Requests, state: State, time: float) -> None:
    i = state.n_places
    state.n_places = i + 1
    while i > 0 and requests.places[(i - 1) // 2] > time:
        requests.places[i] = requests.places[(i - 1) // 2]
        i = (i - 1) // 2
    requests.places[i] = time


@compiled
def _pop_place(requests: Requests, state: State) -> None:
    state.n_places -= 1
    n = state.n_places
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
def next_place(limits: Limits, requests: Requests, state: State) -> float:
    """When the next client is free to take a request of the list; infinity if none is or nothing is left to take."""
    if limits.max_in_flight == 0 or state.n_places == 0 or state.next_arrival == state.list_end:
        return np.inf
    return requests.places[0]


@inlined
def _take_next(requests: Requests, state: State) -> None:
    """The client that is free first takes the next request: sent when its time has come and the client has thought."""
    request = state.next_arrival
    state.next_arrival = request + 1
    ready_us = requests.places[0]
    if requests.think_us.size:
        ready_us += requests.think_us[request]
    _pop_place(requests, state)
    push_arrival(requests, state, max(requests.rows.arrival_us[request], ready_us), request)


@compiled
def leave(limits: Limits, requests: Requests, state: State, request: int, time: float) -> None:
    """A client has its answer, or gave up: it is free. After the last one of a stage, the next stage begins.

    As all times here, `time` is when something sent at that moment would reach the engine.
    """
    if requests.rows.has_left[request]:
        return
    requests.rows.has_left[request] = 1
    if requests.stage_first.size:
        stage = requests.rows.stage[request]
        requests.stage_end_us[stage] = max(requests.stage_end_us[stage], time)
        state.n_stage_left -= 1
        if state.n_stage_left == 0:
            begin_stage(limits, requests, state, stage + 1, requests.stage_end_us[stage] + limits.stage_interval_us)
            return
    if limits.max_in_flight:
        _push_place(requests, state, time)


@compiled
def begin_stage(limits: Limits, requests: Requests, state: State, stage: int, time: float) -> None:
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
    state.list_end = end
    state.n_stage_left = end - first
    state.n_places = min(limits.max_in_flight, end - first)
    for i in range(state.n_places):
        requests.places[i] = -np.inf


@inlined
def _next_to_give_up(limits: Limits, requests: Requests, state: State) -> float:
    """When the next client gives up that has not left yet; it is the one at `NEXT_GIVE_UP` of the queue."""
    if limits.timeout_us == np.inf:
        return np.inf
    while state.next_give_up < state.queue_tail:
        request = requests.queue[state.next_give_up]
        if not requests.rows.has_left[request]:
            return requests.rows.arrival_us[request] + limits.timeout_us
        state.next_give_up += 1
    return np.inf


@compiled
def advance_clients(limits: Limits, requests: Requests, state: State, until: float) -> None:
    """Let clients give up and take requests, in order of time, up to the next arrival and no further than `until`."""
    while True:
        arrival = np.inf
        if state.n_heap:
            arrival = requests.heap.time[0]
        elif limits.max_in_flight == 0 and state.next_arrival < state.list_end:
            arrival = requests.rows.arrival_us[state.next_arrival]
        give_up, place = _next_to_give_up(limits, requests, state), next_place(limits, requests, state)
        if min(give_up, place) > min(until, arrival) or min(give_up, place) == np.inf:
            return
        if give_up <= place:
            leave(limits, requests, state, requests.queue[state.next_give_up], give_up)
        else:
            _take_next(requests, state)
