"""Rows of public benchmark runs at fixed concurrency, from the wheel: a second yardstick, to which nothing is fitted.

The list of rows and the rule for suspect ones were fixed before any error was looked at: vLLM, aggregated serving, Hopper,
models whose architecture is modelled, tensor parallelism alone. A row is suspect if its labels need more FLOPs than its GPUs
have at their dense peak.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd

from stepcal.kernels.tables import ROOT
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.hardware import load_accelerator
from stepcal.units import MS_PER_S

SAMPLE = f"{ROOT}/silicon_sample.csv"
CONFIGS = ROOT.replace("systems", "model_configs")
GPUS = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm"}
MODELS = {
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b-fp8",
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2.5",
}
"""Names in the sample, and ours."""
CONFIG_OF = {
    "qwen3-32b": "Qwen--Qwen3-32B",
    "llama-3.1-70b": "meta-llama--Meta-Llama-3.1-70B",
    "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B",
    "qwen3-235b-a22b-fp8": "Qwen--Qwen3-235B-A22B-FP8",
    "minimax-m2.5": "MiniMaxAI--MiniMax-M2.5",
}
FLOPS_A_PARAMETER = 2.0


def silicon_rows(wheel: Path) -> pd.DataFrame:
    """Return the rows of the yardstick.

    Returns
    -------
    DataFrame
        `row`, `model`, `gpu`, `precision` (16-bit or fp8), `tensor_parallel`, `concurrency`, `prompt_tokens`,
        `output_tokens`, `vllm_version` (empty where not said), `ttft_ms`, `tpot_ms`, `suspect` (why, empty if not).
    """
    with zipfile.ZipFile(wheel) as archive:
        table = pd.read_csv(io.BytesIO(archive.read(SAMPLE)))
    table = table[(table["backend"] == "vllm") & (table["mode"] == "agg") & table["system"].isin(GPUS)]
    table = table[table["model_path"].isin(MODELS) & (table["pp_size"] == 1)]
    table = table[table["attention_dp_size"].fillna(1) == 1]
    dense = ~table["model_path"].isin(["Qwen/Qwen3-235B-A22B-FP8", "MiniMaxAI/MiniMax-M2.5"])
    sharded = (table["moe_tp_size"] == table["tp_size"]) & (table["moe_ep_size"] == 1)
    table = table[dense | sharded]
    rows = pd.DataFrame(
        {
            "row": table["id"].astype(str),
            "model": table["model_path"].map(MODELS),
            "gpu": table["system"].map(GPUS),
            "precision": table["precision"].map({"fp8": "fp8"}).fillna("16-bit"),
            "tensor_parallel": table["tp_size"].astype(int),
            "concurrency": table["batch_size"].astype(int),
            "prompt_tokens": table["isl"].astype(int),
            "output_tokens": table["osl"].astype(int),
            "vllm_version": table["backend_version"].fillna("").astype(str),
            "ttft_ms": table["silicon_ttft_ms"].round(4),
            "tpot_ms": table["silicon_tpot_ms"].round(4),
        }
    )
    architectures = {name: model_of(wheel, name) for name in MODELS.values()}
    reasons = [suspicion(row, architectures[str(row["model"])]) for row in rows.to_dict("records")]
    return rows.assign(suspect=reasons).sort_values("row", ignore_index=True)


def model_of(wheel: Path, name: str) -> ModelArchitecture:
    """Return the architecture of one of `MODELS`, from the wheel's copy of its ``config.json``."""
    return ModelArchitecture.from_config(config_of(wheel, name), name=name)


def config_of(wheel: Path, name: str) -> dict[str, Any]:
    """Return the wheel's copy of a model's ``config.json``."""
    with zipfile.ZipFile(wheel) as archive:
        return dict(json.loads(archive.read(f"{CONFIGS}/{CONFIG_OF[name]}_config.json")))


def suspicion(row: dict[Any, Any], architecture: ModelArchitecture) -> str:
    """Say why a row's labels cannot be: a first token, or a rate, that needs more FLOPs than the GPUs have; else nothing."""
    gpu = load_accelerator(str(row["gpu"]))
    peak = row["tensor_parallel"] * gpu.peak_flops("fp8" if row["precision"] == "fp8" else "bf16")
    flops = FLOPS_A_PARAMETER * active_parameters(architecture)
    if row["ttft_ms"] / MS_PER_S < flops * row["prompt_tokens"] / peak:
        return "first token before its prompt's FLOPs"
    life_s = (row["ttft_ms"] + (row["output_tokens"] - 1) * row["tpot_ms"]) / MS_PER_S
    if row["concurrency"] * flops * (row["prompt_tokens"] + row["output_tokens"]) / life_s > peak:
        return "more FLOPs a second than the GPUs have"
    return ""


def active_parameters(architecture: ModelArchitecture) -> float:
    """Return the weights of matrices that a token is multiplied with, without embedding and head."""
    a = architecture
    attention = a.num_layers * a.hidden_size * 2.0 * (a.query_width + a.kv_width)
    if a.latent is not None:
        attention = a.num_layers * a.latent.elements(a.hidden_size, a.num_attention_heads)
    dense = (a.num_layers - a.num_moe_layers) * a.mlp_matrices * a.hidden_size * a.intermediate_size
    visited = a.experts_per_token * a.expert_intermediate_size + a.shared_expert_intermediate_size
    return float(attention + dense + a.num_moe_layers * a.mlp_matrices * a.hidden_size * visited)
