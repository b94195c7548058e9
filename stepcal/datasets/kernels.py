"""Summary of the kernel benchmarks that priors rest on: shares of peak rates, and what a KV block costs beyond its bytes.

A GEMM of m, k, n does ``2 m k n`` FLOPs; decode attention reads ``4 heads head_dim`` bytes a token of context and rank (BF16
keys and values); causal prefill attention does ``2 heads head_dim length^2`` FLOPs. The benchmarks' own rows do not ship.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.errors import InputError

GEMM, DECODE, PREFILL = "gemm", "decode_attention", "prefill_attention"
FLOPS_SHARE, BANDWIDTH_SHARE, BLOCK_EXCESS = "share_of_flops", "share_of_bandwidth", "block_excess_ns"
ANY, FULL, GROUPED = "any", "full", "grouped"
BF16_FLOPS, FP8_FLOPS, BYTES_PER_S = 989.5e12, 1_979e12, 3.35e12
"""Dense peaks and memory bandwidth of the H100 SXM, as in hardware/accelerators.csv."""
LONG_KERNEL_US = 300.0
"""Kernels beyond this stream; below, launch and drain weigh."""
STREAMING_CONTEXT = 32_768
"""Contexts from which a kernel reads as fast as it ever does; what a block costs more is counted beyond that rate."""
CONTEXTS = (1_024, 4_096, 16_384)
BLOCKS_AT_BATCH = 128
"""Batch at which the time a block is taken, the largest of the 16 servers."""
BLOCK_TOKENS = 16
ALL = 0
"""In a column of sizes: all of them together."""
GEMM_FILE, DECODE_FILES, PREFILL_FILES = (
    "kernels/gemm/h100/data.csv",
    "kernels/mha/decode/h100/*.csv",
    "kernels/mha/prefill/h100/*.csv",
)


def summarise_kernels(layout: Path) -> pd.DataFrame:
    """Summarise the benchmarks of the public layout.

    Parameters
    ----------
    layout : Path
        Folder that holds ``kernels/``.

    Returns
    -------
    DataFrame
        As the schema of ``kernel_efficiency.csv`` has it: low, median and high of one quantity over the benchmarks of one
        kernel, head layout, batch and length.

    Raises
    ------
    InputError
        If a benchmark file is missing.
    """
    return pd.DataFrame([*_gemm(layout), *_decode(layout), *_prefill(layout)])


def _gemm(layout: Path) -> list[dict[str, object]]:
    table = _read(layout / GEMM_FILE)
    flops = 2.0 * table["m"] * table["k"] * table["n"] / (table["latency_us"] * 1e-6)
    weights = table["k"] * table["n"] / (table["latency_us"] * 1e-6)
    table = table.assign(share=flops / FP8_FLOPS, one_byte=weights / BYTES_PER_S)
    rows = [
        _row(GEMM, ANY, ALL, int(m), FLOPS_SHARE, own["share"], FP8_FLOPS / 1e12, GEMM_FILE)
        for m, own in _groups(table, "m")
    ]
    few = table[table["m"] == table["m"].min()]
    rows.append(
        _row(GEMM, ANY, ALL, int(few["m"].iloc[0]), BANDWIDTH_SHARE, few["one_byte"], BYTES_PER_S / 1e12, GEMM_FILE)
    )
    return rows


def _decode(layout: Path) -> list[dict[str, object]]:
    parts = []
    for path in _files(layout, DECODE_FILES):
        heads, kv_heads, head_dim, ranks = (int(word.removeprefix("tp")) for word in path.stem.split("-"))
        table = _read(path)
        tokens = table["batch_size"] * table["kv_len"]
        parts.append(
            table.assign(
                layout=FULL if heads == kv_heads else GROUPED,
                bytes=4.0 * max(kv_heads // ranks, 1) * head_dim * tokens,
                blocks=tokens / BLOCK_TOKENS,
            )
        )
    table = pd.concat(parts, ignore_index=True)
    table["share"] = table["bytes"] / (table["latency_us"] * 1e-6) / BYTES_PER_S
    long = table[table["latency_us"] > LONG_KERNEL_US]
    streaming = float(long.loc[long["kv_len"] >= STREAMING_CONTEXT, "share"].median())
    beyond_us = table["latency_us"] - 1e6 * table["bytes"] / (BYTES_PER_S * streaming)
    table["excess"] = 1e3 * beyond_us / table["blocks"]
    peak = BYTES_PER_S / 1e12
    rows = [_row(DECODE, ANY, ALL, ALL, BANDWIDTH_SHARE, long["share"], peak, DECODE_FILES)]
    usual = table[table["kv_len"].isin(CONTEXTS)]
    for (heads_of, batch, context), own in _groups(usual, ["layout", "batch_size", "kv_len"]):
        rows.append(_row(DECODE, heads_of, int(batch), int(context), BANDWIDTH_SHARE, own["share"], peak, DECODE_FILES))
    for (heads_of, context), own in _groups(usual[usual["batch_size"] == BLOCKS_AT_BATCH], ["layout", "kv_len"]):
        about = (DECODE, heads_of, BLOCKS_AT_BATCH, int(context), BLOCK_EXCESS)
        rows.append(_row(*about, own["excess"], peak * streaming, DECODE_FILES))
    return rows


def _prefill(layout: Path) -> list[dict[str, object]]:
    parts = []
    for path in _files(layout, PREFILL_FILES):
        heads, _, head_dim = (int(word) for word in path.stem.split("-"))
        table = _read(path)
        flops = 2.0 * heads * head_dim * table["seq_len"].astype(float) ** 2
        parts.append(table.assign(share=flops / (table["latency_us"] * 1e-6) / BF16_FLOPS))
    table = pd.concat(parts, ignore_index=True)
    return [
        _row(PREFILL, ANY, 1, int(length), FLOPS_SHARE, own["share"], BF16_FLOPS / 1e12, PREFILL_FILES)
        for length, own in _groups(table, "seq_len")
    ]


def _row(
    kernel: str, heads: str, batch: int, tokens: int, quantity: str, values: pd.Series, peak: float, source: str
) -> dict[str, object]:
    low, median, high = np.quantile(values.to_numpy(dtype=float), [0.0, 0.5, 1.0])
    if kernel == DECODE and batch == ALL:
        low, high = np.quantile(values.to_numpy(dtype=float), [0.25, 0.75])
    return {
        "kernel": kernel,
        "heads": heads,
        "batch_size": batch,
        "tokens": tokens,
        "quantity": quantity,
        "low": round(float(low), 4),
        "median": round(float(median), 4),
        "high": round(float(high), 4),
        "n_benchmarks": len(values),
        "peak": round(peak, 4),
        "peak_unit": "TFLOP/s" if quantity == FLOPS_SHARE else "TB/s",
        "source": source,
    }


def _groups(table: pd.DataFrame, by: str | list[str]) -> list[tuple[Any, pd.DataFrame]]:
    return list(table.groupby(by))


def _files(layout: Path, pattern: str) -> list[Path]:
    found = sorted(layout.glob(pattern))
    if not found:
        raise InputError(f"{layout / pattern} matches no file: the public layout is incomplete.")
    return found


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        raise InputError(f"{path} is not there: the public layout is incomplete.") from None
