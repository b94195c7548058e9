"""``stepcal simulate``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepcal.cli.output import Json, emit, progress_options
from stepcal.files import refuse_unwritable

if TYPE_CHECKING:
    from stepcal.cli.simulate import SimulateOptions


def simulate(
    architecture: Annotated[
        str,
        typer.Option("--architecture", help="Path of a HuggingFace config.json, or the name of a model that ships."),
    ],
    kv_blocks: Annotated[
        int, typer.Option("--kv-blocks", help="KV blocks of the server, as vLLM logs them (num_gpu_blocks).")
    ],
    coefficients: Annotated[
        str,
        typer.Option(
            "--coefficients",
            "--stepml-model",
            help="default, default-2026-11-24, global9, phase16, model36, or a coefficient file.",
        ),
    ],
    accelerator: Annotated[
        str,
        typer.Option("--accelerator", help="GPU: a name, as nvidia-smi writes it, or a JSON or YAML file of yours."),
    ] = "h100-sxm",
    sampling: Annotated[
        Path | None,
        typer.Option(
            "--sampling",
            help="generation_config.json. Default: the one beside the model's config.json, or its publisher's.",
        ),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", help="Tensor-parallel degree.")] = 1,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help="Most requests that run at once.")] = 128,
    max_num_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="Token budget of a step.")
    ] = 2048,
    max_model_len: Annotated[int, typer.Option("--max-model-len", help="Longest request, prompt and output.")] = 4096,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", help="Tokens of a KV block. Default: 16, or what the backend reads."),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="auto (as the checkpoint asks), bfloat16, float16, fp8.")
    ] = "auto",
    prefix_caching: Annotated[
        bool, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse cached prompt blocks.")
    ] = True,
    async_scheduling: Annotated[
        bool, typer.Option("--async-scheduling/--no-async-scheduling", help="Schedule a step while the last one runs.")
    ] = True,
    scheduling_policy: Annotated[
        str,
        typer.Option(
            "--scheduling-policy", help="fcfs, or priority: the smallest `priority` of the request table first."
        ),
    ] = "fcfs",
    long_prefill_token_threshold: Annotated[
        int,
        typer.Option("--long-prefill-token-threshold", help="Most tokens of one request in a step, 0 for no limit."),
    ] = 0,
    chunked_prefill: Annotated[
        bool,
        typer.Option("--enable-chunked-prefill/--no-enable-chunked-prefill", help="Split prompts over several steps."),
    ] = True,
    disable_hybrid_kv_cache_manager: Annotated[
        bool | None,
        typer.Option(
            "--disable-hybrid-kv-cache-manager/--no-disable-hybrid-kv-cache-manager",
            help="Keep the KV of layers with a window as if they had full attention. Default: as the release decides.",
        ),
    ] = None,
    vllm_version: Annotated[
        str | None,
        typer.Option("--vllm-version", help="Release of vLLM to serve as. Default: the newest that was recorded."),
    ] = None,
    kv_offloading_gib: Annotated[
        float,
        typer.Option("--kv-offloading-gib", help="`kv_offloading_size`: pool for KV in CPU memory, 0 for none."),
    ] = 0.0,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="inference-perf profile.yaml or results/config.yaml.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", help="Replay this request table or trace (parquet, CSV, JSON lines; .gz, .zst)."),
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format", help="Of the trace: table, azure, burstgpt, mooncake, llmservingsim. Default: by its columns."
        ),
    ] = None,
    first: Annotated[int | None, typer.Option("--first", help="Replay the first N requests of the trace only.")] = None,
    from_s: Annotated[
        float | None,
        typer.Option("--from", help="Replay from this second of the trace, counted from its first request."),
    ] = None,
    until_s: Annotated[float | None, typer.Option("--until", help="Replay up to this second of the trace.")] = None,
    rate_scale: Annotated[
        float | None, typer.Option("--rate-scale", help="By how much the trace's rate grows: 2 halves every gap.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="Which experiment of the request table to replay.")
    ] = None,
    arrivals: Annotated[str, typer.Option("--arrivals", help="poisson, constant or gamma (with --cv).")] = "poisson",
    cv: Annotated[float | None, typer.Option("--cv", help="Coefficient of variation of gamma arrivals.")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", help="Closed loop: so many clients, each sends the next request when answered."),
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(
            "--max-in-flight",
            help="Cap on requests in flight; others wait in the client. Default: as the workload says.",
        ),
    ] = None,
    think_s: Annotated[
        float, typer.Option("--think-s", help="How long a client waits between an answer and its next request.")
    ] = 0.0,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout-s", help="How long a client waits. Default: as the workload says."),
    ] = None,
    api_before_us: Annotated[
        float | None,
        typer.Option("--api-before-us", help="Time from client to engine. Default: as the coefficients say, or 0."),
    ] = None,
    api_after_us: Annotated[
        float | None,
        typer.Option("--api-after-us", help="Time from engine to client. Default: as the coefficients say, or 0."),
    ] = None,
    steps: Annotated[Path | None, typer.Option("--steps", help="Write the step table to this parquet file.")] = None,
    steps_fraction: Annotated[
        float, typer.Option("--steps-fraction", help="Share of steps to keep in it, drawn from the seed.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals and of the sample of steps.")] = 0,
    json_out: Json = None,
) -> None:
    """Serve a workload as vLLM would and report latencies, per load stage and overall.

    Example: stepcal simulate --architecture config.json --tp 2 --kv-blocks 26602 --workload profile.yaml
    --coefficients default --json -
    """
    from stepcal.cli.served_load import LoadOptions
    from stepcal.cli.simulate import SimulateOptions
    from stepcal.simulator import ServerConfig
    from stepcal.simulator.config import check_block_size
    from stepcal.simulator.versions import NEWEST

    if json_out not in (None, "-"):
        refuse_unwritable(Path(json_out))
    server = ServerConfig(
        kv_blocks=kv_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=16 if block_size is None else check_block_size(block_size),
        enable_prefix_caching=prefix_caching,
        async_scheduling=async_scheduling,
        vllm_version=NEWEST if vllm_version is None else vllm_version,
        scheduling_policy=scheduling_policy,
        long_prefill_token_threshold=long_prefill_token_threshold,
        enable_chunked_prefill=chunked_prefill,
        disable_hybrid_kv_cache_manager=disable_hybrid_kv_cache_manager,
    )
    options = SimulateOptions(
        architecture=architecture,
        accelerator=accelerator,
        tensor_parallel=tp,
        server=server,
        kv_offloading_gib=kv_offloading_gib,
        kv_cache_dtype=kv_cache_dtype,
        is_block_size_given=block_size is not None,
        load=LoadOptions(
            workload=workload,
            requests=requests,
            format=format_name,
            experiment=experiment,
            arrivals=arrivals,
            cv=cv,
            first=first,
            from_s=from_s,
            until_s=until_s,
            rate_scale=rate_scale,
            concurrency=concurrency,
            max_in_flight=max_in_flight,
            think_s=think_s,
            timeout_s=timeout_s,
            seed=seed,
        ),
        coefficients=coefficients,
        seed=seed,
        api_before_us=api_before_us,
        api_after_us=api_after_us,
        steps=steps,
        steps_fraction=steps_fraction,
        sampling=sampling,
    )
    _run(options, json_out)


def _run(options: SimulateOptions, json_out: str | None) -> None:
    from tqdm import tqdm

    from stepcal.cli.simulate import run_simulation, summary_text

    with tqdm(unit=" requests", unit_scale=True, **progress_options()) as bar:

        def show(ended: int, total: int) -> None:
            bar.total = total
            bar.update(ended - bar.n)

        summary = run_simulation(options, show)
    emit(summary, json_out, summary_text(summary))
