"""Schemas of the tables that ship in ``data/``: one per file, checked when the table is written and when it is read."""

from __future__ import annotations

import pandera.pandas as pa

from stepcal.datasets.tables import flag, integer, number, text

WORKLOADS = ("codegen", "general", "reasoning", "roleplay")
COMPONENTS = ("decode_attn", "decode_gemm", "decode_tokens", "prefill_attn", "prefill_gemm", "prefill_tokens", "total")
SUBSETS = ("all", "pure_decode", "pure_prefill")


def _experiment() -> pa.Column:
    return text("Run; its folder's name in the public layout.")


def _run_columns() -> dict[str, pa.Column]:
    return {
        "experiment_id": _experiment(),
        "model": text("Model served, canonical name (a row of architectures.csv)."),
        "workload": text("Workload's name.", choices=WORKLOADS),
    }


ARCHITECTURES = pa.DataFrameSchema(
    {
        "name": text("Canonical name."),
        "aliases": text("Other names, separated by `;`."),
        "huggingface_id": text("Repository on HuggingFace."),
        "hidden_size": integer("Width of the residual stream.", "element", minimum=1),
        "num_layers": integer("Transformer layers.", "layer", minimum=1),
        "num_attention_heads": integer("Query heads.", "head", minimum=1),
        "num_kv_heads": integer("Key/value heads.", "head", minimum=1),
        "head_dim": integer("Width of a head.", "element", minimum=1),
        "intermediate_size": integer("Width of the MLP, or of one expert.", "element", minimum=1),
        "num_experts": integer("Experts of a layer; 1 for a dense model.", "expert", minimum=1),
        "experts_per_token": integer("Experts that a token visits.", "expert", minimum=1),
        "vocab_size": integer("Tokens of the vocabulary.", "token", minimum=1),
        "tie_word_embeddings": flag("Whether the output matrix is the embedding."),
        "dtype": text("Type of the stored weights."),
        "max_position_embeddings": integer("Longest context trained for.", "token", minimum=1),
        "source": text("File of the public layout."),
    },
    unique=["name"],
    name="architectures",
)

_WORKLOAD_COLUMNS = {
    f"{tense}_{name}": column
    for tense, said in (("asked", "asked for (profile.yaml)"), ("run", "run (results/config.yaml)"))
    for name, column in {
        "system_prompt_tokens": integer(f"System prompt as {said}.", "token"),
        "question_tokens": integer(f"Question as {said}.", "token"),
        "output_tokens": integer(f"Tokens to generate as {said}.", "token", minimum=1),
        "groups": integer(f"Distinct system prompts as {said}.", "prompt", minimum=1),
        "prompts_per_group": integer(f"Questions per system prompt as {said}.", "prompt", minimum=1),
        "multi_turn": flag(f"Whether turns follow each other, as {said}; false where the file has no such key."),
    }.items()
}

EXPERIMENTS = pa.DataFrameSchema(
    {
        **_run_columns(),
        "model_as_named": text("Model as the run's folder and the study's tables name it."),
        "tensor_parallel": integer("GPUs that share each layer.", "rank", minimum=1),
        "gpu": text("Accelerator, a row of hardware/accelerators.csv."),
        "max_model_len": integer("Longest context the server takes.", "token", minimum=1),
        "max_num_seqs": integer("Most requests running at once.", "request", minimum=1),
        "max_num_batched_tokens": integer("Most tokens in a step.", "token", minimum=1),
        "kv_blocks_total": integer("KV blocks on the GPU.", "block", minimum=1),
        "block_size": integer("Tokens of a KV block.", "token", minimum=1),
        "kv_offloading_gib": number(
            "Pool of KV blocks in CPU memory; inferred, no published setting names it.", "GiB", minimum=0
        ),
        **_WORKLOAD_COLUMNS,
        "served_share": number("Completed over requested rate, in the stage that did worst.", "1", minimum=0),
        "overloaded": flag("Whether served_share is below 0.95."),
        "source": text("Folder of the public layout."),
    },
    unique=["experiment_id"],
    name="experiments",
)

LOAD_STAGES = pa.DataFrameSchema(
    {
        "experiment_id": _experiment(),
        "stage": integer("Load stage, from 0.", "stage"),
        "requested_rate_per_s": number("Rate asked of the load generator.", "request/s", above=0),
        "duration_s": number("Length asked for.", "s", above=0),
        "achieved_rate_per_s": number("Rate at which it sent.", "request/s", above=0),
        "send_duration_s": number("Time it took to send.", "s", above=0),
        "requests": integer("Requests sent.", "request", minimum=1),
    },
    unique=["experiment_id", "stage"],
    name="load stages",
)

