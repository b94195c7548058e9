"""Schemas of what nothing here was fitted to: 31 runs of other models, GPUs and precisions, and public benchmark rows."""

from __future__ import annotations

import pandera.pandas as pa

from stepcal.datasets.tables import flag, integer, number, text


def _run() -> pa.Column:
    return text("Run, as its source names it.")


RUNS = pa.DataFrameSchema(
    {
        "experiment_id": _run(),
        "model": text("Model served; its config.json lies in transfer/architectures/."),
        "gpu": text("Accelerator, a row of hardware/accelerators.csv."),
        "precision": text("Width of the weights.", choices=["16-bit", "fp8"]),
        "tensor_parallel": integer("GPUs that share each layer.", "rank", minimum=1),
        "max_num_batched_tokens": integer("Most tokens in a step.", "token", minimum=1),
        "max_num_seqs": integer("Most requests running at once.", "request", minimum=1),
        "gpu_memory_utilization": number("Share of the GPU's memory that vLLM may use.", "1", above=0),
        "kv_blocks": number("KV blocks on the GPU; empty where not published.", "block", above=0, nullable=True),
        "kv_cpu_offload": flag("Whether KV was offloaded to CPU memory; the pool's size is not published."),
        "workload": text("Workload's name."),
        "system_prompt_tokens": integer("Shared system prompt.", "token"),
        "question_tokens": integer("Question.", "token", minimum=1),
        "output_tokens": integer("Tokens that each request generates.", "token", minimum=1),
        "stages": text("Load stages, requests per second x seconds, separated by `;`."),
    },
    unique=["experiment_id"],
    name="transfer runs",
)

MEASURED = pa.DataFrameSchema(
    {
        "experiment_id": _run(),
        "stage": integer("Load stage from 0; -1 is the whole run.", "1", minimum=-1),
        "metric": text("Latency; itl is the gap between stream events.", choices=["e2e", "ttft", "itl"]),
        "statistic": text("Statistic over requests.", choices=["mean", "p90", "p99"]),
        "value": number("Measured latency.", "ms", above=0),
    },
    unique=["experiment_id", "stage", "metric", "statistic"],
    name="transfer measurements",
)

PEERS = pa.DataFrameSchema(
    {
        "experiment_id": _run(),
        "simulator": text("Public simulator, as its source names it."),
        "e2e_mean_ms": number("Mean E2E that it predicted for the whole run.", "ms", above=0),
    },
    unique=["experiment_id", "simulator"],
    name="transfer peers",
)

SAMPLING = pa.DataFrameSchema(
    {
        "model_family": text("Models that share these defaults."),
        "temperature": number("Default of generation_config.json; empty where it sets none.", "1", nullable=True),
        "top_p": number("The same: probability mass that is kept.", "1", above=0, nullable=True),
        "top_k": number("The same: tokens that are kept.", "token", above=0, nullable=True),
        "repetition_penalty": number("The same: penalty on tokens that occurred.", "1", above=0, nullable=True),
        "basis": text("How sure each entry is."),
    },
    unique=["model_family"],
    name="transfer sampling",
)

SILICON = pa.DataFrameSchema(
    {
        "row": text("Benchmark row, as its source names it."),
        "model": text("Model; its config.json lies in hardware/silicon_models/."),
        "gpu": text("Accelerator, a row of hardware/accelerators.csv."),
        "precision": text("Width of the weights.", choices=["16-bit", "fp8"]),
        "tensor_parallel": integer("GPUs that share each layer.", "rank", minimum=1),
        "concurrency": integer("Clients, each with one request at a time.", "request", minimum=1),
        "prompt_tokens": integer("Prompt.", "token", minimum=1),
        "output_tokens": integer("Tokens that each request generates.", "token", minimum=2),
        "vllm_version": text("Version served; empty where not said.", nullable=True),
        "ttft_ms": number("Measured time to first token.", "ms", above=0),
        "tpot_ms": number("Measured time per output token.", "ms", above=0),
        "suspect": text("Why its labels cannot be; empty where they can.", nullable=True),
    },
    unique=["row"],
    name="silicon rows",
)
SILICON_PEER = pa.DataFrameSchema(
    {
        "row": text("Row of hardware/silicon.csv."),
        "aiconfigurator_version": text("Version of AIConfigurator."),
        "tables_version": text(
            "Version of vLLM whose kernel tables it used; empty where it gives no estimate.", nullable=True
        ),
        "ttft_ms": number(
            "Its estimate of the time to first token; empty where it gives none.", "ms", above=0, nullable=True
        ),
        "tpot_ms": number("Its estimate of the time per output token.", "ms", above=0, nullable=True),
        "reason": text("Why it gives none.", nullable=True),
    },
    unique=["row"],
    name="silicon rows, peer",
)
