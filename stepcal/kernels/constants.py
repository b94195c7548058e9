"""The kernels of a GPU: constants that were fitted to its tables, and what stands in where it has none, said loudly.

``data/hardware/kernels.csv``, ``kernels_added.csv`` and ``all_reduce.csv`` hold the constants (`make kernels`).
Rows of the GPU ``any`` are the medians over all GPUs, for a GPU's own datasheet; their residual is the error of each GPU by
the medians of the others.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stepcal.errors import InputError
from stepcal.kernels.forms import PRECISIONS, AllReduce, KernelConstants
from stepcal.locations import data_folder
from stepcal.specs.hardware import Accelerator
from stepcal.units import PERCENT

ANY = "any"
KERNELS_FILE, ALL_REDUCE_FILE = "kernels.csv", "all_reduce.csv"
ADDED_FILE = "kernels_added.csv"
"""Kernels that came after `KERNELS_FILE` was frozen with the default coefficients; none of them stands there."""
NUMBERS = ("floor_us", "unit_us", "bandwidth_share", "compute_share", "sharpness", "residual_log_sd")
CHECKS_FILE = "attention_checks.csv"
"""What the constants of attention miss where heads or windows are others than those that they were fitted to."""
NEXT_PRECISION = {
    "fp8_block": "fp8", "int8": "fp8", "int4": "bf16", "nvfp4": "fp8", "mxfp4": "int4", "fp8": "bf16",
}  # fmt: skip
"""Whose floor and shares stand in for a precision that no GPU has tables for; its own bytes and peak count."""
UNKNOWN_PRECISION_LOG_SD = 0.3
"""Error to expect then: about what FP8 products differ by from the constants of BF16 on the GPUs that have both."""
UNKNOWN_LINK_LOG_SD = 0.5
"""Error to expect of all-reduces over links that were not measured."""


@dataclass(frozen=True)
class GpuKernels:
    """Kernels of one GPU, each by precision, with a stand-in for what was not measured.

    Attributes
    ----------
    accelerator : Accelerator
    constants : mapping of (kernel, precision) to KernelConstants
        Measured, or given by the user.
    typical : mapping
        The same, medians over GPUs.
    all_reduces : mapping of int to AllReduce
        By ranks.
    link_of : str
        GPU whose all-reduces these are; the accelerator's own, or that of a similar link.
    """

    accelerator: Accelerator
    constants: Mapping[tuple[str, str], KernelConstants]
    typical: Mapping[tuple[str, str], KernelConstants]
    all_reduces: Mapping[int, AllReduce] = field(default_factory=dict)
    link_of: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether the GPU has kernel tables at all."""
        return bool(self.constants)

    def of(self, kernel: str, precision: str) -> KernelConstants:
        """Return the constants of a kernel; where it was not measured, those of similar ones, whose `basis` says so.

        Raises
        ------
        InputError
            If nothing is known of the kernel.
        """
        for name in _with_stand_ins(precision):
            for table, whose in ((self.constants, ""), (self.typical, "medians of other GPUs")):
                found = table.get((kernel, name))
                if found is None:
                    continue
                said = [text for text in (whose, "" if name == precision else f"constants of {name}") if text]
                if not said:
                    return found
                sd = (
                    found.residual_log_sd
                    if name == precision
                    else np.hypot(found.residual_log_sd, UNKNOWN_PRECISION_LOG_SD)
                )
                basis = f"not measured: {', '.join(said)}, on the datasheet of {self.accelerator.name}"
                return replace(found, precision=precision, residual_log_sd=float(sd), n_rows=0, basis=basis)
        raise InputError(f"Nothing is known of the kernel `{kernel}` in `{precision}`.")

    def all_reduce(self, ranks: int) -> AllReduce:
        """Return the all-reduce of some ranks; of ranks that were not measured, that of the nearest, scaled by its traffic.

        A rank receives ``2 (n - 1) / n`` of a message.
        """
        if ranks in self.all_reduces and self.link_of == self.accelerator.name:
            return self.all_reduces[ranks]
        nearest = min(self.all_reduces, key=lambda n: (abs(n - ranks), n))
        measured = self.all_reduces[nearest]
        factor = (1.0 - 1.0 / ranks) / (1.0 - 1.0 / nearest)
        return replace(
            measured,
            ranks=ranks,
            factor=factor,
            basis=f"not measured: {self.link_of} with {nearest} ranks, by its traffic",
        )

    def notes(self, kernels: Iterable[tuple[str, str]], *, ranks: int = 1) -> list[str]:
        """Return a sentence for each kernel of a deployment that was not measured, with the error to expect.

        Parameters
        ----------
        kernels : iterable of (kernel, precision)
            What is used.
        ranks : int
        """
        used = [self.of(kernel, precision) for kernel, precision in kernels]
        notes = [
            f"`{constants.kernel}` in {constants.precision} on `{self.accelerator.name}` was {constants.basis}; "
            f"expect errors of {100 * np.expm1(constants.residual_log_sd):.0f}% (one standard deviation of a kernel)."
            for constants in used
            if constants.basis.startswith("not measured")
        ]
        if ranks > 1 and self.all_reduce(ranks).basis.startswith("not measured"):
            notes.append(
                f"All-reduces of {ranks} ranks on `{self.accelerator.name}` were {self.all_reduce(ranks).basis}; expect "
                f"errors of {100 * np.expm1(UNKNOWN_LINK_LOG_SD):.0f}% (one standard deviation)."
            )
        return notes


