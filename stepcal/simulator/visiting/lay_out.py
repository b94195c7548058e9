"""Lay out what the loop that visits each request has of its own, and more slots for requests that are preempted."""

import numpy as np

from stepcal.simulator import layout as at
from stepcal.simulator.config import ServerConfig
from stepcal.simulator.layout import Int32Array, Pool, Slots, State
from stepcal.simulator.load.workload import RequestList
from stepcal.simulator.visiting.layout import VISIT_COUNTS, WAITING_ROW, Visits
from stepcal.units import IntArray

SLOTS_PER_SEQUENCE = 2
"""Slots laid out for each request that may run: others wait, preempted, behind more important ones. More come on demand."""


def lay_out_visits(server: ServerConfig, requests: RequestList) -> Visits:
    """Nobody waits, nothing is in flight."""
    n, room = len(requests), server.max_num_seqs
    priority = tie = np.zeros(0, np.int32)
    if server.scheduling_policy == "priority":
        priority = np.zeros(n, np.int32) if requests.priority is None else requests.priority
        tie = _order_of_names(np.arange(n) if requests.index is None else requests.index)
    return Visits(
        waiting=np.zeros(n, WAITING_ROW),
        priority=priority,
        tie=tie,
        told_arrival=np.zeros(0),
        flight_request=np.zeros((2, room), np.int32),
        flight_slot=np.zeros((2, room), np.int32),
        flight_tokens=np.zeros((2, room), np.int32),
        flight_samples=np.zeros((2, room), np.int8),
        flight_size=np.zeros(2, np.int64),
        n=at.one_row(VISIT_COUNTS),
    )


def _order_of_names(index: IntArray) -> Int32Array:
    """Rank of each request by its name: vLLM's request ids are texts, so that 10 comes before 9."""
    rank = np.empty(index.size, np.int32)
    rank[np.argsort(index.astype(np.str_), kind="stable")] = np.arange(index.size, dtype=np.int32)
    return rank


def grow_slots(slots: Slots, pool: Pool, state: State) -> tuple[Slots, Pool]:
    """Twice as many slots, with what stands for their blocks; what the present ones hold stays as it is."""
    n = slots.rows.size
    n_groups, n_blocks = slots.table.shape[1:]

    def doubled(values: np.ndarray) -> np.ndarray:
        return np.concatenate((values, np.zeros_like(values)))

    free = doubled(slots.free)
    free[state.n_free_slots : state.n_free_slots + n] = np.arange(2 * n - 1, n - 1, -1)
    state.n_free_slots += n
    # Nodes are laid out group by group: the shared ones, then those of each slot.
    old = pool.nodes.size // n_groups
    new = old + n * n_blocks
    nodes = np.zeros((n_groups, new), at.NODE_ROW)
    nodes[:, :old] = pool.nodes.reshape(n_groups, old)
    node = pool.entries["node"]
    named = node >= 0
    node[named] += node[named] // old * (new - old)
    slots = slots._replace(
        rows=doubled(slots.rows),
        blocks=doubled(slots.blocks),
        table=doubled(slots.table),
        table_len=doubled(slots.table_len),
        first_live=doubled(slots.first_live),
        free=free,
    )
    return slots, pool._replace(nodes=nodes.ravel())
