"""A deployment under load, on the clock of a step-time model: what its clients would see."""

from __future__ import annotations

from typing import Any

from stepcal.simulator import Clients, RequestList, SimulationResult, Workload
from stepcal.simulator import simulate as run_engine
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.compile import AnyStepTime


def simulate(
    load: Workload | RequestList,
    deployment: Deployment,
    step_time: StepTimeModel | AnyStepTime,
    *,
    arrivals: str = "poisson",
    cv: float | None = None,
    seed: int = 0,
    clients: Clients | None = None,
    timeout_s: float | None = None,
    api_before_us: float | None = None,
    api_after_us: float | None = None,
    **options: Any,
) -> SimulationResult:
    """Serve a load as the release of vLLM in the deployment's server would.

    Parameters
    ----------
    load : Workload or RequestList
        What is sent: a workload, whose arrivals are drawn, or requests with their own arrivals.
    deployment : Deployment
        What serves it, with its server's limits.
    step_time : StepTimeModel, CompiledStepTime or callable
        How long a step takes. A callable gets each `stepcal.simulator.StepBatch` and returns microseconds. A model knows
        which layers of the deployment read a window; of the other two, `CompiledStepTime.with_windows` and
        `StepBatch.windows` are for that.
    arrivals : str
        Of a workload: ``poisson``, ``constant`` or ``gamma``.
    cv : float, optional
        Coefficient of variation of gamma arrivals.
    seed : int
        Of the arrivals, and of the sample of steps. One seed, one result.
    clients : Clients, optional
        Clients that wait for each other; by default as the workload says.
    timeout_s : float, optional
        How long a client waits, by default as the workload says, else for ever.
    api_before_us, api_after_us : float, optional
        Time between client and engine, in microseconds; by default as the model says, else 0.
    **options
        Passed to `stepcal.simulator.simulate`: `record_steps`, `experiment_id`, `on_progress`.

    Returns
    -------
    SimulationResult
        `summary()` has means and percentiles in milliseconds; `request_table()` a row a request.

    Raises
    ------
    InputError
        If the deployment names no server, a request does not fit it, or the model says nothing of the deployment.

    Examples
    --------
    >>> import stepcal
    >>> server = stepcal.Deployment.of("llama-2-7b", "h100-sxm", kv_blocks=7463)
    >>> load = stepcal.Workload.read("profile.yaml")
    >>> result = stepcal.simulate(load, server, stepcal.StepTimeModel.load("default"), seed=1)
    >>> overall = result.summary()["overall"]
    >>> overall["requests"], overall["completed"]
    (120, 120)
    >>> 100 < overall["e2e_ms"]["mean"] < 1000
    True
    """
    server = deployment.limits
    overheads = {"api_before_us": 0.0, "api_after_us": 0.0}
    if isinstance(step_time, StepTimeModel):
        overheads |= step_time.api_overheads_us()
        step_time = step_time.compile(deployment)
    if isinstance(load, Workload):
        clients = load.clients() if clients is None else clients
        timeout_s = load.timeout_s if timeout_s is None else timeout_s
        load = load.requests(arrivals, cv=cv, seed=seed)
    return run_engine(
        load,
        server,
        step_time,
        clients=clients,
        timeout_s=float("inf") if timeout_s is None else timeout_s,
        api_before_us=overheads["api_before_us"] if api_before_us is None else api_before_us,
        api_after_us=overheads["api_after_us"] if api_after_us is None else api_after_us,
        seed=seed,
        **options,
    )