def load_kernels(accelerator: Accelerator) -> GpuKernels:
    """Return the kernels of a GPU: those that ship, or those of the user's own file, with stand-ins for the rest.

    Examples
    --------
    >>> from stepcal.specs.hardware import load_accelerator
    >>> load_kernels(load_accelerator("h100-sxm")).of("gemm", "bf16").n_rows > 1000
    True
    """
    table, links = _shipped(), _shipped_links()
    own = _of_user(accelerator) or table.get(accelerator.name, {})
    name = accelerator.name if accelerator.name in links else _similar_link(accelerator)
    return GpuKernels(accelerator, own, table.get(ANY, {}), links.get(name, {}), name)


def attention_bias(gpu: str, kernel: str, *, head_dim: int, window: int = 0) -> float | None:
    """Return the median error of attention on a GPU for heads or windows that were not fitted; None where it is not known.

    Examples
    --------
    >>> attention_bias("h100-sxm", "decode_attention", head_dim=64, window=128)
    -0.128
    """
    return _shipped_checks().get((gpu, kernel, head_dim, window))


def measured_gpus() -> tuple[str, ...]:
    """Return the GPUs that have kernel tables."""
    return tuple(name for name in _shipped() if name != ANY)


def _with_stand_ins(precision: str) -> list[str]:
    if precision not in PRECISIONS:
        raise InputError(f"Unknown precision `{precision}`. Kernels are known in {', '.join(PRECISIONS)}.")
    names = [precision]
    while names[-1] in NEXT_PRECISION:
        names.append(NEXT_PRECISION[names[-1]])
    return names


def _of_user(accelerator: Accelerator) -> dict[tuple[str, str], KernelConstants]:
    return {
        (row["kernel"], row["precision"]): _constants(row, f"`kernels` of {accelerator.source}")
        for row in accelerator.kernels
    }


def _constants(row: Mapping[str, Any], origin: str) -> KernelConstants:
    try:
        numbers = {name: float(row[name]) for name in NUMBERS if row.get(name) not in (None, "")}
        precision = str(row["precision"])
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
        n_rows, basis = int(row.get("n_rows") or 0), str(row.get("basis") or origin)
        return KernelConstants(
            str(row["kernel"]), precision, **{"floor_us": 0.0, **numbers}, n_rows=n_rows, basis=basis
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{origin}: a kernel needs `kernel`, `precision` and numbers among {', '.join(NUMBERS)} ({error})."
        ) from None


def _similar_link(accelerator: Accelerator) -> str:
    """The measured GPU whose interconnect is nearest, on a logarithmic scale."""
    from stepcal.specs.hardware import accelerators

    known = {name: accelerators()[name].interconnect_bandwidth for name in _shipped_links()}
    return min(known, key=lambda name: abs(np.log(known[name] / accelerator.interconnect_bandwidth)))


@functools.cache
def _shipped() -> dict[str, dict[tuple[str, str], KernelConstants]]:
    table: dict[str, dict[tuple[str, str], KernelConstants]] = {}
    for name in (KERNELS_FILE, ADDED_FILE):
        for row in _rows(name):
            own, key = table.setdefault(row["gpu"], {}), (row["kernel"], row["precision"])
            if key in own:
                raise InputError(f"{name} has `{key[0]}` in {key[1]} of `{row['gpu']}` again. Remove the row.")
            own[key] = _constants(row, name)
    return table


@functools.cache
def _shipped_checks() -> dict[tuple[str, str, int, int], float]:
    return {
        (row["gpu"], row["kernel"], int(row["head_dim"]), int(row["window"])): float(row["bias_percent"]) / PERCENT
        for row in _rows(CHECKS_FILE)
    }


@functools.cache
def _shipped_links() -> dict[str, dict[int, AllReduce]]:
    points: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    for row in _rows(ALL_REDUCE_FILE):
        point = (float(row["message_bytes"]), float(row["latency_us"]), row["basis"])
        points.setdefault((row["gpu"], int(row["ranks"])), []).append(point)
    links: dict[str, dict[int, AllReduce]] = {}
    for (gpu, ranks), own in points.items():
        sizes, times = (np.array([p[i] for p in sorted(own)], dtype=float) for i in (0, 1))
        links.setdefault(gpu, {})[ranks] = AllReduce(ranks, sizes, times, basis=own[0][2])
    return links


def _rows(name: str) -> list[dict[str, str]]:
    with open(data_folder() / "hardware" / name, newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))
