"""KV offloading as far as it costs step time: how many blocks the pool in CPU memory has, and who finds no room in it.

With ``kv_offloading_size`` vLLM copies new full KV blocks to CPU memory, until 0.20.0 as follows. What a request in flight
has stored stays until the request ends; where the requests in flight hold more blocks than the pool has, the others are
rejected and ask again in every step, each time at the price of a scan of the pool. That happens inside ``schedule()``, on
the CPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.simulator.config import ServerConfig
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.kv_cache import KvCache
from stepcal.units import BYTES_PER_GIB, FloatArray

MOST_OFFLOAD_GIB = 1 << 20
"""A pebibyte of CPU memory: more than any server has."""


def offload_blocks(
    architecture: ModelArchitecture,
    gib: float,
    *,
    block_size: int = 16,
    cache: KvCache | None = None,
) -> int:
    """Return the KV blocks that fit into an offload pool.

    Parameters
    ----------
    architecture : ModelArchitecture
    gib : float
        ``kv_offloading_size``: GiB of all ranks together; 0 for none.
    block_size : int
        Tokens of a block.
    cache : KvCache, optional
        Of the server; by default one rank's, without windows.

    Returns
    -------
    int

    Raises
    ------
    InputError
        If `gib` is negative or not finite.
    """
    if not (np.isfinite(gib) and gib >= 0):
        raise InputError(
            f"`kv_offloading_size` is {gib} GiB; the size of the offload pool must be finite and at least 0 (no offloading)."
        )
    if gib > MOST_OFFLOAD_GIB:
        raise InputError(
            f"`kv_offloading_size` is {gib:g} GiB; the offload pool must be at most {MOST_OFFLOAD_GIB:,} GiB."
        )
    blocks_of = cache or KvCache(architecture, block_size=block_size)
    return int(gib * BYTES_PER_GIB // blocks_of.pool_block_bytes)


def offloading_notes(server: ServerConfig) -> list[str]:
    """Return what to tell a user whose server offloads KV about what is not simulated as its release does it.

    Examples
    --------
    >>> offloading_notes(ServerConfig(kv_blocks=100))
    []
    >>> len(offloading_notes(ServerConfig(kv_blocks=100, offload_blocks=10)))
    2
    """
    if server.offload_blocks == 0:
        return []
    notes = ["KV that only the pool in CPU memory has is computed again: loads from the pool are not simulated."]
    if server.release.holds_offloaded_blocks and server.async_scheduling and not server.release.offloads_outputs:
        notes.append(
            f"vLLM {server.vllm_version} as released offloads prompts alone with asynchronous scheduling. Outputs are "
            "counted as offloaded too, as the servers seem to have done on which the coefficients were calibrated: a small "
            "pool rejects fewer requests than are simulated."
        )
    return notes


def rejected_requests(
    running: ArrayLike, held_blocks: ArrayLike, output_tokens: ArrayLike, *, pool_blocks: int, block_size: int = 16
) -> FloatArray:
    """Requests that the pool rejects in a step, shape (n_steps,).

    R running requests hold D different blocks and the pool has P. On average it satisfies ``R P / D`` of them and rejects
    the rest in every step. Whoever is satisfied asks again with each new block, every `block_size` steps, and gets it when
    some request ends, which happens every (output tokens / R) steps: half of that time it waits too. Without a pool, or
    while all blocks fit, nobody is rejected.

    Parameters
    ----------
    running : array_like of float, shape (n_steps,)
        Requests in flight.
    held_blocks : array_like of float, shape (n_steps,)
        Different KV blocks that they hold.
    output_tokens : array_like of float, shape (n_steps,)
        Mean tokens that each of them generates.
    pool_blocks : int
        0 without offloading.
    block_size : int
        Tokens of a block.
    """
    r, held, output = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(v, dtype=float)) for v in (running, held_blocks, output_tokens))
    )
    if pool_blocks == 0:
        return np.zeros(r.shape)
    satisfied = r * pool_blocks / np.maximum(held, 1.0)
    waits = np.minimum(1.0, output / (2.0 * block_size * np.maximum(r, 1.0)))
    return np.where(held > pool_blocks, r - satisfied * (1.0 - waits), 0.0)


def held_blocks(
    running: ArrayLike,
    kv_tokens: ArrayLike,
    prompt_tokens: ArrayLike,
    *,
    n_texts: int,
    block_size: int = 16,
) -> FloatArray:
    """Different blocks of a rebuilt batch, shape (n_steps,), whose prompts cycle through `n_texts` texts.

    Requests beyond the number of texts share their prompt's blocks with another; half a block of each is not full.

    Parameters
    ----------
    running, kv_tokens, prompt_tokens : array_like of float, shape (n_steps,)
        Requests in flight, their contexts summed, and the length of a prompt.
    n_texts, block_size : int
    """
    r = np.atleast_1d(np.asarray(running, dtype=float))
    shared = np.maximum(0.0, r - n_texts) * np.floor(np.asarray(prompt_tokens, dtype=float) / block_size)
    return np.asarray(np.maximum(np.asarray(kv_tokens, dtype=float) / block_size + 0.5 * r - shared, 0.0))
