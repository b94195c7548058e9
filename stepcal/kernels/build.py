"""``make kernels``: fits the constants of all GPUs to the pinned wheel and writes the tables of ``data/hardware/``.

Only the maintainer needs it. The wheel is fetched by pip (82 MB) unless a path is given, and refused if its hash differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.files import write_atomically
from stepcal.kernels.attention_check import attention_checks
from stepcal.kernels.constants import ADDED_FILE, ALL_REDUCE_FILE, ANY, CHECKS_FILE, KERNELS_FILE, NUMBERS
from stepcal.kernels.fit import L2_BYTES, FittedKernel, fit_experts, fit_gpu, fit_prefill_attention
from stepcal.kernels.forms import BYTES_PER_ACTIVATION, ELEMENTWISE, GEMM, PREFILL_OF_WIDTH, KernelConstants
from stepcal.kernels.mla_fit import fit_mla
from stepcal.kernels.silicon import MODELS, config_of, silicon_rows
from stepcal.kernels.tables import LATER_DTYPES, WHEEL, KernelTables, open_wheel
from stepcal.locations import data_folder
from stepcal.specs.hardware import GIGA, TERA, Accelerator, load_accelerator
from stepcal.units import US_PER_S

REQUIREMENT = "aiconfigurator-core==0.12.0"
DATASHEET_FILE = "wheel_datasheet.csv"
SAMPLE_FILE = "kernel_samples.csv"
SILICON_FILE, SILICON_MODELS = "silicon.csv", "silicon_models"
SAMPLES = 40
"""Rows of each table that ship beside what the constants say of them: enough for a figure."""
DIGITS = 5
"""Significant digits of what is written: far below the residuals, and the same on every machine."""
FIGURES = {
    "bf16_dense_tflops": ("bfloat16_tc_flops", TERA),
    "fp8_dense_tflops": ("fp8_tc_flops", TERA),
    "fp4_dense_tflops": ("fp4_tc_flops", TERA),
    "hbm_bandwidth_tb_s": ("mem_bw", TERA),
    "hbm_capacity_gb": ("mem_capacity", GIGA),
    "interconnect_gb_s": ("node_intra_node_bw", GIGA),
}
"""Datasheet figures of ours, the wheel's name for them and its unit; its interconnect counts one direction."""


def build(wheel: Path, out: Path) -> list[Path]:
    """Fit all GPUs and write the tables.

    Parameters
    ----------
    wheel : Path
        The pinned wheel.
    out : Path
        ``data/hardware``.

    Returns
    -------
    list of Path
        Files written.
    """
    tables = open_wheel(wheel)
    gpus = {name: load_accelerator(name) for name in tables}
    kernels = {name: fit_gpu(name, tables[name], gpu) for name, gpu in gpus.items()}
    fitted = {name: [*(k.constants for k in own), _elementwise(tables[name])] for name, own in kernels.items()}
    fitted[ANY] = typical(fitted)
    added = {name: fit_added(name, tables[name], gpu, fitted[name]) for name, gpu in gpus.items()}
    added[ANY] = typical(added)
    links = [
        tables[name].all_reduce().assign(gpu=name, basis=f"comm, vLLM {tables[name].version('comm')}") for name in gpus
    ]
    link_table = pd.concat(links)[["gpu", "ranks", "message_bytes", "latency_us", "basis"]].round({"latency_us": 3})
    written = {
        KERNELS_FILE: _table(fitted),
        ADDED_FILE: _table(added),
        CHECKS_FILE: pd.concat(
            [attention_checks(name, tables[name], gpu, [*fitted[name], *added[name]]) for name, gpu in gpus.items()]
        ),
        ALL_REDUCE_FILE: link_table,
        SAMPLE_FILE: pd.concat([_sample(name, kernel) for name, own in kernels.items() for kernel in own]),
        DATASHEET_FILE: pd.concat([compare_datasheet(gpus[name], tables[name]) for name in gpus]),
    }
    written[SILICON_FILE] = silicon_rows(wheel)
    for name, table in written.items():
        write_atomically(out / name, table.to_csv(index=False, lineterminator="\n"))
    models = out / SILICON_MODELS
    models.mkdir(exist_ok=True)
    for name in MODELS.values():
        write_atomically(models / f"{name}.json", json.dumps(config_of(wheel, name), indent=1) + "\n")
    return [out / name for name in written]


def fit_added(
    gpu: str, tables: KernelTables, accelerator: Accelerator, fitted: list[KernelConstants]
) -> list[KernelConstants]:
    """Fit the kernels that came after `KERNELS_FILE` was frozen: experts in MXFP4, latent attention, prefill by head width.

    Parameters
    ----------
    gpu : str
    tables : KernelTables
    accelerator : Accelerator
    fitted : list of KernelConstants
        Those of the file, whose products are taken off the modules of latent attention.
    """
    products = next(c for c in fitted if (c.kernel, c.precision) == (GEMM, "bf16"))
    experts, found = tables.experts(LATER_DTYPES), fit_mla(tables, accelerator, products)
    for precision in experts["precision"].unique():
        own = experts[experts["precision"] == precision]
        basis = f"moe, vLLM {tables.version('moe')}"
        one = fit_experts(own, accelerator, precision, L2_BYTES[gpu], basis=basis)
        found += [] if one is None else [one]
    prefill, basis = tables.prefill_attention(), f"attention, vLLM {tables.version('attention')}"
    for precision in prefill["precision"].unique():
        own = prefill[prefill["precision"] == precision]
        fits = (
            fit_prefill_attention(own, accelerator, precision, head_dim=width, basis=basis)
            for width in PREFILL_OF_WIDTH
        )
        found += [fitted for fitted in fits if fitted is not None]
    return [kernel.constants for kernel in found]


