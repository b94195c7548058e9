"""``stepcal design``: half an hour of load that would determine what one's logs have not, and the intervals to expect.

Candidates are stages of one length and one batch size. Each adds ``J' J`` to the information, `J` the whitened derivative of
its mean time per output token and TTFT by the logarithms of the parameters (closed loop, by simulation); stages are chosen
one after another by what they add to the log determinant (D-optimality), together with the priors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.calibration import (
    DETERMINED_SHRINKAGE,
    DIFFERENCE_STEP,
    parameters_that_act,
)
from stepcal.servers.capacity import NORMAL_95, Server
from stepcal.servers.inference.blocks import BLOCK_LOG_SD
from stepcal.servers.inference.error_model import FACTOR_LOG_STEP, STAGE_ERRORS
from stepcal.servers.load import PlannedLoad
from stepcal.servers.predict import step_batch
from stepcal.servers.replay import with_values
from stepcal.simulator.steptime import add_components
from stepcal.specs.deployment import Deployment
from stepcal.step_time.attention_kinds import with_window
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.physical_parameters import LearnedParameter
from stepcal.units import US_PER_S, FloatArray

LENGTHS = ((64, 32), (128, 512), (512, 256), (1_024, 128), (2_000, 16), (2_000, 512))
"""Prompt and output tokens of candidate stages: prefill alone, decode alone, short and long contexts."""
BATCHES = (1, 8, 32, 96)
"""Requests in flight that a candidate's rate is chosen for, by Little's law."""
TOTAL_S, STAGES = 1_800.0, 6
SIMULATED_REQUESTS = 300


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe."""

    rate_per_s: float
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    in_flight: int

    @property
    def n_requests(self) -> int:
        """Requests that are sent."""
        return max(int(self.rate_per_s * self.duration_s), 1)


@dataclass(frozen=True)
class Expected:
    """Interval of a parameter to expect from a recipe, as factors on its value."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    prior_low: float
    prior_high: float
    is_determined: bool
    gains: float


@dataclass(frozen=True)
class Design:
    """A recipe and what it would tell."""

    stages: tuple[Stage, ...]
    expected: tuple[Expected, ...]


def design(
    coefficients: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    deployment: Deployment,
    *,
    known_log_sd: dict[str, float] | None = None,
    n_stages: int = STAGES,
    total_s: float = TOTAL_S,
    seed: int = 0,
) -> Design:
    """Choose stages of load.

    Parameters
    ----------
    coefficients : StepTimeModel
        What is believed so far.
    parameters : sequence of LearnedParameter
    deployment : Deployment
    known_log_sd : dict, optional
        Spread of the logarithm of parameters that logs have told already; by default the priors'.
    n_stages : int
    total_s : float
    seed : int

    Returns
    -------
    Design

    Raises
    ------
    InputError
        If no parameter acts on this server, or no candidate fits into its limits.
    """
    acting = parameters_that_act([deployment], coefficients, parameters)
    if not acting:
        raise InputError("No parameter of the model changes anything on this server: there is nothing to design for.")
    spread = np.array([(known_log_sd or {}).get(p.name, p.prior_log_sd) for p in acting])
    candidates = _candidates(coefficients, deployment, total_s / n_stages)
    if not candidates:
        raise InputError(
            f"No stage fits into `max_model_len` {deployment.limits.max_model_len} of this server. Raise it, or design for "
            "another."
        )
    jacobians = [_jacobian(coefficients, deployment, acting, spread, stage, seed) for stage in candidates]
    information = np.diag(spread**-2)
    chosen: list[int] = []
    for _ in range(n_stages):
        gains = [float(np.linalg.slogdet(information + j.T @ j)[1]) for j in jacobians]
        best = int(np.argmax(gains))
        chosen.append(best)
        information = information + jacobians[best].T @ jacobians[best]
    posterior = np.sqrt(np.diag(np.linalg.inv(information)))
    expected = tuple(_expected(p, coefficients, s, t) for p, s, t in zip(acting, spread, posterior, strict=True))
    return Design(tuple(candidates[i] for i in sorted(chosen, key=lambda i: candidates[i].rate_per_s)), expected)


def _expected(p: LearnedParameter, coefficients: StepTimeModel, prior: float, posterior: float) -> Expected:
    value = coefficients.values[p.name]
    wide, narrow = float(np.exp(NORMAL_95 * prior)), float(np.exp(NORMAL_95 * posterior))
    return Expected(
        p.name,
        value,
        p.unit,
        value / narrow,
        value * narrow,
        value / wide,
        value * wide,
        posterior / p.prior_log_sd < DETERMINED_SHRINKAGE,
        1.0 - posterior / prior,
    )


def _candidates(coefficients: StepTimeModel, deployment: Deployment, duration_s: float) -> list[Stage]:
    step_time, limits = coefficients.compile(deployment), deployment.limits
    stages = []
    for prompt, output in LENGTHS:
        if prompt + output > limits.max_model_len:
            continue
        for batch in BATCHES:
            if batch > limits.max_num_seqs or batch * (prompt + output) > limits.usable_blocks * limits.block_size:
                continue
            decode_us = add_components(step_time(with_window(step_batch(0, prompt + output // 2, batch), deployment)))
            chunk = min(prompt, limits.max_num_batched_tokens)
            prefill_us = add_components(step_time(with_window(step_batch(chunk, 0, 0), deployment))) * prompt / chunk
            # Each request holds the batch for its output, and every other request's prefill interrupts it.
            rate = batch / ((decode_us * output + batch * prefill_us) / US_PER_S)
            stages.append(Stage(float(f"{rate:.3g}"), duration_s, prompt, output, batch))
    return stages


def _jacobian(
    coefficients: StepTimeModel,
    deployment: Deployment,
    parameters: Sequence[LearnedParameter],
    spread: FloatArray,
    stage: Stage,
    seed: int,
) -> FloatArray:
    """Whitened derivatives of a stage's two figures, shape (2, n_parameters)."""
    load = PlannedLoad.of_lengths(
        stage.prompt_tokens,
        stage.output_tokens,
        n_requests=min(max(stage.n_requests, 30), SIMULATED_REQUESTS),
        seed=seed,
    )

    def figures(values: dict[str, float], log_factor: float = 0.0) -> FloatArray:
        server = Server.of(with_values(coefficients, values), deployment).slower(float(np.exp(log_factor)))
        latencies = server.latencies_ms(load, stage.rate_per_s)
        return np.log([np.nanmean(latencies[name]) for name in BLOCK_LOG_SD])

    columns = []
    for p, sd in zip(parameters, spread, strict=True):
        step = min(DIFFERENCE_STEP, sd / 2)
        value = coefficients.values[p.name]
        up, down = (figures({p.name: value * float(np.exp(s))}) for s in (step, -step))
        columns.append((up - down) / (2 * step))
    error = STAGE_ERRORS[coefficients.variant]
    slopes = (figures({}, FACTOR_LOG_STEP) - figures({}, -FACTOR_LOG_STEP)) / (2 * FACTOR_LOG_STEP)
    covariance = np.diag([sd**2 for sd in BLOCK_LOG_SD.values()]) + error.step_log_sd**2 * np.outer(slopes, slopes)
    covariance += error.ttft_log_sd**2 * np.diag([float(name == "ttft") for name in BLOCK_LOG_SD])
    return np.asarray(np.linalg.solve(np.linalg.cholesky(covariance), np.column_stack(columns)), dtype=np.float64)


