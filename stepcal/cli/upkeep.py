"""``stepcal design`` and ``stepcal drift``: what to measure next, and whether what was learned still holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stepcal.cli.output import Json, emit
from stepcal.cli.server_options import (
    AcceleratorName,
    Architecture,
    Degree,
    KvBlocks,
    KvCacheDtype,
    MaxModelLen,
    MaxNumSeqs,
    MaxTokens,
    Model,
    OffloadGib,
    PrefixCaching,
    PromptTexts,
    VllmVersion,
    server_options,
)
from stepcal.errors import InputError
from stepcal.files import write_atomically


def design(
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the recipe's files.")] = None,
    architecture: Architecture = None,
    accelerator: AcceleratorName = None,
    tp: Degree = None,
    kv_blocks: KvBlocks = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxModelLen = None,
    enable_prefix_caching: PrefixCaching = None,
    kv_cache_dtype: KvCacheDtype = None,
    vllm_version: VllmVersion = None,
    coefficients: Model = "default",
    minutes: Annotated[float, typer.Option("--minutes", min=1.0, help="Length of the recipe.")] = 30.0,
    stages: Annotated[int, typer.Option("--stages", min=1, max=20, help="Stages of load in it.")] = 6,
    json_out: Json = None,
) -> None:
    """Choose half an hour of load that determines most of what is not known, with the intervals to expect.

    Coefficients that `calibrate` wrote say what is known already. Files for vllm bench serve, GuideLLM and inference-perf go
    to --out. Example: stepcal design --architecture llama-2-7b --accelerator h100-sxm --out recipe
    """
    import yaml

    from stepcal.experiments.options import deployment_from
    from stepcal.servers.coefficient_file import known_spreads
    from stepcal.servers.design import design as choose
    from stepcal.servers.design import guidellm_script, inference_perf_config, vllm_bench_script
    from stepcal.servers.priors import prior_of
    from stepcal.simulator.versions import NEWEST

    served = deployment_from(
        server_options(
            architecture,
            accelerator,
            tp,
            kv_blocks,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            enable_prefix_caching,
            kv_cache_dtype=kv_cache_dtype,
            vllm_version=vllm_version or NEWEST,
        )
    )
    start, parameters = prior_of(coefficients)
    known = known_spreads(coefficients)
    recipe = choose(start, parameters, served.deployment, known_log_sd=known, n_stages=stages, total_s=60.0 * minutes)
    model = served.deployment.architecture.name
    if out is not None:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"Cannot make {out}: {error.strerror}. Choose a folder whose parent exists.") from None
        write_atomically(out / "vllm-bench.sh", vllm_bench_script(recipe, model))
        write_atomically(out / "guidellm.sh", guidellm_script(recipe, model))
        for i, stage in enumerate(recipe.stages):
            text = yaml.safe_dump(inference_perf_config(stage, model), sort_keys=False)
            write_atomically(out / f"inference-perf-{i}.yaml", text)
    lines = [f"{'requests/s':>11}{'seconds':>9}{'prompt':>8}{'output':>8}{'in flight':>11}"]
    lines += [
        f"{s.rate_per_s:>11g}{s.duration_s:>9.0f}{s.prompt_tokens:>8}{s.output_tokens:>8}{s.in_flight:>11}"
        for s in recipe.stages
    ]
    lines.append("95% intervals to expect (before -> after)")
    for e in recipe.expected:
        told = "" if e.is_determined else "   still held by the prior"
        lines.append(
            f"  {e.name:<26}{e.value:>10.4g} {e.unit:<4}[{e.prior_low:.3g}, {e.prior_high:.3g}] -> "
            f"[{e.low:.3g}, {e.high:.3g}]{told}"
        )
    emit(asdict(recipe), json_out, "\n".join(lines))


def drift(
    folder: Annotated[Path, typer.Argument(help="Folder that `stepcal ingest` wrote, with new logs.")],
    coefficients: Model = "stepml_coefficients.json",
    architecture: Architecture = None,
    accelerator: AcceleratorName = None,
    tp: Degree = None,
    kv_blocks: KvBlocks = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxModelLen = None,
    enable_prefix_caching: PrefixCaching = None,
    kv_cache_dtype: KvCacheDtype = None,
    vllm_version: VllmVersion = None,
    kv_offloading_gib: OffloadGib = None,
    prompt_texts: PromptTexts = None,
    json_out: Json = None,
) -> None:
    """Say whether coefficients still fit new logs, and since when not. Exit status 1 says that they do not.

    Example: stepcal drift new --coefficients mine.json
    """
    from stepcal.servers.coefficient_file import load_known
    from stepcal.servers.drift import drift_of
    from stepcal.servers.log import read_logs

    options = server_options(
        architecture,
        accelerator,
        tp,
        kv_blocks,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        enable_prefix_caching,
        kv_offloading_gib,
        kv_cache_dtype=kv_cache_dtype,
        vllm_version=vllm_version,
    )
    known = load_known(coefficients)
    found = [drift_of(log, known) for log in read_logs(folder, options, prompt_texts=prompt_texts)]
    result = {"coefficients": coefficients, "error_source": known.error_source, "runs": [d.summary() for d in found]}
    emit(result, json_out, "\n".join(d.report() for d in found))
    if any(d.has_drifted for d in found):
        raise typer.Exit(1)
