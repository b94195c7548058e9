"""What the loop that visits each request has beside the arrays of `stepcal.simulator.layout`."""

from typing import Any, NamedTuple

import numpy as np

from stepcal.simulator.layout import Int8Array, Int32Array, Rows
from stepcal.units import FloatArray, IntArray

MOST_VAIN_PREEMPTIONS = 1 << 16
"""Preemptions without one token in between from which on requests are said to preempt each other for ever."""

# One row an entry of the waiting heap. The smallest (level, time, tie) comes first.
WAITING_ROW = np.dtype(
    [
        ("time", np.float64),
        ("level", np.int64),  # priority
        ("tie", np.int64),
        ("request", np.int32),
        ("slot", np.int32),  # of a preempted request, else -1
    ],
    align=True,
)

VISIT_COUNTS = np.dtype(
    [
        ("waiting", np.int64),  # entries of the waiting heap
        ("seen", np.int64),  # requests of `requests.queue` that were put on it
        ("moves", np.int64),  # entries ever put on it
        ("vain", np.int64),  # preemptions since the last token
    ],
    align=True,
)


class Visits(NamedTuple):
    """The waiting heap, and the requests of the batches in flight."""

    waiting: Rows  # WAITING_ROW
    priority: Int32Array  # (n,): the smallest comes first; empty unless priorities decide
    tie: Int32Array  # (n,): order of requests that arrive at one moment; empty unless priorities decide
    told_arrival: FloatArray  # (n,): arrival times that vLLM compares; empty: those at the engine
    flight_request: Int32Array  # (2, max_num_seqs): of the batches of even and odd calls
    flight_slot: Int32Array  # (2, max_num_seqs)
    flight_tokens: Int32Array  # (2, max_num_seqs)
    flight_samples: Int8Array  # (2, max_num_seqs): whether the batch samples the request's next token
    flight_size: IntArray  # (2,)
    n: Any  # VISIT_COUNTS
