"""Accelerators as their datasheets describe them: dense peak rates, memory and interconnect, from ``data/hardware/``.

Peaks are upper bounds; what a kernel reaches of them is a learned or measured efficiency, held elsewhere.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.locations import data_folder

TERA = 1e12
GIGA = 1e9
ALIASES = {"b200-sxm": "b200"}
GPU_WORDS = {
    "h100-nvl": ("h100", "nvl"),
    "h100-sxm": ("h100",),
    "h200-sxm": ("h200",),
    "a100-80gb": ("a100",),
    "l40s": ("l40s",),
    "b200": ("b200",),
    "b300-sxm": ("b300",),
    "gb200": ("gb200",),
    "gb300": ("gb300",),
    "rtx-pro-6000": ("rtx", "pro", "6000"),
}
"""Words that name a GPU in free text, as nvidia-smi, cloud providers and names of runs write it."""
OTHER_BOARDS = frozenset({"40gb", "40g", "pcie", "mig"})
"""Words of boards that the table of GPUs does not have."""
FILE_ENDINGS = (".json", ".yaml", ".yml")
FIGURES = ("bf16_dense_tflops", "hbm_bandwidth_tb_s", "hbm_capacity_gb", "interconnect_gb_s")
"""Figures that a user's own file must have; rates in FP8 and FP4 are optional."""
OPTIONAL = ("fp8_dense_tflops", "fp4_dense_tflops")


@dataclass(frozen=True)
class Accelerator:
    """Datasheet figures of one GPU.

    Parameters
    ----------
    name, full_name : str
    bf16_dense_flops : float
        FLOP/s of the tensor cores in BF16, without the factor of two for structured sparsity.
    fp8_dense_flops, fp4_dense_flops : float or None
        None where the GPU has no such tensor cores.
    hbm_bandwidth : float
        Bytes/s.
    hbm_capacity_bytes : float
    interconnect_bandwidth : float
        Bytes/s, both directions together.
    interconnect_kind, source, note : str
    kernels : tuple of dict
        Kernel constants of the user's own file (`stepcal.kernels`); none for a GPU that ships.

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
    fp4_dense_flops: float | None = None
    kernels: tuple[Mapping[str, Any], ...] = ()

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of products of weights in a precision: of the nearest wider tensor cores where the GPU has none of it.

        Weights of four bits (``int4``) are widened and multiplied in BF16.

        Examples
        --------
        >>> load_accelerator("a100-80gb").peak_flops("fp8") == load_accelerator("a100-80gb").peak_flops("bf16")
        True
        """
        fp8 = self.fp8_dense_flops or self.bf16_dense_flops
        return {"fp8": fp8, "fp8_block": fp8, "int8": fp8, "nvfp4": self.fp4_dense_flops or fp8}.get(
            precision, self.bf16_dense_flops
        )

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
            table[row["name"]] = _from_figures(row)
    return table


def load_accelerator(name: str) -> Accelerator:
    """Return one accelerator by name.

    Raises
    ------
    InputError
        If no datasheet row bears the name; the message lists those that exist.
    """
    table = accelerators()
    known = ALIASES.get(name, name)
    if known not in table:
        raise InputError(
            f"Unknown accelerator `{name}`. Known: {', '.join(table)}. For another one give a JSON or YAML file with its "
            f"datasheet figures: `name`, {', '.join(f'`{f}`' for f in FIGURES)}."
        )
    return table[known]


def resolve_accelerator(text: str) -> Accelerator:
    """Return a GPU by its name, by free text such as ``NVIDIA H200``, or from a file of the user's own.

    Parameters
    ----------
    text : str
        A path that ends in ``.json``, ``.yaml`` or ``.yml`` is a file.

    Raises
    ------
    InputError
        If no GPU is meant, or the file lacks a figure.

    Examples
    --------
    >>> resolve_accelerator("NVIDIA H200").name
    'h200-sxm'
    """
    if text.lower().endswith(FILE_ENDINGS):
        return read_accelerator(Path(text))
    return load_accelerator(named_in_text(text) or text)


def named_in_text(text: str) -> str | None:
    """Return the name of the GPU that free text speaks of, None if it speaks of none that ships."""
    if text in GPU_WORDS or text in ALIASES:
        return ALIASES.get(text, text)
    words = set(re.split(r"[^a-z0-9]+", text.lower()))
    if words & OTHER_BOARDS:
        return None
    return next((name for name, needed in GPU_WORDS.items() if words.issuperset(needed)), None)


def read_accelerator(path: Path) -> Accelerator:
    """Read a GPU from a file: its datasheet figures, and kernel constants where the user has them.

    Parameters
    ----------
    path : Path
        A mapping with `name`, the `FIGURES` and optionally `fp8_dense_tflops`, `fp4_dense_tflops`, `full_name`,
        `interconnect_kind`, `note`, and `kernels`, a list of rows like those of ``data/hardware/kernels.csv``.

    Raises
    ------
    InputError
        If the file cannot be read, a figure is missing or not positive, or a field is unknown.
    """
    content = _mapping(path)
    known = {"name", "full_name", *FIGURES, *OPTIONAL, "interconnect_kind", "source", "note", "kernels"}
    if unknown := sorted(map(str, content.keys() - known)):
        raise InputError(f"{path}: unknown field `{unknown[0]}`. Fields: {', '.join(sorted(known))}.")
    for name in ("name", *FIGURES):
        if content.get(name) in (None, ""):
            raise InputError(f"{path} lacks `{name}`. A GPU needs `name`, {', '.join(f'`{f}`' for f in FIGURES)}.")
    for name in (*FIGURES, *OPTIONAL):
        value = content.get(name)
        if value is not None and not _is_positive(value):
            raise InputError(f"{path}: `{name}` is {value!r}; it must be a number above 0.")
    if str(content["name"]) in accelerators():
        raise InputError(f"{path}: `{content['name']}` is the name of a GPU that ships. Give yours another name.")
    kernels = content.get("kernels") or []
    if not (isinstance(kernels, list) and all(isinstance(row, dict) for row in kernels)):
        raise InputError(
            f"{path}: `kernels` must be a list of mappings, each with `kernel`, `precision` and its constants."
        )
    words = {key: str(content.get(key) or "") for key in ("full_name", "interconnect_kind", "note")}
    return replace(_from_figures({**content, **words, "source": str(path)}), kernels=tuple(kernels))


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as the file of a GPU: {error}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}; the file of a GPU is a mapping of datasheet figures."
        )
    return content


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _from_figures(row: Mapping[str, Any]) -> Accelerator:
    def flops(name: str) -> float | None:
        return float(row[name]) * TERA if row.get(name) else None

    return Accelerator(
        name=str(row["name"]),
        full_name=str(row["full_name"]),
        bf16_dense_flops=float(row["bf16_dense_tflops"]) * TERA,
        fp8_dense_flops=flops("fp8_dense_tflops"),
        fp4_dense_flops=flops("fp4_dense_tflops"),
        hbm_bandwidth=float(row["hbm_bandwidth_tb_s"]) * TERA,
        hbm_capacity_bytes=float(row["hbm_capacity_gb"]) * GIGA,
        interconnect_bandwidth=float(row["interconnect_gb_s"]) * GIGA,
        interconnect_kind=str(row["interconnect_kind"]),
        source=str(row["source"]),
        note=str(row["note"]),
    )
