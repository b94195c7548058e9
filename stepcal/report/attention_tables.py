"""The tables of the page on attention, from the constants that ship: ``python -m stepcal.report.attention_tables``."""

from __future__ import annotations

import csv
from pathlib import Path

from stepcal.kernels.constants import ADDED_FILE, ANY, CHECKS_FILE, KERNELS_FILE
from stepcal.kernels.forms import (
    DECODE_ATTENTION,
    EXPERTS,
    MLA_DECODE,
    MLA_PREFILL,
    PREFILL_ATTENTION,
    PREFILL_OF_WIDTH,
)
from stepcal.locations import data_folder
from stepcal.report.input_tables import filled, table
from stepcal.units import PERCENT

PAGE = Path("book") / "attention.md"
HEAD_DIM = 128
"""Width of heads that the frozen constants of prefill are fitted to."""
KINDS = {
    (64, 0): "64",
    (64, 128): "64, window of 128",
    (256, 0): "256",
    (256, 1024): "256, window of 1,024",
    (128, 8192): "128, window of 8,192",
}
"""Widths of heads and windows that the page shows: those of gpt-oss, Gemma 3 and others, and the longest window."""


def _rows(name: str) -> list[dict[str, str]]:
    with open(data_folder() / "hardware" / name, newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


def modules() -> str:
    """Constants of latent attention by GPU."""
    rows = []
    for row in _rows(ADDED_FILE):
        if row["kernel"] not in (MLA_DECODE, MLA_PREFILL) or row["gpu"] == ANY:
            continue
        rows.append(
            (
                f"`{row['gpu']}`",
                "decode" if row["kernel"] == MLA_DECODE else "prefill",
                row["precision"],
                f"{float(row['floor_us']):.0f}",
                f"{float(row['bandwidth_share']):.2f}",
                f"{float(row['compute_share']):.2f}",
                f"{PERCENT * float(row['residual_log_sd']):.0f}",
                f"{int(row['n_rows']):,}",
            )
        )
    header = ("GPU", "phase", "KV cache", "floor, µs", "share of bandwidth", "share of peak", "residual, %", "rows")
    return table(header, rows)


def experts() -> str:
    """Constants of experts in MXFP4 by GPU."""
    rows = [
        (
            f"`{row['gpu']}`",
            f"{float(row['floor_us']):.0f}",
            f"{float(row['bandwidth_share']):.2f}",
            f"{float(row['compute_share']):.2f}",
            f"{PERCENT * float(row['residual_log_sd']):.0f}",
            row["n_rows"],
        )
        for row in _rows(ADDED_FILE)
        if row["kernel"] == EXPERTS and row["gpu"] != ANY
    ]
    return table(("GPU", "floor, µs", "share of bandwidth", "share of peak (BF16)", "residual, %", "rows"), rows)


def prefill() -> str:
    """Constants of prefill by the width of heads, by GPU."""
    by_gpu: dict[str, dict[int, str]] = {}
    named = {PREFILL_ATTENTION: HEAD_DIM, **{kernel: width for width, kernel in PREFILL_OF_WIDTH.items()}}
    for row in (*_rows(KERNELS_FILE), *_rows(ADDED_FILE)):
        if row["kernel"] in named and row["precision"] == "bf16" and row["gpu"] != ANY:
            cell = f"{float(row['compute_share']):.2f} ({PERCENT * float(row['residual_log_sd']):.0f} %)"
            by_gpu.setdefault(row["gpu"], {})[named[row["kernel"]]] = cell
    widths = sorted(named.values())
    rows = [(f"`{gpu}`", *(own.get(width, "") for width in widths)) for gpu, own in by_gpu.items()]
    return table(("GPU", *(f"heads of {width}" for width in widths)), rows)


def checks() -> str:
    """How far rows with other heads and with windows are missed, by GPU."""
    found = {(row["gpu"], row["kernel"], int(row["head_dim"]), int(row["window"])): row for row in _rows(CHECKS_FILE)}
    rows = []
    for gpu in dict.fromkeys(key[0] for key in found):
        for kernel, phase in ((DECODE_ATTENTION, "decode"), (PREFILL_ATTENTION, "prefill")):
            own = [found.get((gpu, kernel, *kind)) for kind in KINDS]
            if not any(own):
                continue
            cells = [
                "" if r is None else f"{float(r['bias_percent']):+.0f} ± {float(r['spread_percent']):.0f}" for r in own
            ]
            rows.append((f"`{gpu}`", phase, *cells))
    return table(("GPU", "phase", *KINDS.values()), rows)


TABLES = {
    "prefill by width": prefill,
    "latent attention": modules,
    "experts in MXFP4": experts,
    "attention not fitted": checks,
}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
