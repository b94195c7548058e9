"""Ask AIConfigurator for its own estimate (``aiconfigurator cli estimate``) of every row of ``data/hardware/silicon.csv``.

Our predictions of the same rows are the study `silicon`; the page shows both. AIConfigurator is installed in an environment
of its own, which nothing else of the project needs::

    python3 -m venv aic-env && aic-env/bin/pip install aiconfigurator==0.12.0
    HF_HUB_OFFLINE=1 aic-env/bin/python tools/compare_silicon.py --out data/hardware/silicon_peer.csv

What a row says is passed on: model, GPU, tensor parallelism, prompt and answer lengths, concurrency as the batch size. The
rest is AIConfigurator's default: aggregated serving, measured tables alone, and the newest of its vLLM tables (it has none
of the versions of the rows). A model in FP8 whose config does not say so has it passed as an argument.
"""

import argparse
import csv
import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS = Path(__file__).resolve().parent.parent / "data/hardware/silicon.csv"
COLUMNS = ("row", "aiconfigurator_version", "tables_version", "ttft_ms", "tpot_ms", "reason")
MODELS = {
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "qwen3-235b-a22b-fp8": "Qwen/Qwen3-235B-A22B-FP8",
    "minimax-m2.5": "MiniMaxAI/MiniMax-M2.5",
}
SAY_FP8 = ("qwen3-32b", "llama-3.1-70b", "llama-3.1-8b")
MIXTURES = ("qwen3-235b-a22b-fp8", "minimax-m2.5")


def arguments_of(row: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of ``cli_estimate`` for a row."""
    degree = int(row["tensor_parallel"])
    arguments: dict[str, Any] = {
        "model_path": MODELS[row["model"]],
        "system_name": row["gpu"].replace("-", "_"),
        "mode": "agg",
        "backend_name": "vllm",
        "isl": int(row["prompt_tokens"]),
        "osl": int(row["output_tokens"]),
        "batch_size": int(row["concurrency"]),
        "tp_size": degree,
    }
    if row["model"] in MIXTURES:
        arguments |= {"moe_tp_size": degree, "moe_ep_size": 1}
    if row["precision"] == "fp8" and row["model"] in SAY_FP8:
        arguments["gemm_quant_mode"] = "fp8"
    return arguments


def estimated(row: dict[str, str]) -> dict[str, Any]:
    """Return AIConfigurator's estimate of a row, or why it gives none."""
    from aiconfigurator.cli.api import cli_estimate  # only in the environment of this script

    known: dict[str, Any] = {"row": row["row"], "aiconfigurator_version": version("aiconfigurator")}
    try:
        result = cli_estimate(**arguments_of(row))
    except Exception as error:
        return {**known, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    tables = getattr(result, "backend_version", "")
    return {**known, "tables_version": tables, "ttft_ms": round(result.ttft, 4), "tpot_ms": round(result.tpot, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with args.rows.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with args.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        for number, row in enumerate(rows, 1):
            answer = estimated(row)
            writer.writerow(answer)
            stream.flush()
            print(f"{number} of {len(rows)}: {row['row']}: {answer.get('tpot_ms', answer.get('reason'))}", flush=True)


if __name__ == "__main__":
    main()
