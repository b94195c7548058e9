"""Sizes of the CUDA graphs that vLLM captures, and the batch that a step is padded to.

By default 1, 2, 4, then multiples of 8 below 256 and of 16 beyond, up to twice `max_num_seqs` and no more than 512 tokens.
Newer releases add the token budget and `max_num_seqs` themselves, and go on to 1024 on data-centre Blackwell GPUs. The
tests hold these sizes to those that each release's own code chooses (``tests/conformance/defaults``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from stepcal.simulator import ServerConfig
from stepcal.units import FloatArray, IntArray

SMALLEST_GRAPHS = (1, 2, 4)
FINE_STEP, COARSE_STEP, COARSE_FROM = 8, 16, 256
"""Captured sizes go up by 8 below 256 tokens and by 16 from there on."""
LARGEST_GRAPH = 512
"""Tokens of the largest graph that is captured by default, but for the GPUs below."""
DATA_CENTRE_BLACKWELL = ("b200", "b300-sxm", "gb200", "gb300")
"""GPUs of compute capability 10.x, for which a release may capture larger graphs."""


def graph_sizes(server: ServerConfig, accelerator: str) -> IntArray:
    """Tokens of each captured CUDA graph, ascending, shape (n_graphs,).

    Parameters
    ----------
    server : ServerConfig
        Its limits and its release of vLLM.
    accelerator : str
        Name of the GPU.

    Returns
    -------
    ndarray of int

    Examples
    --------
    >>> from stepcal.simulator import ServerConfig
    >>> graph_sizes(ServerConfig(kv_blocks=100, max_num_seqs=10), "h100-sxm").tolist()
    [1, 2, 4, 8, 16]
    """
    release, budget = server.release, server.max_num_batched_tokens
    ceiling = release.largest_graph_on_blackwell if accelerator in DATA_CENTRE_BLACKWELL else LARGEST_GRAPH
    largest = min(2 * server.max_num_seqs, ceiling, budget)
    fine = range(FINE_STEP, min(largest + 1, COARSE_FROM), FINE_STEP)
    coarse = range(COARSE_FROM, largest + 1, COARSE_STEP)
    sizes = {size for size in SMALLEST_GRAPHS if size <= largest} | set(fine) | set(coarse)
    more = {budget} if release.captures_token_budget else set()
    more |= {server.max_num_seqs} if release.captures_most_requests else set()
    return np.array(sorted(sizes | {size for size in more if size <= largest}))


def padded_tokens(tokens: ArrayLike, sizes: ArrayLike) -> FloatArray:
    """Tokens of the graph that runs a step: the smallest captured size that holds it; larger steps are not padded.

    Parameters
    ----------
    tokens : array_like of int
        Tokens of steps.
    sizes : array_like of int, shape (n_graphs,)
        From `graph_sizes`.

    Returns
    -------
    ndarray, of the shape of `tokens`

    Examples
    --------
    >>> padded_tokens([0, 1, 3, 9, 17], [1, 2, 4, 8, 16]).astype(int).tolist()
    [0, 1, 4, 16, 17]
    """
    t, graphs = np.asarray(tokens), np.asarray(sizes)
    graph = graphs[np.minimum(np.searchsorted(graphs, t), graphs.size - 1)]
    return np.asarray(np.where((t > 0) & (t <= graphs[-1]), graph, t), dtype=float)