MEASURED = pa.DataFrameSchema(
    {
        "experiment_id": _experiment(),
        "stage": integer("Load stage; -1 is the whole run.", "stage", minimum=-1),
        "metric": text(
            "requests (counts), throughput, prompt_len, output_len (re-tokenised text), or a latency over completed "
            "requests: e2e, ttft, itl, tpot. The published itl and tpot count about two stream events a token.",
            choices=["requests", "e2e", "ttft", "itl", "tpot", "prompt_len", "output_len", "throughput"],
        ),
        "statistic": text("mean, p50, p90, p99; or what is counted."),
        "value": number("The figure.", "see `unit`", minimum=0),
        "unit": text("Unit of the value.", choices=["request", "ms", "token", "request/s", "token/s"]),
    },
    unique=["experiment_id", "stage", "metric", "statistic"],
    name="measured figures",
)

H1_POOLED = pa.DataFrameSchema(
    {
        "subset": text("Steps that the correlation is over.", choices=SUBSETS),
        "component": text("Component of the FLOP decomposition, or a token count as baseline.", choices=COMPONENTS),
        "pearson_r": number("Correlation with the label; empty where undefined.", "1", minimum=-1, nullable=True),
        "n_steps": integer("Steps of the subset.", "step"),
    },
    unique=["subset", "component"],
    name="published H1 correlations, pooled",
)

H1_PER_EXPERIMENT = pa.DataFrameSchema(
    {
        **_run_columns(),
        "component": text("Component of the four-component FLOP decomposition.", choices=COMPONENTS),
        "pearson_r": number("Correlation with the label; empty where undefined.", "1", minimum=-1, nullable=True),
        "n_steps": integer("Sampled steps of the run.", "step", minimum=1),
    },
    unique=["experiment_id", "component"],
    name="published H1 correlations, per experiment",
)

H2 = pa.DataFrameSchema(
    {
        **_run_columns(),
        "n_test": integer("Steps of the temporal test split.", "step", minimum=1),
        "blackbox_mape_percent": number("MAPE of the two-feature blackbox.", "%", minimum=0),
        "global9_mape_percent": number("MAPE of the 9-parameter variant.", "%", minimum=0),
        "global9_mspe_percent": number("MSPE of the 9-parameter variant.", "%"),
        "global9_r": number("Correlation of its predictions with the label.", "1", minimum=-1),
        "model36_mape_percent": number("MAPE of the 36-parameter variant.", "%", minimum=0),
        "model36_mspe_percent": number("MSPE of the 36-parameter variant.", "%"),
        "model36_r": number("Correlation of its predictions with the label.", "1", minimum=-1),
    },
    unique=["experiment_id"],
    name="published H2 results",
)

XGBOOST = pa.DataFrameSchema(
    {
        **_run_columns(),
        "n_train": integer("Steps of the temporal training split.", "step", minimum=1),
        "n_test": integer("Steps of the temporal test split.", "step", minimum=1),
        "valid_mape_percent": number("MAPE on the validation split.", "%", minimum=0),
        "test_mape_percent": number("MAPE on the test split.", "%", minimum=0),
        "max_depth": integer("Chosen depth.", "level", minimum=1),
        "n_estimators": integer("Chosen number of trees.", "tree", minimum=1),
        "learning_rate": number("Chosen learning rate.", "1", above=0),
        "top_feature_1": text("Most important feature."),
        "top_feature_2": text("Second feature."),
        "top_feature_3": text("Third feature."),
    },
    unique=["experiment_id"],
    name="published gradient boosting results",
)

BLIS = pa.DataFrameSchema(
    {
        "experiment_id": _experiment(),
        "method": text("Calibration round of the BLIS simulator."),
        "measured_e2e_ms": number("Mean end-to-end latency measured.", "ms", above=0),
        "measured_ttft_ms": number("Mean time to first token measured.", "ms", above=0),
        "predicted_e2e_ms": number("Mean end-to-end latency predicted.", "ms", above=0),
        "predicted_ttft_ms": number("Mean time to first token predicted.", "ms", above=0),
        "predicted_itl_ms": number("Mean inter-token latency predicted.", "ms", above=0),
    },
    unique=["experiment_id", "method"],
    name="published BLIS predictions",
)

