"""Fits a few constants a kernel to measured tables, by robust least squares on log ratios; residuals become uncertainty.

Tables are noisy, a few percent from one shape to the next, and small working sets are warm in the L2 cache, which a served
model's are not. So nothing is interpolated: rows that the cache helps are left out, and a smooth form is fitted to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from stepcal.kernels.forms import (
    BYTES_PER_ACTIVATION,
    DECODE_ATTENTION,
    EXPERTS,
    FLOPS_PER_MAC,
    GEMM,
    MATRICES_OF_AN_EXPERT,
    PRECISIONS,
    PREFILL_ATTENTION,
    PREFILL_OF_WIDTH,
    KernelConstants,
)
from stepcal.kernels.tables import KernelTables
from stepcal.specs.hardware import Accelerator
from stepcal.units import US_PER_S, BoolArray, FloatArray

L2_BYTES = {
    "a100-80gb": 40e6,
    "h100-sxm": 50e6,
    "h200-sxm": 50e6,
    "b200": 126e6,
    "b300-sxm": 126e6,
    "gb200": 126e6,
    "gb300": 126e6,
    "l40s": 96e6,
    "rtx-pro-6000": 128e6,
}
"""Size of the L2 cache (NVIDIA's architecture white papers)."""
COLD, WARM = 1.5, 0.05
"""A decode step's KV cache is read from memory above 1.5 times the L2 cache; below a twentieth its bytes do not matter."""
SOFT = 0.05
"""Log ratio beyond which a row counts linearly: about the tables' own noise."""
SMALLEST_MATRIX_BYTES = 4e6
LARGEST_ROWS = 8_192
ALIGNED = 8
"""CUDA graphs pad batches to multiples of this; other row counts of FP8 products take other, slower kernels."""
SHORTEST_CONTEXT, LARGEST_BATCH = 128, 512
HEAD_DIM = 128
SHORTEST_PROMPT = 128
HOST_BOUND = 2.5
"""Block-scaled products were timed with launches from Python: rows below this multiple of the shortest time a launch."""
MOST_EXPERTS_A_TOKEN = 10
"""The tables' models that visit more have ungated experts of two matrices."""
UNGATED_HIDDEN = 2_688
NARROWEST_EXPERT = 256
BALANCED = "balanced"
NORMAL_SD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation (Huber, Robust Statistics, 1981)."""
WORST_SPREAD = 0.3
"""A form that misses its table by more says less than a stand-in."""
AT_BOUND = 1.001
"""A share within a thousandth of its lower bound was not found."""
FEWEST_ROWS = 30
"""A table with fewer rows to fit says nothing that a stand-in would not."""
LIMITS = {
    "floor_us": (0.01, 80.0),
    "unit_us": (1e-4, 1.0),
    "bandwidth_share": (0.15, 1.1),
    "compute_share": (0.05, 1.1),
    "sharpness": (1.0, 8.0),
}
"""Bounds of the search; nothing that is fitted well ends at one, and the page lists what does."""
STARTS = {"floor_us": 8.0, "unit_us": 0.02, "bandwidth_share": 0.8, "compute_share": 0.6, "sharpness": 2.0}
SUBSTITUTES = {(gpu, EXPERTS, "fp8"): "fp8_block" for gpu in ("h100-sxm", "h200-sxm")}
"""Tables in place of which another is fitted. FP8 experts of these GPUs were timed with the kernel of another checkpoint
format (ModelOpt through FlashInfer), twice as slow as BF16; vLLM takes Triton for checkpoints of compressed tensors."""


@dataclass(frozen=True)
class FittedKernel:
    """Constants, and the rows that they were fitted to beside what they say of them, in microseconds."""

    constants: KernelConstants
    measured_us: FloatArray
    fitted_us: FloatArray

    def named(self, precision: str) -> FittedKernel:
        """Return the same for another precision, whose table it stands in for."""
        return replace(self, constants=replace(self.constants, precision=precision))


def fit_gpu(gpu: str, tables: KernelTables, accelerator: Accelerator) -> list[FittedKernel]:
    """Fit every kernel and precision that a GPU has tables for.

    Returns
    -------
    list of FittedKernel
    """
    products, experts, version = tables.gemm(), tables.experts(), tables.version
    found = _products(products, accelerator, f"gemm, vLLM {version('gemm')}")
    for precision in experts["precision"].unique():
        source = SUBSTITUTES.get((gpu, EXPERTS, precision), precision)
        basis = f"moe, vLLM {version('moe')}" + ("" if source == precision else f", table of {source}")
        own = experts[experts["precision"] == source]
        fitted = fit_experts(own, accelerator, source, L2_BYTES[gpu], basis=basis)
        found.append(None if fitted is None else fitted.named(precision))
    basis = f"attention, vLLM {version('attention')}"
    decode, prefill = tables.decode_attention(), tables.prefill_attention()
    for precision in decode["precision"].unique():
        own = decode[decode["precision"] == precision]
        found.append(fit_decode_attention(own, accelerator, precision, L2_BYTES[gpu], basis=basis))
    for precision in prefill["precision"].unique():
        own = prefill[prefill["precision"] == precision]
        found.append(fit_prefill_attention(own, accelerator, precision, basis=basis))
    return [fitted for fitted in found if fitted is not None]


def _products(table: pd.DataFrame, accelerator: Accelerator, basis: str) -> list[FittedKernel | None]:
    """Fit the products of each precision; of block-scaled ones the floor is that of FP8."""
    found: dict[str, FittedKernel | None] = {}
    for precision in sorted(table["precision"].unique()):
        own, fp8 = table[table["precision"] == precision], found.get("fp8")
        floor = fp8.constants.floor_us if precision == "fp8_block" and fp8 is not None else None
        found[precision] = fit_gemm(own, accelerator, precision, floor_us=floor, basis=basis)
    return list(found.values())


def fit_gemm(
    table: pd.DataFrame, accelerator: Accelerator, precision: str, *, floor_us: float | None = None, basis: str = ""
) -> FittedKernel | None:
    """Fit matrix products; with `floor_us` the table's own floor is the host's, and its short rows are left out."""
    m, n, k = (table[c].to_numpy(dtype=float) for c in ("m", "n", "k"))
    measured = table["latency_us"].to_numpy(dtype=float)
    width = PRECISIONS[precision]
    memory = (n * k * width + m * (n + k) * BYTES_PER_ACTIVATION) * US_PER_S / accelerator.hbm_bandwidth
    compute = FLOPS_PER_MAC * m * n * k * US_PER_S / accelerator.peak_flops(precision)
    chosen = (n * k * width >= SMALLEST_MATRIX_BYTES) & (m <= LARGEST_ROWS) & ((m % ALIGNED == 0) | (m < ALIGNED))
    fixed = {}
    if floor_us is not None and chosen.any():
        fixed["floor_us"] = floor_us
        chosen &= measured > HOST_BOUND * np.quantile(measured[chosen], SOFT)
    free = [c for c in ("floor_us", "bandwidth_share", "compute_share", "sharpness") if c not in fixed]
    start = KernelConstants(GEMM, precision, basis=basis, **dict[str, Any](starts(free) | fixed))
    return fit_constants(start, free, measured, chosen, lambda c: c.time_us(memory, compute))


def fit_experts(
    table: pd.DataFrame, accelerator: Accelerator, precision: str, l2_bytes: float, *, basis: str = ""
) -> FittedKernel | None:
    """Fit grouped experts, with evenly routed tokens where the table has them."""
    even = table["distribution"].eq(BALANCED)
    own = table[even] if even.any() else table[table["distribution"] == min(table["distribution"])]
    tokens, experts, visits = (own[c].to_numpy(dtype=float) for c in ("num_tokens", "num_experts", "topk"))
    inner = (own["inter_size"] / own["moe_tp_size"]).to_numpy(dtype=float)
    hidden = own["hidden_size"].to_numpy(dtype=float)
    one = MATRICES_OF_AN_EXPERT * hidden * inner
    touched = np.minimum(experts, tokens * visits) if even.any() else experts * (1 - (1 - visits / experts) ** tokens)
    read = touched * one * PRECISIONS[precision]
    memory = read * US_PER_S / accelerator.hbm_bandwidth
    compute = FLOPS_PER_MAC * tokens * visits * one * US_PER_S / accelerator.peak_flops(precision)
    chosen = (read > l2_bytes) & (inner >= NARROWEST_EXPERT) & (tokens <= LARGEST_ROWS)
    chosen &= (visits <= MOST_EXPERTS_A_TOKEN) & (hidden != UNGATED_HIDDEN)
    free = [f.name for f in fields(KernelConstants) if f.name in LIMITS]
    start = KernelConstants(EXPERTS, precision, basis=basis, **dict[str, Any](starts(free)))
    measured = own["latency_us"].to_numpy(dtype=float)
    return fit_constants(start, free, measured, chosen, lambda c: c.time_us(memory, compute, units=touched))


def fit_decode_attention(
    table: pd.DataFrame, accelerator: Accelerator, precision: str, l2_bytes: float, *, basis: str = ""
) -> FittedKernel | None:
    """Fit decode attention, affine in the KV cache that is read and in requests x KV heads."""
    own = table[(table["head_dim"] == HEAD_DIM) & (table["batch_size"] <= LARGEST_BATCH)]
    heads = (own["batch_size"] * own["num_key_value_heads"]).to_numpy(dtype=float)
    context = own["context"].to_numpy(dtype=float)
    read = heads * context * 2 * HEAD_DIM * PRECISIONS[precision]
    chosen = ((read > COLD * l2_bytes) | (read < WARM * l2_bytes)) & (context >= SHORTEST_CONTEXT)
    memory = read * US_PER_S / accelerator.hbm_bandwidth
    free = ["floor_us", "unit_us", "bandwidth_share"]
    start = KernelConstants(DECODE_ATTENTION, precision, basis=basis, **dict[str, Any](starts(free)))
    measured = own["latency_us"].to_numpy(dtype=float)
    return fit_constants(start, free, measured, chosen, lambda c: c.time_us(memory, units=heads))


def fit_prefill_attention(
    table: pd.DataFrame, accelerator: Accelerator, precision: str, *, head_dim: int = HEAD_DIM, basis: str = ""
) -> FittedKernel | None:
    """Fit prefill attention: what goes in and out, and causal pairs over the peak in BF16, whatever the cache is kept in."""
    own = table[table["head_dim"] == head_dim]
    batch, length, heads = (own[c].to_numpy(dtype=float) for c in ("batch_size", "isl", "num_heads"))
    pairs = batch * length * (length + 1) / 2
    compute = 2 * FLOPS_PER_MAC * pairs * heads * head_dim * US_PER_S / accelerator.bf16_dense_flops
    moved = batch * length * 2 * (heads + own["num_key_value_heads"].to_numpy(dtype=float)) * head_dim
    memory = moved * BYTES_PER_ACTIVATION * US_PER_S / accelerator.hbm_bandwidth
    free = ["floor_us", "bandwidth_share", "compute_share"]
    kernel = PREFILL_OF_WIDTH.get(head_dim, PREFILL_ATTENTION)
    start = KernelConstants(kernel, precision, basis=basis, **dict[str, Any](starts(free)))
    measured = own["latency_us"].to_numpy(dtype=float)
    return fit_constants(start, free, measured, length >= SHORTEST_PROMPT, lambda c: c.time_us(memory, compute))


def starts(free: list[str]) -> dict[str, float]:
    """Where the search for some constants begins."""
    return {name: STARTS[name] for name in free}


def fit_constants(
    start: KernelConstants,
    free: list[str],
    measured_us: FloatArray,
    chosen: BoolArray,
    predict_us: Callable[[KernelConstants], NDArray[np.float64]],
    limits: Mapping[str, tuple[float, float]] = LIMITS,
) -> FittedKernel | None:
    """Fit the free constants to the chosen rows, on logarithms; None where there are too few or the form misses them."""
    if chosen.sum() < FEWEST_ROWS:
        return None

    def residuals(x: FloatArray) -> FloatArray:
        constants = replace(start, **dict[str, Any](zip(free, np.exp(x).tolist(), strict=True)))
        return np.log(predict_us(constants) / measured_us)[chosen]

    low, high = (np.log([limits[name][side] for name in free]) for side in (0, 1))
    first = np.log([getattr(start, name) for name in free])
    solution = least_squares(residuals, first, bounds=(low, high), loss="soft_l1", f_scale=SOFT)
    found = dict[str, Any](zip(free, np.exp(solution.x).tolist(), strict=True))
    spread = NORMAL_SD * float(np.median(np.abs(residuals(solution.x))))
    at_bound = any(found.get(name, 1.0) <= AT_BOUND * limits[name][0] for name in ("bandwidth_share", "compute_share"))
    if spread > WORST_SPREAD or at_bound:
        return None
    constants = replace(start, **found, residual_log_sd=spread, n_rows=int(chosen.sum()))
    return FittedKernel(constants, measured_us[chosen], predict_us(constants)[chosen])
