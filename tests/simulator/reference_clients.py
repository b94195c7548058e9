"""A slow reference of clients that wait for each other, written to be read: every client is an object with a state.

It stands where the reference's `Clock` does and says when requests reach the engine, given when their answers left it.
"""

import math
from collections.abc import Callable

from vllm_reference import Batch, Clock


class ClientClock(Clock):
    """Clients with one request at a time, and stages that wait for each other.

    Parameters
    ----------
    descriptions : list of dict
        As for `Clock`; ``arrival_us`` counts from the begin of the request's ``stage``.
    load : dict
        ``max_in_flight`` (or None), ``think_us`` of each request, ``interval_us`` between stages (None: one stage),
        ``round_trip_us`` from the engine to a client and back, ``timeout_us`` (or None).
    """

    def __init__(self, descriptions: list[dict], step_time_us: Callable[[Batch], float], load: dict):
        super().__init__([], step_time_us)
        self.load = load
        self.timeout_us = math.inf if load["timeout_us"] is None else load["timeout_us"]
        n_stages = max(d["stage"] for d in descriptions) + 1
        self.stages = [[d for d in descriptions if d["stage"] == s] for s in range(n_stages)]
        self.descriptions = {d["index"]: d for d in descriptions}
        self.sent_us: dict[int, float] = {}  # requests whose clients wait for an answer, and when they were sent
        self.arrived: list[int] = []
        self.stage_end_us = 0.0
        self._begin_stage(0.0)

    def _begin_stage(self, begin_us: float) -> None:
        stage = self.stages.pop(0)
        if not stage:  # ends where it begins
            self._begin_stage(begin_us + self.load["interval_us"])
            return
        self.unsent = [{**d, "arrival_us": begin_us + d["arrival_us"]} for d in stage]
        self.on_their_way: list[tuple[float, int]] = []
        self.n_left = len(stage)
        self.free_us = [-math.inf] * min(self.load["max_in_flight"] or len(stage), len(stage))

    @property
    def pending(self) -> bool:
        return bool(self.arrived or self.on_their_way or self.unsent or self.stages)

    @pending.setter
    def pending(self, _: object) -> None: ...

    def _leave(self, time_us: float) -> None:
        """A client is free; the last one of a stage begins the next."""
        self.stage_end_us = max(self.stage_end_us, time_us)
        self.n_left -= 1
        if self.n_left == 0 and self.stages:
            self._begin_stage(self.stage_end_us + self.load["interval_us"])
        else:
            self.free_us.append(time_us)

    def _next_event(self) -> tuple[float, int]:
        """When something happens at the clients, and what: 0 a client gives up, 1 it takes a request, 2 one arrives."""
        give_up = min((sent + self.timeout_us for sent in self.sent_us.values()), default=math.inf)
        free = min(self.free_us, default=math.inf) if self.unsent else math.inf
        arrival = min((time for time, _ in self.on_their_way), default=math.inf)
        return min((give_up, 0), (free, 1), (arrival, 2))

    def _do(self, time_us: float, what: int) -> None:
        if what == 0:
            index = min(i for i, sent in self.sent_us.items() if sent + self.timeout_us == time_us)
            del self.sent_us[index]
            self._leave(time_us)
        elif what == 1:
            self.free_us.remove(time_us)
            d = self.unsent.pop(0)
            ready_us = time_us + self.load["think_us"][d["index"]]
            self.on_their_way.append((max(d["arrival_us"], ready_us), d["index"]))
        else:
            arrival_us, index = min(self.on_their_way)
            self.on_their_way.remove((arrival_us, index))
            self.arrived.append(index)
            self.sent_us[index] = arrival_us
            if self.timeout_us < math.inf:
                self.abort_us[index] = arrival_us + self.timeout_us

    def _advance(self, until_us: float) -> None:
        while (event := self._next_event())[0] <= until_us and event[0] < math.inf:
            self._do(*event)

    def wait_for_arrival(self) -> None:
        self._advance(self.now_us)
        while not self.arrived:
            time_us, what = self._next_event()
            assert time_us < math.inf, "clients wait for ever"
            self._do(time_us, what)
            self.now_us = max(self.now_us, time_us)

    def take_arrivals(self) -> list[int]:
        self._advance(self.now_us)
        arrived, self.arrived = self.arrived, []
        return arrived

    def finished(self, index: int) -> None:
        """The engine has processed the last output of a request; its client may have given up by the time it arrives."""
        answered_us = self.now_us + self.load["round_trip_us"]
        if index in self.sent_us and answered_us <= self.sent_us[index] + self.timeout_us:
            del self.sent_us[index]
            self._leave(answered_us)
