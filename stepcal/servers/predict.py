"""``stepcal predict`` and ``stepcal compare``: one step by component with its floor, one load, and two ways to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.capacity import NORMAL_95, Server
from stepcal.servers.load import PlannedLoad
from stepcal.servers.targets import METRICS
from stepcal.simulator import StepBatch
from stepcal.simulator.steptime import add_components
from stepcal.specs.deployment import Deployment
from stepcal.specs.step_work import floor_us
from stepcal.step_time.attention_kinds import tokens_read, with_window
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.kernel_model import kernel_components_us
from stepcal.step_time.learned import KERNELS, PHYSICAL
from stepcal.step_time.one_step import check_within_limits
from stepcal.step_time.physical import PhysicalModel, batch_features
from stepcal.units import FloatArray

ROUNDING = 1e-9
"""Share of a step that sums in another order can differ by."""
STATISTICS = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True)
class PredictedStep:
    """One step.

    Attributes
    ----------
    total_us : float
    components_us : dict
        Add up to the total.
    floor_us : float
        Time in which the datasheet's bandwidth moves the step's weights and KV.
    """

    total_us: float
    components_us: dict[str, float]
    floor_us: float


def step_batch(prefill_tokens: int, context_tokens: int, decode_requests: int) -> StepBatch:
    """Build one step: a new prompt of some tokens (0 for none), and requests that decode at one context.

    Raises
    ------
    InputError
        If a count is negative, or the step is empty.
    """
    for name, value in (("prefill", prefill_tokens), ("context", context_tokens), ("batch", decode_requests)):
        if value < 0:
            raise InputError(f"`--{name}` is {value}; a step holds zero or more.")
    if not prefill_tokens and not decode_requests:
        raise InputError("The step is empty: give `--batch`, `--prefill`, or both.")
    chunk = np.array([prefill_tokens] if prefill_tokens else [], dtype=np.int32)
    return StepBatch(chunk, chunk, np.full(decode_requests, context_tokens, dtype=np.int32), 0)


def predict_step(coefficients: StepTimeModel, deployment: Deployment, batch: StepBatch) -> PredictedStep:
    """Predict one step by component.

    Raises
    ------
    InputError
        If the server would never make this step, because it is beyond a limit.
    """
    check_within_limits(batch, deployment.limits)
    batch = with_window(batch, deployment)
    total, read = add_components(coefficients.compile(deployment)(batch)), tokens_read(batch, deployment)
    parts = _components_us(coefficients, deployment, batch, total)
    tokens = np.array([float(batch.prefill_tokens + batch.decode_tokens)])
    kv = np.array([float(read.decode_kv + read.prefill_kv)])
    return PredictedStep(total, parts, float(floor_us(tokens, kv, deployment)[0]))


def _components_us(
    coefficients: StepTimeModel, deployment: Deployment, batch: StepBatch, total: float
) -> dict[str, float]:
    """Components by the model's own names where it has any, else the compiled terms."""
    if coefficients.variant == KERNELS.variant:
        kernels = kernel_components_us(coefficients.values, deployment, batch)
        kernels = {name: value for name, value in kernels.items() if value}
        beyond = total - sum(kernels.values())
        return {**kernels, "host beyond GPU": beyond if beyond > ROUNDING * total else 0.0}
    if coefficients.variant == PHYSICAL.variant:
        found = PhysicalModel().components_us(coefficients.values, batch_features(batch, deployment))
        return {name: float(values[0]) for name, values in found.items() if values[0]}
    answer = coefficients.compile(deployment)(batch)
    parts: Mapping[str, float] = answer if isinstance(answer, Mapping) else {"step": float(answer)}
    return {name: float(value) for name, value in parts.items() if value}


def statistics_ms(latencies_ms: Mapping[str, FloatArray]) -> dict[str, dict[str, float | None]]:
    """Mean and percentiles of each latency, over the requests that completed."""
    result: dict[str, dict[str, float | None]] = {}
    for metric in METRICS:
        here = latencies_ms[metric]
        here = here[~np.isnan(here)]
        values = (
            [float(here.mean()), *np.quantile(here, [0.5, 0.9, 0.99]).tolist()]
            if here.size
            else [None] * len(STATISTICS)
        )
        result[metric] = dict(zip(STATISTICS, values, strict=True))
    return result


def predict_load(server: Server, load: PlannedLoad, rate_per_s: float, *, log_sd: float) -> dict[str, Any]:
    """Predict a load's latencies, with what they become if every step is slower or faster by the model's error.

    Returns
    -------
    dict
        `latencies_ms`, `low_ms`, `high_ms`: metric to statistic to milliseconds.
    """
    factor = float(np.exp(NORMAL_95 * log_sd))
    return {
        "latencies_ms": statistics_ms(server.latencies_ms(load, rate_per_s)),
        "low_ms": statistics_ms(server.slower(1.0 / factor).latencies_ms(load, rate_per_s)),
        "high_ms": statistics_ms(server.slower(factor).latencies_ms(load, rate_per_s)),
    }


def compare_servers(a: Server, b: Server, load: PlannedLoad, rate_per_s: float) -> dict[str, Any]:
    """Serve the same requests at the same times on two servers.

    Returns
    -------
    dict
        `a`, `b`: latencies in ms; `b_over_a`: ratio of the statistics; `share_faster`: of requests whose E2E latency is
        lower on `b`.
    """
    one, two = a.latencies_ms(load, rate_per_s), b.latencies_ms(load, rate_per_s)
    first, second = statistics_ms(one), statistics_ms(two)
    ratio: dict[str, dict[str, float | None]] = {}
    for metric in METRICS:
        pairs = {s: (first[metric][s], second[metric][s]) for s in STATISTICS}
        ratio[metric] = {s: None if x is None or y is None or x == 0 else y / x for s, (x, y) in pairs.items()}
    return {"a": first, "b": second, "b_over_a": ratio, "share_faster": float(np.mean(two["e2e"] < one["e2e"]))}
