"""``stepcal predict``, ``compare`` and ``plan``: what a server would do, which of two does better, and what to buy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    PrefixCaching,
    VllmVersion,
    server_options,
)
from stepcal.errors import InputError
from stepcal.files import refuse_unwritable, write_bytes_atomically

Rate = Annotated[float | None, typer.Option("--rate", help="Requests a second.")]
InputLen = Annotated[int | None, typer.Option("--input-len", help="Prompt tokens of a request.")]
OutputLen = Annotated[int | None, typer.Option("--output-len", help="Output tokens of a request.")]
PrefixLen = Annotated[int, typer.Option("--prefix-len", help="Start of every prompt that is the same text, tokens.")]
Like = Annotated[
    Path | None, typer.Option("--like", help="Take lengths from the first run of a folder that `ingest` wrote.")
]
Requests = Annotated[int, typer.Option("--requests", min=100, help="Requests that are simulated.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of gaps between arrivals and drawn lengths.")]


def predict(
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
    batch: Annotated[int, typer.Option("--batch", help="One step: requests that decode.")] = 0,
    context: Annotated[int, typer.Option("--context", help="One step: tokens of context of each.")] = 0,
    prefill: Annotated[int, typer.Option("--prefill", help="One step: tokens of a new prompt.")] = 0,
    rate: Rate = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    prefix_len: PrefixLen = 0,
    like: Like = None,
    requests: Requests = 2_000,
    coefficients: Model = "default",
    seed: Seed = 0,
    json_out: Json = None,
) -> None:
    """Predict one step by component beside its floor (--batch, --prefill), or the latencies of a load (--rate).

    Examples: stepcal predict --architecture llama-2-7b --accelerator h100-sxm --batch 32 --context 1000;
    stepcal predict --architecture llama-2-7b --accelerator h100-sxm --rate 5 --input-len 500 --output-len 200
    """
    from stepcal.experiments.options import deployment_from
    from stepcal.servers.capacity import Server
    from stepcal.servers.coefficient_file import load_known
    from stepcal.servers.predict import predict_load, predict_step, step_batch
    from stepcal.servers.validity import deployment_outside

    release, assumed = _release(vllm_version)
    options = server_options(
        architecture,
        accelerator,
        tp,
        kv_blocks,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        enable_prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        vllm_version=release,
    )
    if like is not None and vllm_version is None:
        options, assumed = {**options, "vllm_version": None}, []  # as the folder says
    served, known = deployment_from(options, like), load_known(coefficients)
    beyond = deployment_outside(served.deployment, known.validity)
    of_kernels = known.coefficients.notes(served.deployment)
    notes = [*served.notes, *assumed, *of_kernels, *(f"extrapolated: {text}" for text in beyond)]
    if rate is None:
        step = predict_step(known.coefficients, served.deployment, step_batch(prefill, context, batch))
        lines = [f"{step.total_us:,.0f} us a step; floor by the datasheet's memory bandwidth {step.floor_us:,.0f} us"]
        lines += [
            f"  {name:<20}{value:>12,.1f} us {100 * value / step.total_us:>5.1f}%"
            for name, value in step.components_us.items()
        ]
        emit({**asdict(step), "notes": notes}, json_out, "\n".join([*lines, *_notes(notes)]))
        return
    load = _load(like, options, input_len, output_len, prefix_len, requests, seed)
    sd = known.log_sd_on(served.deployment.accelerator.name)
    found = predict_load(Server.of(known.coefficients, served.deployment), load, _positive(rate), log_sd=sd)
    lines = [f"at {rate:g} requests/s (ms), [if every step is faster or slower by 1.96 x {100 * sd:.0f}%]"]
    for metric, values in found["latencies_ms"].items():
        cells = (_interval(found, metric, statistic) for statistic in values)
        lines.append(
            f"  {metric:<6}" + "".join(f"{name:>6} {cell:<28}" for name, cell in zip(values, cells, strict=True))
        )
    emit(
        {**found, "log_sd": sd, "error_source": known.error_source, "notes": notes},
        json_out,
        "\n".join([*lines, *_notes(notes)]),
    )


def compare(
    a: Annotated[str, typer.Argument(help="GPU or GPU:TP, or coefficients by name or file.")],
    b: Annotated[str, typer.Argument(help="The other one, of the same kind.")],
    rate: Annotated[float, typer.Option("--rate", help="Requests a second.")],
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
    input_len: InputLen = None,
    output_len: OutputLen = None,
    prefix_len: PrefixLen = 0,
    like: Like = None,
    requests: Requests = 2_000,
    coefficients: Model = "default",
    seed: Seed = 0,
    json_out: Json = None,
) -> None:
    """Serve the same requests at the same times in two ways: two GPUs, two degrees, or two sets of coefficients.

    Example: stepcal compare h100-sxm:1 a100-80gb:2 --architecture llama-2-7b --rate 4 --input-len 500 --output-len 200
    """
    from stepcal.servers.predict import compare_servers

    release, assumed = _release(vllm_version)
    options = server_options(
        architecture,
        accelerator,
        tp,
        kv_blocks,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        enable_prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        vllm_version=release,
    )
    (one, first), (two, second) = _side(a, options, coefficients), _side(b, options, coefficients)
    load = _load(like, options, input_len, output_len, prefix_len, requests, seed)
    found = compare_servers(one, two, load, _positive(rate))
    lines = [f"{'ms':<6}{'':<6}{a:>20}{b:>20}{'ratio':>8}"]
    for metric, values in found["a"].items():
        for name, value in values.items():
            other, ratio = found["b"][metric][name], found["b_over_a"][metric][name]
            cells = "".join(f"{'-' if v is None else format(v, ',.1f'):>20}" for v in (value, other))
            lines.append(f"{metric:<6}{name:<6}{cells}{'-' if ratio is None else format(ratio, '.3f'):>8}")
    lines.append(f"{100 * found['share_faster']:.1f}% of requests end sooner with {b}")
    notes = [*assumed, *(note for note in first if note in second)]
    notes += [
        f"{name}: {note}"
        for name, own, other in ((a, first, second), (b, second, first))
        for note in own
        if note not in other
    ]
    emit({**found, "notes": notes}, json_out, "\n".join([*lines, *_notes(notes)]))


def plan(
    target: Annotated[
        list[str], typer.Option("--target", help="Such as `ttft.p90<=500ms`; may be given several times.")
    ],
    architecture: Architecture = None,
    rate: Rate = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    prefix_len: PrefixLen = 0,
    like: Like = None,
    goodput: Annotated[
        float | None, typer.Option("--goodput", help="Share of requests that must keep every target by themselves.")
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option("--gpu", help="GPU to consider; default: all that ship.")] = None,
    tp: Annotated[list[int] | None, typer.Option("--tp", help="Degree to consider; default: 1, 2, 4, 8.")] = None,
    prices: Annotated[
        Path | None,
        typer.Option("--prices", help="CSV: accelerator, price_per_h of one GPU. Default: GPUs are counted."),
    ] = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxModelLen = None,
    enable_prefix_caching: PrefixCaching = None,
    kv_cache_dtype: KvCacheDtype = None,
    vllm_version: VllmVersion = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write cost against rate as PNG to this file.")] = None,
    requests: Requests = 2_000,
    coefficients: Model = "default",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Choices that are simulated at once.")] = 1,
    dask: Annotated[
        str | None, typer.Option("--dask", help="Simulate on this Dask cluster, tcp://HOST:PORT, instead.")
    ] = None,
    seed: Seed = 0,
    json_out: Json = None,
) -> None:
    """Find the cheapest GPUs, degree and replicas that serve a rate within targets; without --rate, the largest rates.

    Example: stepcal plan --architecture llama-2-7b --rate 20 --input-len 500 --output-len 200 --target "ttft.p90<=300ms"
    --target "tpot.mean<=30ms" --prices prices.csv
    """
    from stepcal.servers.coefficient_file import load_known
    from stepcal.servers.plan import DEGREES, Question, read_prices
    from stepcal.servers.plan import plan as make_plan
    from stepcal.servers.plan_text import pareto_png, pareto_text, plan_table
    from stepcal.servers.targets import goal_of

    if plot is not None:
        refuse_unwritable(plot)
    goal = goal_of(target, goodput)
    known = load_known(coefficients)
    release, assumed = _release(vllm_version)
    options = server_options(
        architecture,
        None,
        None,
        None,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        enable_prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        vllm_version=release,
    )
    options = {k: v for k, v in options.items() if k not in ("accelerator", "tensor_parallel_size")}
    first = {**options, "accelerator": (gpu or ["h100-sxm"])[0]}
    load = _load(like, first, input_len, output_len, prefix_len, requests, seed)
    price = {} if prices is None else read_prices(prices)
    question = Question(options, load, goal, None if rate is None else _positive(rate), price)
    choices, left_out = make_plan(question, known, gpus=gpu or (), degrees=tp or DEGREES, jobs=jobs, dask=dask)
    if plot is not None:
        write_bytes_atomically(plot, pareto_png(choices))
    result: dict[str, Any] = {
        "targets": [str(t) for t in goal.targets],
        "goodput": goodput,
        "rate_per_s": rate,
        "coefficients": coefficients,
        "error_source": known.error_source,
        "choices": [c.row() for c in choices],
        "left_out": left_out,
        "notes": assumed,
    }
    emit(result, json_out, "\n".join([plan_table(choices, left_out), *_notes(assumed), pareto_text(choices)]))


def _positive(rate: float) -> float:
    if not 0 < rate < float("inf"):
        raise InputError(f"`--rate` is {rate}; it must be above 0 requests a second.")
    return rate


def _load(
    like: Path | None,
    options: dict[str, Any],
    input_len: int | None,
    output_len: int | None,
    prefix_len: int,
    requests: int,
    seed: int,
) -> Any:
    from stepcal.servers.load import PlannedLoad
    from stepcal.servers.log import read_logs

    if like is not None:
        return PlannedLoad.like(read_logs(like, options)[0], n_requests=requests, seed=seed)
    if input_len is None or output_len is None:
        raise InputError(
            "How long requests are is not said: give `--input-len` and `--output-len`, or `--like FOLDER`."
        )
    return PlannedLoad.of_lengths(
        input_len, output_len, n_requests=requests, shared_prefix_tokens=prefix_len, seed=seed
    )


def _side(text: str, options: dict[str, Any], coefficients: str) -> Any:
    """A server from ``GPU``, ``GPU:TP`` or coefficients, and notes on it."""
    from stepcal.experiments.options import deployment_from
    from stepcal.servers.capacity import Server
    from stepcal.specs.hardware import accelerators
    from stepcal.step_time.coefficients import load_coefficients

    gpu, _, degree = text.partition(":")
    own = options
    if gpu in accelerators():
        if degree and not degree.isdigit():
            raise InputError(f"`{text}`: `{degree}` is no tensor-parallel degree. Write GPU:TP, such as h100-sxm:2.")
        own = {**options, "accelerator": gpu} | ({"tensor_parallel_size": int(degree)} if degree else {})
        text = coefficients
    model, served = load_coefficients(text), deployment_from(own)
    return Server.of(model, served.deployment), [*served.notes, *model.notes(served.deployment)]


def _release(given: str | None) -> tuple[str, list[str]]:
    """The release of vLLM to predict, and a note where it was not said."""
    from stepcal.simulator.versions import NEWEST

    if given is not None:
        return given, []
    return NEWEST, [f"`--vllm-version` is not given; {NEWEST}, the newest that was recorded, was assumed."]


def _interval(found: dict[str, Any], metric: str, statistic: str) -> str:
    values = [found[k][metric][statistic] for k in ("latencies_ms", "low_ms", "high_ms")]
    if any(v is None for v in values):
        return "-"
    return f"{values[0]:,.1f} [{values[1]:,.1f}, {values[2]:,.1f}]"


def _notes(notes: list[str]) -> list[str]:
    return [f"  note: {note}" for note in notes]
