"""Options of commands that need to know a server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Architecture = Annotated[
    str | None, typer.Option("--architecture", help="Model that ships, or path of a HuggingFace config.json.")
]
AcceleratorName = Annotated[
    str | None,
    typer.Option("--accelerator", help="GPU, by name or as nvidia-smi writes it, or a file of one of your own."),
]
Degree = Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel degree.")]
KvBlocks = Annotated[
    int | None,
    typer.Option("--kv-blocks", help="KV blocks, as vLLM logs them. Default: estimated from the GPU's memory."),
]
MaxNumSeqs = Annotated[int | None, typer.Option("--max-num-seqs", help="Most requests that run at once.")]
MaxTokens = Annotated[int | None, typer.Option("--max-num-batched-tokens", help="Token budget of a step.")]
MaxModelLen = Annotated[int | None, typer.Option("--max-model-len", help="Longest request, prompt and output.")]
PrefixCaching = Annotated[
    bool | None,
    typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Whether prompt blocks are reused."),
]
KvCacheDtype = Annotated[
    str | None, typer.Option("--kv-cache-dtype", help="auto (as the checkpoint asks), bfloat16, float16, fp8.")
]
VllmVersion = Annotated[
    str | None,
    typer.Option(
        "--vllm-version",
        help="Release of vLLM that serves. Default: as the folder says; 0.15.1, of the coefficients' servers, for a "
        "folder that does not; the newest that was recorded without a folder.",
    ),
]
OffloadGib = Annotated[
    float | None, typer.Option("--kv-offloading-gib", help="`kv_offloading_size`: pool for KV in CPU memory.")
]
PromptTexts = Annotated[
    int | None,
    typer.Option("--prompt-texts", min=1, help="Prompts are this many texts in turn. Default: each is its own."),
]
Model = Annotated[
    str,
    typer.Option("--coefficients", "--stepml-model", help="Coefficients by name, or a coefficient file."),
]


def server_options(
    architecture: str | None,
    accelerator: str | None,
    tp: int | None,
    kv_blocks: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    max_model_len: int | None,
    enable_prefix_caching: bool | None,
    kv_offloading_gib: float | None = None,
    kv_cache_dtype: str | None = None,
    vllm_version: str | None = None,
) -> dict[str, Any]:
    """Return the options by the names that `stepcal.experiments.options.deployment_from` takes."""
    return {
        "architecture": architecture,
        "accelerator": accelerator,
        "tensor_parallel_size": tp,
        "kv_blocks": kv_blocks,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "enable_prefix_caching": enable_prefix_caching,
        "kv_offloading_size": kv_offloading_gib,
        "kv_cache_dtype": kv_cache_dtype,
        "vllm_version": vllm_version,
    }
