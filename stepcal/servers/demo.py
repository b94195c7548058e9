"""A demo data set: what a load generator would have written of a simulated server, with a known truth.

The server differs from the shipped model by known factors and by an error of each block of time, as real ones do; the files
are those of ``vllm bench serve --save-detailed``, so that a tutorial starts where a user does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stepcal.errors import InputError
from stepcal.experiments.options import deployment_from
from stepcal.files import write_atomically
from stepcal.servers.inference.blocks import BLOCK_LOG_SD, blocks_of, figures_of
from stepcal.servers.inference.error_model import StageError, factor_slopes
from stepcal.servers.log import ServedLog, summarise
from stepcal.servers.replay import replayed_latencies_s, with_values
from stepcal.simulator import LoadStage, RequestList, empirical_lengths, generate_arrivals
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.units import FloatArray

DEMO_SERVER = {
    "architecture": "llama-2-7b",
    "accelerator": "h100-sxm",
    "tensor_parallel_size": 1,
    "kv_blocks": 7_000,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2_048,
    "max_model_len": 4_096,
}
"""Server of the demo: a model and a GPU that ship."""
DEMO_FACTORS = {"attention_scale": 0.9, "api_before_us": 0.5}
"""How its truth differs from the shipped model."""
DEMO_RATES_PER_S, DEMO_STAGE_S = (2.0, 4.0, 6.0, 8.0), 120.0
_LENGTHS = {"prompt": (64, 1_536), "output": (32, 400)}


@dataclass(frozen=True)
class Load:
    """What is sent: stages of load, and the ranges of prompt and output lengths (uniform)."""

    stages: tuple[LoadStage, ...]
    prompt_tokens: tuple[int, int] = _LENGTHS["prompt"]
    output_tokens: tuple[int, int] = _LENGTHS["output"]


def requests_of_load(load: Load, *, seed: int) -> RequestList:
    """Draw requests: Poisson arrivals, lengths from uniform ranges, each prompt a text of its own."""
    arrival_s, stage = generate_arrivals(load.stages, "poisson", seed=seed)
    n = len(arrival_s)
    order = np.arange(n)
    prompt = empirical_lengths(n, np.arange(load.prompt_tokens[0], load.prompt_tokens[1] + 1), seed=seed + 1)
    output = empirical_lengths(n, np.arange(load.output_tokens[0], load.output_tokens[1] + 1), seed=seed + 2)
    return RequestList(
        arrival_s=arrival_s,
        prompt=order.astype(np.int32),
        prompt_start=np.arange(n + 1),
        segment_content=order,
        segment_tokens=prompt.astype(np.int64),
        output_tokens=output,
        stage=stage,
    )


def simulated_log(
    deployment: Deployment,
    truth: StepTimeModel,
    load: Load,
    *,
    seed: int,
    block_log_sd: Mapping[str, float] = BLOCK_LOG_SD,
    stage_error: StageError | None = None,
    run: str = "simulated",
) -> ServedLog:
    """Return the log of a simulated server whose blocks of time, and stages of load, err by known standard deviations.

    Parameters
    ----------
    deployment : Deployment
    truth : StepTimeModel
    load : Load
    seed : int
    block_log_sd : mapping
        Of `tpot` and `ttft`; zeros for a server that is the model exactly.
    stage_error : StageError, optional
        Errors of stages, as a calibration expects them of real servers; by default there are none.
    run : str
    """
    requests = requests_of_load(load, seed=seed)
    nothing = summarise(np.full(len(requests), np.nan), np.full(len(requests), np.nan), requests.output_tokens, 0)
    log = ServedLog(run, deployment, requests, None, None, nothing)
    e2e, ttft = replayed_latencies_s(log, truth)
    exact = replace(log, e2e_s=e2e, ttft_s=ttft)
    everything = np.ones(len(requests), dtype=bool)
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    decode = e2e - ttft
    for block in blocks_of([exact], [everything]):
        decode[block.chosen] *= np.exp(rng.normal() * block_log_sd["tpot"])
        ttft[block.chosen] *= np.exp(rng.normal() * block_log_sd["ttft"])
    if stage_error is not None:
        stages = blocks_of([exact], [everything], 1)
        slopes = factor_slopes([exact], stages, truth)
        step, first = rng.normal(size=(2, len(stages))) * [[stage_error.step_log_sd], [stage_error.ttft_log_sd]]
        for (block, name), slope in zip(figures_of(stages), slopes, strict=True):
            i = stages.index(block)
            (decode if name == "tpot" else ttft)[block.chosen] *= np.exp(slope * step[i] + (name == "ttft") * first[i])
    return _with_latencies(log, decode + ttft, ttft)


def _with_latencies(log: ServedLog, e2e: FloatArray, ttft: FloatArray) -> ServedLog:
    return replace(log, e2e_s=e2e, ttft_s=ttft, summaries=summarise(e2e, ttft, log.requests.output_tokens, log.stage))


def demo_truth() -> StepTimeModel:
    """Return the coefficients of the demo's server."""
    shipped = load_coefficients("default")
    return with_values(shipped, {name: shipped.values[name] * factor for name, factor in DEMO_FACTORS.items()})


