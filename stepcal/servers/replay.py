"""A log sent again in a simulation: requests in, latencies out, on the step time of any coefficients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stepcal.servers.capacity import scaled
from stepcal.servers.log import ServedLog
from stepcal.simulator import RequestList, SimulationResult, simulate
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.units import US_PER_S, FloatArray


def simulate_log(
    log: ServedLog, coefficients: StepTimeModel, *, step_factor: float = 1.0, requests: RequestList | None = None
) -> SimulationResult:
    """Simulate a log's requests on its deployment; API overheads are left out where latencies are the engine's own.

    Parameters
    ----------
    log : ServedLog
    coefficients : StepTimeModel
    step_factor : float
        What every step takes longer than the coefficients say.
    requests : RequestList, optional
        Others than the log's own.
    """
    overheads = {} if log.is_engine_side else coefficients.api_overheads_us()
    before, after = overheads.get("api_before_us", 0.0), overheads.get("api_after_us", 0.0)
    step_time = coefficients.compile(log.deployment)
    if step_factor != 1.0:
        step_time = scaled(step_time, step_factor)
    return simulate(
        log.requests if requests is None else requests,
        log.deployment.limits,
        step_time,
        timeout_s=log.timeout_s,
        clients=log.clients,
        api_before_us=before,
        api_after_us=after,
    )


def replayed_latencies_s(
    log: ServedLog, coefficients: StepTimeModel, *, step_factor: float = 1.0, requests: RequestList | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return predicted E2E latency and TTFT of each request in seconds, NaN where it does not complete.

    Parameters
    ----------
    log, coefficients, step_factor, requests
        As `simulate_log` takes them.
    """
    result = simulate_log(log, coefficients, step_factor=step_factor, requests=requests)
    e2e = result.e2e_us() / US_PER_S
    return e2e, np.where(np.isnan(e2e), np.nan, result.ttft_us() / US_PER_S)


def with_values(coefficients: StepTimeModel, values: dict[str, float]) -> StepTimeModel:
    """Return coefficients with some values changed."""
    return replace(coefficients, values={**coefficients.values, **values})
