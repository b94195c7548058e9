"""Learns the physical model's numbers where the truth is: from decode intervals, from simulated latencies, or both.

Every level minimises ``sum((log predicted - log measured)^2 / sigma^2) + sum((log theta - log prior)^2 / tau^2)`` over
the logarithms of the numbers, on the first 60% of each experiment's arrivals; requests in flight at the boundary are
dropped. `sigma` is what the model is expected to miss, not the noise of a mean over thousands of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares
from threadpoolctl import threadpool_limits

from stepcal.end_to_end import Experiment
from stepcal.errors import InputError
from stepcal.physical import (
    PhysicalFeatures,
    PhysicalModel,
    physical_clock,
    physical_features,
)
from stepcal.physical_parameters import API_PARAMETERS, STEP_PARAMETERS, PhysicalParameter
from stepcal.simulator import RequestList, simulate
from stepcal.splits import STUDY_FRACTIONS

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

PARAMETERS = (*STEP_PARAMETERS, *API_PARAMETERS)
N_STEP = len(STEP_PARAMETERS)
US_PER_S = 1e6
SIGMA_INTERVAL = 0.01
"""Error expected of a run's mean step time."""
SIGMA_LATENCY = {"e2e": 0.01, "tpot": 0.01, "ttft": 0.05}
"""Errors expected of a stage's means where requests do not queue."""
SIGMA_OVERLOADED = {"e2e": 0.05, "tpot": 0.02, "ttft": 0.05, "completed": 0.05}
"""In an overloaded run 1% of step time is 5% of the queue's length."""
ROBUST_SIGMAS = 2.0
"""Errors beyond this many sigmas count linearly (Huber 1964, doi:10.1214/aoms/1177703732)."""
MISSING_RESIDUAL = 30.0
"""Residual where a simulation completes nothing that was measured."""
DIFFERENCE_STEP = 4e-3
"""Step of finite differences in the logarithm: well above the jitter of single requests changing batches."""
CONVERGED = 1e-3
MAX_EVALUATIONS = 12
EFFECTIVE_REQUESTS = 400
"""Rows an experiment contributes to a request-level fit: a systematic sample; neighbours share their batch anyway."""


@dataclass(frozen=True)
class RequestLevel:
    """Decode intervals of some experiments and the features of their mean steps, in order of experiment and arrival."""

    rows: pd.DataFrame
    features: PhysicalFeatures

    def subset(self, mask: BoolArray) -> RequestLevel:
        """Return some of the requests."""
        return RequestLevel(self.rows[mask].reset_index(drop=True), self.features.rows(mask))


@dataclass(frozen=True)
class Target:
    """Measured training figures of one stage of one experiment, and which requests they are means over."""

    stage: int
    chosen: BoolArray
    values: dict[str, float]


@dataclass(frozen=True)
class Run:
    """An experiment ready to be simulated again and again: its requests laid out, its training targets taken."""

    experiment: Experiment
    requests: RequestList
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Calibration:
    """Learned numbers and what they rest on.

    Attributes
    ----------
    theta : ndarray, shape (n_parameters,)
        In the order of `PARAMETERS`.
    residuals, jacobian : ndarray
        Whitened, data rows first, prior rows last; the Jacobian is by ``log(theta)``.
    labels : tuple of (str, ...)
        Experiment of each data row.
    n_evaluations : int
    level : str
    """

    theta: FloatArray
    residuals: FloatArray
    jacobian: FloatArray
    labels: tuple[str, ...]
    n_evaluations: int
    level: str
    parameters: tuple[PhysicalParameter, ...] = field(default=PARAMETERS)

    @property
    def values(self) -> dict[str, float]:
        """Value of each number by name."""
        return {p.name: float(v) for p, v in zip(self.parameters, self.theta, strict=True)}


def request_level(intervals: pd.DataFrame, experiments: Sequence[Experiment]) -> RequestLevel:
    """Build the features of each request's mean step.

    Parameters
    ----------
    intervals : DataFrame
        Of `stepcal.reconstruction.decode_intervals`.
    experiments : sequence of Experiment

    Returns
    -------
    RequestLevel
    """
    rows, parts = [], []
    for experiment in experiments:
        own = intervals[intervals["experiment_id"] == experiment.experiment_id]
        requests = experiment.arrivals("replayed")
        stage_of = pd.Series(np.asarray(requests.stage), index=np.asarray(requests.index))
        prefill = own["prefill_tokens"].to_numpy(dtype=float)
        parts.append(
            physical_features(
                experiment.architecture,
                experiment.accelerator,
                tensor_parallel=experiment.tensor_parallel,
                decode_requests=own["batch"].to_numpy(dtype=float),
                kv_tokens=own["kv_tokens"].to_numpy(dtype=float),
                prefill_tokens=prefill,
                prefill_requests=own["prefill_requests"].to_numpy(dtype=float),
                prefill_kv_tokens=own["prefill_requests"].to_numpy(dtype=float)
                * own["prompt_tokens"].to_numpy(dtype=float),
                waiting=own["waiting"].to_numpy(dtype=float),
                max_num_seqs=experiment.server.max_num_seqs,
            )
        )
        rows.append(
            own.assign(
                overloaded=experiment.overloaded,
                model=experiment.architecture.name,
                stage=stage_of.reindex(own["index"]).to_numpy(),
            )
        )
    return RequestLevel(pd.concat(rows, ignore_index=True), PhysicalFeatures.joined(parts))


