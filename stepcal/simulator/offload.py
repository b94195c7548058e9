"""The pool in CPU memory that vLLM copies KV blocks to, as far as it costs time: requests whose blocks it has no room for.

With KV offloading on, vLLM 0.15.1 (and releases before 0.21.0, see `versions`) copies every new full block to a pool in
CPU memory. The blocks of a request in flight cannot be evicted from it until the request ends
(`OffloadingConnectorScheduler` completes a store only then). Once the
requests in flight hold more blocks than the pool has, whoever comes later is rejected, and asks again in every step: a scan
of the whole pool and a warning in the log, each time, inside ``schedule()``.

Who holds the pool is not simulated block by block, see `stepcal.specs.kv_offloading.rejected_requests` for the estimate.
"""

from stepcal.simulator.compilation import inlined
from stepcal.simulator.layout import Limits, Pool, Slots, State

REFRESH_CALLS = 64
"""Calls after which the number of rejected requests is computed anew where no request came or went."""


@inlined
def refresh_rejected(limits: Limits, slots: Slots, pool: Pool, state: State) -> None:
    """Compute the requests that the pool rejects, before a call is made, if requests came or went since the last one."""
    if limits.offload_blocks == 0:
        return
    if state.has_changed == 0 and state.n_calls % REFRESH_CALLS:
        return
    state.has_changed = 0
    held = limits.usable_blocks - pool.n.free
    state.rejected = 0.0
    n_running, n_output = state.n_running, 0
    if held > limits.offload_blocks and n_running > 0:
        for i in range(n_running):
            n_output += slots.rows.output[slots.running[i]]
        satisfied = n_running * limits.offload_blocks / held
        waits = min(1.0, n_output / (2.0 * limits.block_size * n_running * n_running))
        state.rejected = n_running - satisfied * (1.0 - waits)


@inlined
def calls_until_refresh(limits: Limits, state: State, n: int, has_pending: bool) -> int:
    """Shorten a run of `n` calls so that none of them would have computed the number anew."""
    if limits.offload_blocks == 0:
        return n
    if has_pending:  # a request ends after the first of these calls
        return min(n, 1)
    return min(n, REFRESH_CALLS - state.n_calls % REFRESH_CALLS)