def vllm_bench_script(recipe: Design, model: str) -> str:
    """Return a shell script of ``vllm bench serve`` calls, a result file a stage."""
    lines = [
        "#!/bin/sh",
        "# Stages of load that `stepcal design` chose; a result file each.",
        "set -eu",
        "mkdir -p results",
    ]
    for i, s in enumerate(recipe.stages):
        lines.append(
            f"vllm bench serve --backend openai --model {model} --dataset-name random --random-input-len {s.prompt_tokens} "
            f"--random-output-len {s.output_tokens} --ignore-eos --num-prompts {s.n_requests} "
            f"--request-rate {s.rate_per_s:g} --seed {i} --save-result --save-detailed --result-dir results "
            f"--result-filename stage-{i}.json"
        )
    return "\n".join([*lines, ""])


def guidellm_script(recipe: Design, model: str) -> str:
    """Return a shell script of GuideLLM calls (options of 0.8), a result file a stage."""
    lines = [
        "#!/bin/sh",
        "# Stages of load that `stepcal design` chose; a result file each.",
        "set -eu",
        "mkdir -p results",
    ]
    for i, s in enumerate(recipe.stages):
        lines.append(
            f"guidellm run --backend kind=openai_http,target=http://localhost:8000,model={model} "
            f"--profile kind=poisson,rate={s.rate_per_s:g} --constraint kind=max_requests,count={s.n_requests} "
            f"--data kind=synthetic_text,prompt_tokens={s.prompt_tokens},output_tokens={s.output_tokens} "
            f"--output kind=json,path=results/guidellm-stage-{i}.json"
        )
    return "\n".join([*lines, ""])


def inference_perf_config(stage: Stage, model: str) -> dict[str, Any]:
    """Return the ``config.yaml`` of inference-perf for one stage: lengths belong to a run there (unverified format)."""
    return {
        "load": {"type": "poisson", "stages": [{"rate": stage.rate_per_s, "duration": int(stage.duration_s)}]},
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": model, "base_url": "http://localhost:8000", "ignore_eos": True},
        "data": {
            "type": "random",
            "input_distribution": _fixed(stage.prompt_tokens, stage.n_requests),
            "output_distribution": _fixed(stage.output_tokens, stage.n_requests),
        },
        "report": {"request_lifecycle": {"summary": True, "per_stage": True, "per_request": True}},
    }


def _fixed(tokens: int, count: int) -> dict[str, int]:
    return {"min": tokens, "max": tokens, "mean": tokens, "std_dev": 0, "total_count": count}
