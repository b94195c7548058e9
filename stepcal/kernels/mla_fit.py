"""Fits multi-head latent attention to tables of whole attention modules, less the matrix products that are in them.

A module of DeepSeek-V3 projects, attends and projects back. Its products are those that a served model has, so their time
comes from the constants of ``gemm``; what is left, small kernels and attention, is fitted. Decode works on the latents
(absorbed): a head reads them as keys and as values. Prefill widens them to keys and values of each head first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.kernels.fit import (
    LIMITS,
    SHORTEST_PROMPT,
    FittedKernel,
    fit_constants,
    starts,
)
from stepcal.kernels.forms import (
    BYTES_PER_ACTIVATION,
    MLA_DECODE,
    MLA_PREFILL,
    PRECISIONS,
    KernelConstants,
    gemm_us,
)
from stepcal.kernels.tables import KernelTables
from stepcal.specs.hardware import Accelerator
from stepcal.specs.latent_attention import LatentAttention
from stepcal.units import US_PER_S, FloatArray

DEEPSEEK_V3 = LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
DEEPSEEK_HIDDEN = 7168
"""Model of the tables (config.json of DeepSeek-V3); they vary its heads, as tensor parallelism does."""
LARGEST_BATCH, LONGEST_PROMPT = 1024, 16_384
MODULE_LIMITS = {**LIMITS, "floor_us": (1.0, 300.0), "bandwidth_share": (0.05, 1.1)}
"""A module has a dozen small kernels, and where it was timed without torch.compile they move activations again and again."""
WIDE_PRODUCTS = "bfloat16"
"""Tables whose products are in BF16 are fitted: the constants of those miss theirs least."""


def fit_mla(tables: KernelTables, accelerator: Accelerator, products: KernelConstants) -> list[FittedKernel]:
    """Fit decode and prefill of each precision of the cache that a GPU has modules for.

    Parameters
    ----------
    tables : KernelTables
    accelerator : Accelerator
    products : KernelConstants
        Of ``gemm`` in BF16.

    Returns
    -------
    list of FittedKernel
        Empty where the GPU has no modules, or none is fitted.
    """
    found = []
    for name, fit in (("generation", _decode), ("context", _prefill)):
        modules = tables.mla(name)
        for precision in sorted(modules["precision"].unique()):
            own = modules[(modules["precision"] == precision) & (modules["gemm_type"] == WIDE_PRODUCTS)]
            found.append(fit(own, accelerator, products, precision, f"mla, vLLM {tables.version('mla')}"))
    return [fitted for fitted in found if fitted is not None]


def _decode(
    table: pd.DataFrame, accelerator: Accelerator, products: KernelConstants, precision: str, basis: str
) -> FittedKernel | None:
    batch, heads, context = (table[c].to_numpy(dtype=float) for c in ("batch_size", "num_heads", "context"))
    shapes = DEEPSEEK_V3.products(DEEPSEEK_HIDDEN, absorbed=True)
    fixed = _products_us(shapes, products, accelerator, batch, heads)
    read = batch * context * DEEPSEEK_V3.latent_width * PRECISIONS[precision]
    flops = batch * context * heads * DEEPSEEK_V3.decode_flops_per_head
    memory, compute = read * US_PER_S / accelerator.hbm_bandwidth, flops * US_PER_S / accelerator.bf16_dense_flops
    free = ["floor_us", "unit_us", "bandwidth_share", "compute_share", "sharpness"]
    start = KernelConstants(MLA_DECODE, precision, basis=basis, **dict[str, Any](starts(free)))
    chosen = (batch <= LARGEST_BATCH) & (context >= SHORTEST_PROMPT)
    measured = table["latency_us"].to_numpy(dtype=float)
    return fit_constants(
        start, free, measured, chosen, lambda c: fixed + c.time_us(memory, compute, units=batch), MODULE_LIMITS
    )


def _prefill(
    table: pd.DataFrame, accelerator: Accelerator, products: KernelConstants, precision: str, basis: str
) -> FittedKernel | None:
    batch, heads, length = (table[c].to_numpy(dtype=float) for c in ("batch_size", "num_heads", "isl"))
    tokens = batch * length
    shapes = DEEPSEEK_V3.products(DEEPSEEK_HIDDEN, absorbed=False)
    fixed = _products_us(shapes, products, accelerator, tokens, heads)
    flops = tokens * (length + 1) / 2 * heads * DEEPSEEK_V3.prefill_flops_per_head
    moved = tokens * heads * DEEPSEEK_V3.prefill_width * BYTES_PER_ACTIVATION
    memory, compute = moved * US_PER_S / accelerator.hbm_bandwidth, flops * US_PER_S / accelerator.bf16_dense_flops
    free = ["floor_us", "unit_us", "bandwidth_share", "compute_share"]
    start = KernelConstants(MLA_PREFILL, precision, basis=basis, **dict[str, Any](starts(free)))
    chosen = (length >= SHORTEST_PROMPT) & (length <= LONGEST_PROMPT)
    measured = table["latency_us"].to_numpy(dtype=float)
    return fit_constants(
        start, free, measured, chosen, lambda c: fixed + c.time_us(memory, compute, units=tokens), MODULE_LIMITS
    )


def _products_us(
    shapes: Sequence[Any],
    products: KernelConstants,
    accelerator: Accelerator,
    tokens: FloatArray,
    heads: FloatArray,
) -> NDArray[np.float64]:
    """Time of the products of a module, by rows of a table."""
    total = np.zeros_like(tokens)
    for n_heads in np.unique(heads):
        own = heads == n_heads
        for shape in shapes:
            columns, depth = shape.of_heads(float(n_heads))
            total[own] += gemm_us(products, accelerator, tokens[own], columns, depth)
    return total