def write_demo(
    out: Path, *, rates_per_s: Sequence[float] = DEMO_RATES_PER_S, stage_s: float = DEMO_STAGE_S, seed: int = 0
) -> list[Path]:
    """Write the demo: a result file of a load generator for each rate, and the server's settings.

    Parameters
    ----------
    out : Path
        Folder to make.
    rates_per_s : sequence of float
        A run each.
    stage_s : float
    seed : int

    Returns
    -------
    list of Path
        The result files.

    Raises
    ------
    InputError
        If the folder cannot be made.
    """
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make {out}: {error.strerror}. Choose a folder whose parent exists.") from None
    deployment, truth = deployment_from(DEMO_SERVER).deployment, demo_truth()
    files = []
    for i, rate in enumerate(rates_per_s):
        load = Load((LoadStage(rate, stage_s / 2), LoadStage(1.2 * rate, stage_s / 2)))
        log = simulated_log(deployment, truth, load, seed=seed + 10 * i)
        path = out / f"bench-{rate:g}-per-s.json"
        write_atomically(path, json.dumps(_bench_document(log, rate)) + "\n")
        files.append(path)
    settings = {**DEMO_SERVER, "model": DEMO_SERVER["architecture"], "gpu": DEMO_SERVER["accelerator"]}
    lines = [f"{k}: {v}" for k, v in settings.items() if k not in ("architecture", "accelerator")]
    write_atomically(out / "exp-config.yaml", "\n".join(lines) + "\n")
    return files


def _bench_document(log: ServedLog, rate: float) -> dict[str, object]:
    """The log as ``vllm bench serve --save-detailed`` writes one, an event a token, token gaps even."""
    e2e = np.zeros(0) if log.e2e_s is None else log.e2e_s
    ttft = np.zeros(0) if log.ttft_s is None else log.ttft_s
    output = np.asarray(log.requests.output_tokens, dtype=int)
    gaps = (e2e - ttft) / np.maximum(output - 1, 1)
    return {
        "date": "20260101-000000",
        "endpoint_type": "openai",
        "backend": "openai",
        "model_id": "demo",
        "tokenizer_id": "demo",
        "num_prompts": len(output),
        "request_rate": rate,
        "max_concurrency": None,
        "completed": len(output),
        "input_lens": np.asarray(log.requests.prompt_tokens, dtype=int).tolist(),
        "output_lens": output.tolist(),
        "ttfts": ttft.tolist(),
        "itls": [[round(float(g), 6)] * int(n - 1) for g, n in zip(gaps, output, strict=True)],
        "latencies": e2e.tolist(),
        "start_times": log.requests.arrival_s.tolist(),
        "errors": [""] * len(output),
    }
