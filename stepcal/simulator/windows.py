"""What layers with a window read: a mean over them, where windows differ, weighted by the layers that have each."""

from stepcal.simulator import layout as at
from stepcal.simulator.compilation import compiled, inlined
from stepcal.simulator.layout import Pool, Slots, State


@inlined
def _read(kind: int, window: int, context: int) -> int:
    """Tokens that a layer reads for the token that ends a context."""
    return min(context, window) if kind == at.SLIDING else (context - 1) % window + 1


@compiled
def decode_window_kv(pool: Pool, slots: Slots, state: State) -> float:
    """Tokens that a layer with a window reads for the decoding requests of this call."""
    total, call = 0.0, state.n_calls
    for w in range(pool.windows.size):
        kind, window = pool.windows.kind[w], pool.windows.window[w]
        n = 0
        for i in range(state.n_running):
            slot = slots.running[i]
            if slots.rows.state[slot] == at.SLOT_DECODE and slots.rows.finish_call[slot] >= call:
                n += _read(kind, window, slots.rows.base[slot] + call + 1)
        total += pool.windows.share[w] * n
    return total


@compiled
def chunk_window_kv(pool: Pool, context: int, chunk: int) -> float:
    """Tokens that a layer with a window reads for a chunk of a prompt."""
    total = 0.0
    for w in range(pool.windows.size):
        first = _read(pool.windows.kind[w], pool.windows.window[w], context + 1)
        total += pool.windows.share[w] * min(context + chunk, chunk - 1 + first)
    return total


@compiled
def chunk_window_pairs(pool: Pool, context: int, chunk: int) -> float:
    """Query-context pairs of a chunk of a prompt in a layer with a window."""
    total = 0.0
    for w in range(pool.windows.size):
        n = 0
        for i in range(1, chunk + 1):
            n += _read(pool.windows.kind[w], pool.windows.window[w], context + i)
        total += pool.windows.share[w] * n
    return total