def training_rows(level: RequestLevel) -> RequestLevel:
    """Return the training requests, thinned evenly to `EFFECTIVE_REQUESTS` an experiment."""
    train = level.rows["split"].to_numpy() == "train"
    keep = np.zeros(len(train), dtype=bool)
    for _, own in level.rows[train].groupby("experiment_id", sort=False):
        keep[own.index[:: max(1, len(own) // EFFECTIVE_REQUESTS)]] = True
    return level.subset(keep)


def prepare_runs(experiments: Sequence[Experiment]) -> list[Run]:
    """Lay out the replayed requests of experiments and take the targets of their training part.

    Raises
    ------
    InputError
        If measured requests are not at hand.
    """
    return [_prepare(experiment) for experiment in experiments]


def _prepare(experiment: Experiment) -> Run:
    requests = experiment.arrivals("replayed")
    table = experiment.requests
    if table is None:
        raise InputError(f"The requests of `{experiment.experiment_id}` are not at hand. Set STEPCAL_DATA.")
    n = len(table)
    n_train = int(np.rint(STUDY_FRACTIONS[0] * n))
    arrival_s = table["arrival_time_us"].to_numpy(dtype=float) / US_PER_S
    e2e, ttft = table["e2e_s"].to_numpy(dtype=float), table["ttft_s"].to_numpy(dtype=float)
    ended = arrival_s + np.where(table["has_error"], experiment.workload.timeout_s, e2e) <= arrival_s[n_train]
    train = (np.arange(n) < n_train) & ended
    stage = np.asarray(requests.stage)
    targets = []
    for s in np.unique(stage[train]):
        own = train & (stage == s)
        done = own & ~table["has_error"].to_numpy(dtype=bool)
        if not done.any():
            continue
        values = {"e2e": e2e[done].mean(), "ttft": ttft[done].mean()}
        values["tpot"] = (e2e[done] - ttft[done]).mean() / (experiment.workload.output_len - 1)
        values["completed"] = float(done.sum())
        targets.append(Target(int(s), own, {k: float(v) for k, v in values.items()}))
    return Run(experiment, requests, tuple(targets))


def run_latencies_s(run: Run, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Simulate a run; return each request's E2E latency and TTFT in seconds, NaN where it did not complete."""
    experiment = run.experiment
    clock = physical_clock(
        theta[:N_STEP],
        experiment.architecture,
        experiment.accelerator,
        experiment.server,
        tensor_parallel=experiment.tensor_parallel,
    )
    result = simulate(
        run.requests,
        experiment.server,
        clock,
        timeout_s=experiment.workload.timeout_s,
        api_before_us=float(theta[N_STEP]),
    )
    e2e = result.e2e_us() / US_PER_S
    return e2e, np.where(np.isnan(e2e), np.nan, result.ttft_us() / US_PER_S)


def stage_means(run: Run, target: Target, e2e: FloatArray, ttft: FloatArray) -> dict[str, float]:
    """Predicted figures of a target, over its requests that complete in the simulation."""
    done = target.chosen & ~np.isnan(e2e)
    if not done.any():
        return {"completed": 0.0}
    tpot = (e2e[done] - ttft[done]).mean() / (run.experiment.workload.output_len - 1)
    return {
        "e2e": float(e2e[done].mean()),
        "ttft": float(ttft[done].mean()),
        "tpot": float(tpot),
        "completed": float(done.sum()),
    }


def workload_residuals(runs: Sequence[Run], theta: FloatArray) -> tuple[FloatArray, list[str]]:
    """Whitened log errors of every stage mean, and the experiment of each."""
    residuals, labels = [], []
    for run in runs:
        e2e, ttft = run_latencies_s(run, theta)
        sigmas = SIGMA_OVERLOADED if run.experiment.overloaded else SIGMA_LATENCY
        for target in run.targets:
            means = stage_means(run, target, e2e, ttft)
            for name, sigma in sigmas.items():
                known = means.get(name, 0.0) > 0
                error = np.log(means[name] / target.values[name]) / sigma if known else MISSING_RESIDUAL
                residuals.append(float(error))
                labels.append(run.experiment.experiment_id)
    return soft(np.array(residuals)), labels


def interval_residuals(level: RequestLevel, theta: FloatArray) -> FloatArray:
    """Whitened log errors of decode intervals; all rows of an experiment together weigh as one figure of it."""
    predicted = PhysicalModel().predict_us(theta[:N_STEP], level.features)
    sigma, share = _interval_scales(level)
    return share * soft(np.log(predicted / level.rows["interval_us"].to_numpy(dtype=float)) / sigma)


def interval_jacobian(level: RequestLevel, theta: FloatArray) -> FloatArray:
    """Derivative of `interval_residuals` by ``log(theta)``, shape (n_requests, n_parameters)."""
    model = PhysicalModel()
    predicted = model.predict_us(theta[:N_STEP], level.features)
    relative = model.gradient_us(theta[:N_STEP], level.features) * theta[:N_STEP] / predicted[:, None]
    sigma, share = _interval_scales(level)
    slope = soft_slope(np.log(predicted / level.rows["interval_us"].to_numpy(dtype=float)) / sigma)
    api = np.zeros((len(relative), len(PARAMETERS) - N_STEP))
    return (share * slope / sigma)[:, None] * np.hstack([relative, api])


def soft(errors: FloatArray) -> FloatArray:
    """Pseudo-Huber residuals: as they are up to `ROBUST_SIGMAS`, their squares linear beyond.

    So a run that the model misses does not bend the rest.
    """
    scaled = errors / ROBUST_SIGMAS
    return np.sign(errors) * ROBUST_SIGMAS * np.sqrt(2.0 * (np.hypot(1.0, scaled) - 1.0))


def soft_slope(errors: FloatArray) -> FloatArray:
    """Derivative of `soft`."""
    scaled = np.abs(errors) / ROBUST_SIGMAS
    height = np.hypot(1.0, scaled)
    small = scaled < 1e-4  # the quotient below is 0 / 0 there
    root = np.sqrt(2.0 * np.where(small, 1.0, height - 1.0))
    return np.where(small, 1.0, scaled / (height * root))


def _interval_scales(level: RequestLevel) -> tuple[FloatArray, FloatArray]:
    """Sigma of each row, and the share of its experiment's weight that it has."""
    sizes = level.rows.groupby("experiment_id")["interval_us"].transform("size").to_numpy(dtype=float)
    sigma = np.where(level.rows["overloaded"], SIGMA_OVERLOADED["tpot"], SIGMA_INTERVAL)
    return sigma, 1.0 / np.sqrt(sizes)


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def calibrate(
    *,
    runs: Sequence[Run] = (),
    level: RequestLevel | None = None,
    start: FloatArray | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
) -> Calibration:
    """Fit the numbers at the request level, the workload level, or jointly.

    Parameters
    ----------
    runs : sequence of Run
        Fitted through the simulator; none for a fit at the request level alone.
    level : RequestLevel, optional
        Training rows (`training_rows`); None for a fit at the workload level alone.
    start : ndarray, optional
        Defaults to the priors.
    max_evaluations : int
        Of residuals and Jacobian together; a workload-level Jacobian takes one pass of all runs a number.

    Returns
    -------
    Calibration

    Raises
    ------
    InputError
        If there is nothing to fit.
    """
    if not runs and (level is None or level.rows.empty):
        raise InputError("There is nothing to fit: give `runs`, `level`, or both.")
    priors = np.log([p.start for p in PARAMETERS])
    scale = np.array([p.prior_log_sd for p in PARAMETERS])
    labels: list[str] = []

    def residuals(x: FloatArray) -> FloatArray:
        theta, parts = np.exp(x), []
        labels.clear()
        if runs:
            errors, names = workload_residuals(runs, theta)
            parts.append(errors)
            labels.extend(names)
        if level is not None:
            parts.append(interval_residuals(level, theta))
            labels.extend(level.rows["experiment_id"])
        return np.concatenate([*parts, (x - priors) / scale])

    def jacobian(x: FloatArray) -> FloatArray:
        parts = [_differences(lambda t: workload_residuals(runs, t)[0], x)] if runs else []
        if level is not None:
            parts.append(interval_jacobian(level, np.exp(x)))
        return np.vstack([*parts, np.diag(1.0 / scale)])

    low, high = np.log([[p.low for p in PARAMETERS], [p.high for p in PARAMETERS]])
    first = priors if start is None else np.log(start)
    first = np.clip(first, low + 1e-9, high - 1e-9)
    solution = least_squares(
        residuals,
        first,
        jac=jacobian,
        bounds=(low, high),
        method="trf",
        x_scale=scale,
        loss="linear",
        xtol=CONVERGED,
        ftol=CONVERGED,
        max_nfev=max_evaluations,
    )
    final = residuals(solution.x)
    name = "joint" if runs and level is not None else "workload" if runs else "request"
    return Calibration(np.exp(solution.x), final, solution.jac, tuple(labels), int(solution.nfev), name)


def _differences(function: Callable[[FloatArray], FloatArray], x: FloatArray) -> FloatArray:
    """Forward differences by the logarithm; the step is wide enough for what a simulation jitters."""
    base = function(np.exp(x))
    columns = []
    for j in range(x.size):
        step = np.zeros(x.size)
        step[j] = DIFFERENCE_STEP
        columns.append((function(np.exp(x + step)) - base) / DIFFERENCE_STEP)
    return np.column_stack(columns)
