"""Accelerators as their datasheets describe them: dense peak rates, memory and interconnect, from ``data/hardware/``.

Peaks are upper bounds; what a kernel reaches of them is a learned or measured efficiency, held elsewhere.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass

from stepcal.errors import InputError
from stepcal.locations import data_folder

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class Accelerator:
    """Datasheet figures of one GPU.

    Parameters
    ----------
    name, full_name : str
    bf16_dense_flops : float
        FLOP/s of the tensor cores in BF16, without the factor of two for structured sparsity.
    fp8_dense_flops : float or None
        None where the GPU has no FP8 tensor cores.
    hbm_bandwidth : float
        Bytes/s.
    hbm_capacity_bytes : float
    interconnect_bandwidth : float
        Bytes/s, both directions together.
    interconnect_kind, source, note : str

    Examples
    --------
    >>> import stepcal
    >>> stepcal.Accelerator.load("h100-sxm").hbm_bandwidth
    3350000000000.0
    """

    name: str
    full_name: str
    bf16_dense_flops: float
    fp8_dense_flops: float | None
    hbm_bandwidth: float
    hbm_capacity_bytes: float
    interconnect_bandwidth: float
    interconnect_kind: str
    source: str
    note: str

    @classmethod
    def load(cls, name: str) -> Accelerator:
        """Return one of the accelerators that ship, by name, as `load_accelerator` does."""
        return load_accelerator(name)


@functools.cache
def accelerators() -> dict[str, Accelerator]:
    """Return every accelerator that the project ships figures for, by name."""
    table = {}
    with open(data_folder() / "hardware" / "accelerators.csv", newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            table[row["name"]] = Accelerator(
                name=row["name"],
                full_name=row["full_name"],
                bf16_dense_flops=float(row["bf16_dense_tflops"]) * TERA,
                fp8_dense_flops=float(row["fp8_dense_tflops"]) * TERA if row["fp8_dense_tflops"] else None,
                hbm_bandwidth=float(row["hbm_bandwidth_tb_s"]) * TERA,
                hbm_capacity_bytes=float(row["hbm_capacity_gb"]) * GIGA,
                interconnect_bandwidth=float(row["interconnect_gb_s"]) * GIGA,
                interconnect_kind=row["interconnect_kind"],
                source=row["source"],
                note=row["note"],
            )
    return table


def load_accelerator(name: str) -> Accelerator:
    """Return one accelerator by name.

    Raises
    ------
    InputError
        If no datasheet row bears the name; the message lists those that exist.
    """
    table = accelerators()
    if name not in table:
        raise InputError(
            f"Unknown accelerator `{name}`. Known: {', '.join(table)}. "
            "To add one, give it a row with its datasheet in data/hardware/accelerators.csv."
        )
    return table[name]
