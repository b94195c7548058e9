"""Attention that no constant was fitted to: other widths of heads, and windows, in the tables beside what is said of them.

Constants come from heads of 128 elements that read everything, and for prefill of some other widths. What they say of the
other rows, and of those in which a layer reads a window only, is a test of the form: nothing here is fitted.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.kernels.fit import LARGEST_BATCH, NORMAL_SD, SHORTEST_CONTEXT, SHORTEST_PROMPT
from stepcal.kernels.forms import (
    BYTES_PER_ACTIVATION,
    DECODE_ATTENTION,
    FLOPS_PER_MAC,
    PRECISIONS,
    PREFILL_ATTENTION,
    PREFILL_OF_WIDTH,
    KernelConstants,
)
from stepcal.kernels.tables import KernelTables
from stepcal.specs.hardware import Accelerator
from stepcal.units import PERCENT, US_PER_S, FloatArray

PRECISION = "bf16"
NOT_FITTED = ((64, 0), (64, 128), (128, 1024), (128, 8192), (256, 0), (256, 1024))
"""Widths of a head, and tokens of a window (0 for none), that the tables have and no constant was fitted to."""
FEWEST_ROWS = 30


def attention_checks(
    gpu: str, tables: KernelTables, accelerator: Accelerator, constants: list[KernelConstants]
) -> pd.DataFrame:
    """Return how far the constants miss rows that they were not fitted to.

    Parameters
    ----------
    gpu : str
    tables : KernelTables
    accelerator : Accelerator
    constants : list of KernelConstants
        Of the GPU.

    Returns
    -------
    DataFrame
        `gpu`, `kernel`, `head_dim`, `window`, `n_rows`, `bias_percent` (median of predicted over measured, less one),
        `spread_percent` (robust, about that median).
    """
    own = {c.kernel: c for c in constants if c.precision == PRECISION}
    rows = []
    for kernel, table, predict_us in (
        (DECODE_ATTENTION, tables.decode_attention(windows=True), _decode_us),
        (PREFILL_ATTENTION, tables.prefill_attention(windows=True), _prefill_us),
    ):
        known = table[(table["precision"] == PRECISION) & (table["batch_size"] <= LARGEST_BATCH)]
        for head_dim, window in NOT_FITTED:
            by_width = own.get(PREFILL_OF_WIDTH.get(head_dim, "")) if kernel == PREFILL_ATTENTION else None
            if by_width is not None and not window:
                continue  # fitted
            chosen = known[(known["head_dim"] == head_dim) & (known["window_size"] == window)]
            predicted = predict_us(by_width or own[kernel], accelerator, chosen)
            errors = np.log(predicted / chosen["latency_us"].to_numpy(dtype=float))
            shortest = SHORTEST_CONTEXT if kernel == DECODE_ATTENTION else SHORTEST_PROMPT
            errors = errors[(chosen["context" if kernel == DECODE_ATTENTION else "isl"] >= shortest).to_numpy()]
            if errors.size >= FEWEST_ROWS:
                bias = float(np.median(errors))
                spread = NORMAL_SD * float(np.median(np.abs(errors - bias)))
                figures = (PERCENT * float(np.expm1(value)) for value in (bias, spread))
                rows.append((gpu, kernel, head_dim, window, errors.size, *figures))
    columns = ["gpu", "kernel", "head_dim", "window", "n_rows", "bias_percent", "spread_percent"]
    return pd.DataFrame(rows, columns=columns).round({"bias_percent": 1, "spread_percent": 1})


def _decode_us(constants: KernelConstants, accelerator: Accelerator, rows: pd.DataFrame) -> FloatArray:
    heads = (rows["batch_size"] * rows["num_key_value_heads"]).to_numpy(dtype=float)
    read = heads * _within(rows, "context") * 2 * rows["head_dim"].to_numpy(dtype=float) * PRECISIONS[PRECISION]
    return constants.time_us(read * US_PER_S / accelerator.hbm_bandwidth, units=heads)


def _prefill_us(constants: KernelConstants, accelerator: Accelerator, rows: pd.DataFrame) -> FloatArray:
    batch, length, heads, width = (
        rows[c].to_numpy(dtype=float) for c in ("batch_size", "isl", "num_heads", "head_dim")
    )
    within = _within(rows, "isl")
    pairs = batch * (within * (within + 1) / 2 + (length - within) * within)
    compute = 2 * FLOPS_PER_MAC * pairs * heads * width * US_PER_S / accelerator.bf16_dense_flops
    moved = batch * length * 2 * (heads + rows["num_key_value_heads"].to_numpy(dtype=float)) * width
    return constants.time_us(moved * BYTES_PER_ACTIVATION * US_PER_S / accelerator.hbm_bandwidth, compute)


def _within(rows: pd.DataFrame, tokens: str) -> FloatArray:
    """Tokens that a layer reads: those of a column, or of the window where there is one."""
    window, context = rows["window_size"].to_numpy(dtype=float), rows[tokens].to_numpy(dtype=float)
    return np.where(window > 0, np.minimum(context, window), context)