def _table(fitted: dict[str, list[KernelConstants]]) -> pd.DataFrame:
    """Constants of all GPUs as rows of a file."""
    return pd.DataFrame([_row(name, constants) for name, own in fitted.items() for constants in sorted(own, key=_key)])


def typical(fitted: dict[str, list[KernelConstants]]) -> list[KernelConstants]:
    """Return the medians over GPUs; their residual is that of each GPU's kernels by the medians of the others.

    The difference between GPUs is taken where both parts matter: at one half of the time from memory and one from compute.
    """
    groups: dict[tuple[str, str], list[KernelConstants]] = {}
    for own in fitted.values():
        for constants in own:
            groups.setdefault((constants.kernel, constants.precision), []).append(constants)
    return [_median(group) for group in groups.values()]


def _median(group: list[KernelConstants]) -> KernelConstants:
    def middle(of: list[KernelConstants]) -> KernelConstants:
        numbers: dict[str, Any] = {n: float(np.median([getattr(c, n) for c in of])) for n in NUMBERS}
        return replace(of[0], **numbers, n_rows=0, basis=f"median of {len(of)} GPUs")

    others = [(one, middle([c for c in group if c is not one])) for one in group if len(group) > 1]
    work = np.array([[10.0, 0.0], [100.0, 0.0], [100.0, 100.0], [0.0, 100.0]])  # microseconds at the datasheet's rates
    errors = [np.log(o.time_us(*work.T, units=8.0) / one.time_us(*work.T, units=8.0)) for one, o in others]
    between = float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0
    whole = middle(group)
    return replace(whole, residual_log_sd=float(np.hypot(whole.residual_log_sd, between)))


def _elementwise(tables: KernelTables) -> KernelConstants:
    """Small kernels: no vLLM table, so the wheel's own constants for memory-bound ones."""
    sheet = tables.datasheet()
    return KernelConstants(
        ELEMENTWISE,
        "bf16",
        floor_us=float(sheet["mem_empirical_constant_latency"]) * US_PER_S,
        bandwidth_share=float(sheet["mem_bw_empirical_scaling_factor"]),
        residual_log_sd=0.3,
        basis=f"{tables.system}.yaml: empirical latency and scaling of memory-bound kernels",
    )


def compare_datasheet(accelerator: Accelerator, tables: KernelTables) -> pd.DataFrame:
    """Return our datasheet figures beside those of the wheel: `gpu`, `figure`, `ours`, `wheel`, `difference_percent`."""
    sheet = tables.datasheet()
    ours = {
        "bf16_dense_tflops": accelerator.bf16_dense_flops / TERA,
        "fp8_dense_tflops": (accelerator.fp8_dense_flops or np.nan) / TERA,
        "fp4_dense_tflops": (accelerator.fp4_dense_flops or np.nan) / TERA,
        "hbm_bandwidth_tb_s": accelerator.hbm_bandwidth / TERA,
        "hbm_capacity_gb": accelerator.hbm_capacity_bytes / GIGA,
        "interconnect_gb_s": accelerator.interconnect_bandwidth / GIGA / BYTES_PER_ACTIVATION,
    }
    rows = []
    for figure, (key, unit) in FIGURES.items():
        theirs = float(sheet.get(key, np.nan)) / unit
        if not (np.isnan(theirs) or np.isnan(ours[figure])):
            rows.append((accelerator.name, figure, ours[figure], theirs, 100.0 * (theirs / ours[figure] - 1.0)))
    table = pd.DataFrame(rows, columns=["gpu", "figure", "ours", "wheel", "difference_percent"])
    return table.round({"ours": 4, "wheel": 4, "difference_percent": 2})


def _sample(gpu: str, kernel: FittedKernel) -> pd.DataFrame:
    """Rows of a table spread evenly over its times, with what the constants say of them."""
    order = np.argsort(kernel.measured_us, kind="stable")
    chosen = order[np.unique(np.linspace(0, order.size - 1, SAMPLES).astype(int))]
    about = {"gpu": gpu, "kernel": kernel.constants.kernel, "precision": kernel.constants.precision}
    times = {"measured_us": kernel.measured_us[chosen], "fitted_us": kernel.fitted_us[chosen]}
    return pd.DataFrame(times).round(2).assign(**about)[[*about, *times]]


def _row(gpu: str, constants: KernelConstants) -> dict[str, object]:
    numbers = {name: float(f"{getattr(constants, name):.{DIGITS}g}") for name in NUMBERS}
    about = {"gpu": gpu, "kernel": constants.kernel, "precision": constants.precision}
    return {**about, **numbers, "n_rows": constants.n_rows, "basis": constants.basis}


def _key(constants: KernelConstants) -> tuple[str, str]:
    return constants.kernel, constants.precision


def fetch(folder: Path) -> Path:
    """Download the wheel into a folder with pip, and return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    platform = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
    subprocess.run([*command, *platform, REQUIREMENT], check=True)
    return folder / WHEEL


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m stepcal.kernels.build [--wheel FILE] [--out DIR]``."""
    parser = argparse.ArgumentParser(prog="python -m stepcal.kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"the file {WHEEL}; fetched if not given")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the tables to (data/hardware)")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            written = build(given.wheel or fetch(Path(folder)), given.out or data_folder() / "hardware")
    except (InputError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, written)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