PEERS = pa.DataFrameSchema(
    {
        "experiment_id": _experiment(),
        "simulator": text("Name of the public simulator."),
        "stage": integer("Load stage; -1 is the whole run.", "stage", minimum=-1),
        "metric": text("Latency.", choices=["e2e", "ttft", "itl"]),
        "statistic": text("mean, p90 or p99.", choices=["mean", "p90", "p99"]),
        "predicted_ms": number("Predicted.", "ms", minimum=0),
        "measured_ms": number("Measured; llmservingsim was judged on the first 2,000 requests.", "ms", above=0),
    },
    unique=["experiment_id", "simulator", "stage", "metric", "statistic"],
    name="published predictions of other simulators",
)

ACCELERATORS = pa.DataFrameSchema(
    {
        "name": text("Short name."),
        "full_name": text("Vendor's name."),
        "bf16_dense_tflops": number("Peak of the tensor cores in BF16, without sparsity.", "TFLOP/s", above=0),
        "fp8_dense_tflops": number("The same in FP8; empty where there is none.", "TFLOP/s", above=0, nullable=True),
        "fp4_dense_tflops": number("The same in FP4; empty where there is none.", "TFLOP/s", above=0, nullable=True),
        "hbm_bandwidth_tb_s": number("Peak bandwidth of the GPU's memory.", "TB/s", above=0),
        "hbm_capacity_gb": number("Size of the GPU's memory.", "GB", above=0),
        "interconnect_gb_s": number("Peak bandwidth to other GPUs, both directions together.", "GB/s", above=0),
        "interconnect_kind": text("Link between GPUs."),
        "source": text("Datasheet and edition."),
        "note": text("How the figures were read.", nullable=True),
    },
    unique=["name"],
    name="accelerators",
)

KERNEL_EFFICIENCY = pa.DataFrameSchema(
    {
        "kernel": text("Kernel benchmarked.", choices=["gemm", "decode_attention", "prefill_attention"]),
        "heads": text(
            "Head layout: full (as many key/value heads as query heads), grouped (fewer), any (all, or none in a GEMM).",
            choices=["any", "full", "grouped"],
        ),
        "batch_size": integer("Requests; 0 where all sizes are taken together, or there are none (GEMM).", "request"),
        "tokens": integer("Rows m of a GEMM, context of decode, length of prefill; 0: all together.", "token"),
        "quantity": text(
            "share_of_flops, share_of_bandwidth (of `peak`; of a GEMM: weights at one byte an element), or block_excess_ns: "
            "time a KV block of 16 tokens beyond its bytes at the rate in `peak`.",
            choices=["share_of_flops", "share_of_bandwidth", "block_excess_ns"],
        ),
        "low": number("Smallest; of all sizes together the lower quartile.", "1, or ns of block_excess_ns"),
        "median": number("Median.", "1, or ns of block_excess_ns"),
        "high": number("Largest; of all sizes together the upper quartile.", "1, or ns of block_excess_ns"),
        "n_benchmarks": integer("Benchmarks summarised.", "benchmark", minimum=1),
        "peak": number("Rate that is counted against; a GEMM's is the dense FP8 peak.", "see `peak_unit`", above=0),
        "peak_unit": text("Unit of the peak.", choices=["TFLOP/s", "TB/s"]),
        "source": text("Files of the public layout."),
    },
    unique=["kernel", "heads", "batch_size", "tokens", "quantity"],
    name="kernel efficiency",
)

PUBLIC_FILES = pa.DataFrameSchema(
    {
        "repository": text("GitHub repository."),
        "commit": text("Pinned commit."),
        "path": text("File in the repository."),
        "sha256": text("Hash of the file."),
        "bytes": integer("Size.", "byte", minimum=1),
    },
    unique=["repository", "commit", "path"],
    name="public files",
)

JOINED_TABLES = pa.DataFrameSchema(
    {
        "table": text("Table made by joining public files."),
        "rows": integer("Rows of the table.", "row", minimum=1),
        "content_sha256": text("Hash of its content (`content_sha256`), whatever file holds it."),
        "joined_from": text("Files joined, as a pattern."),
    },
    unique=["table"],
    name="joined tables",
)

SOURCES = pa.DataFrameSchema(
    {
        "file": text("Table of data/."),
        "rows": integer("Rows of the table.", "row", minimum=1),
        "made_from": text("Files of the public layout that it was made from."),
        "made_from_sha256": text("Hash of those files, in the order of their names."),
        "origin": text("Public repositories that the layout was collected from."),
        "commit": text("Pinned commit; `not recorded` where the layout does not tell."),
        "license": text("License of the origin."),
    },
    unique=["file"],
    name="sources",
)
