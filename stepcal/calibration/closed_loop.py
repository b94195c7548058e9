"""Learns the physical model's parameters where the truth is: from decode intervals, from simulated latencies, or both.

Every level minimises ``sum((log predicted - log measured)^2 / sigma^2) + sum((log value - log prior)^2 / tau^2)`` over
the logarithms of the values, on the first 60% of each experiment's arrivals; requests in flight at the boundary are
dropped. `sigma` is what the model is expected to miss, not the noise of a mean over thousands of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from stepcal.calibration.gauss_newton import minimise, significant
from stepcal.calibration.robust import soft, soft_slope
from stepcal.calibration.training_rows import RequestLevel
from stepcal.datasets.splits import split_starts
from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.simulator import CompiledStepTime, RequestList, simulate
from stepcal.step_time.learned import PHYSICAL, LearnedModel
from stepcal.step_time.physical import PhysicalFeatures, PhysicalModel
from stepcal.step_time.physical_parameters import API_PARAMETERS, PARAMETERS, LearnedParameter, as_array, by_name
from stepcal.threads import each
from stepcal.units import US_PER_S, BoolArray, FloatArray

SIGMA_INTERVAL = 0.01
"""Error expected of a run's mean step time."""
SIGMA_LATENCY = {"e2e": 0.01, "tpot": 0.01, "ttft": 0.05}
"""Errors expected of a stage's means where requests do not queue."""
SIGMA_OVERLOADED = {"e2e": 0.05, "tpot": 0.02, "ttft": 0.05, "completed": 0.05}
"""In an overloaded run 1% of step time is 5% of the queue's length."""
MISSING_RESIDUAL = 30.0
"""Residual where a simulation completes nothing that was measured."""
DIFFERENCE_SHARE = 0.1
"""Steps of central differences, as a share of each parameter's prior standard deviation (0.5% to 10% of its value). A change
of 1e-5 already jitters mean TTFTs by 0.03 of their sigma, as single requests change batches: a derivative over a step of
0.4% held more jitter than slope, and took it for information."""
CONVERGED = 0.1
"""A fit through the simulator is done where a step promises to move it by less than a tenth of a standard deviation."""
CONVERGED_SMOOTH = 1e-7
"""The same at the request level, where nothing jitters."""
MAX_JACOBIANS = 8
CHORD_STEPS = 4
"""Steps on one Jacobian, which costs ten times the residuals."""
MAX_JACOBIANS_SMOOTH = 200


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
    values : dict
        Value of each parameter, by name.
    residuals, jacobian : ndarray
        Whitened, data rows first, prior rows last; the Jacobian is by the logarithms of the values, in the order of
        `parameters`.
    labels : tuple of (str, ...)
        Experiment of each data row.
    n_evaluations : int
        Of the residuals, without those of the Jacobians.
    level : str
    remaining : float
        Length of the step that was not taken, in standard deviations (`stepcal.calibration.gauss_newton.Solution`).
    """

    values: dict[str, float]
    residuals: FloatArray
    jacobian: FloatArray
    labels: tuple[str, ...]
    n_evaluations: int
    level: str
    parameters: tuple[LearnedParameter, ...] = field(default=PARAMETERS)
    remaining: float = 0.0

    @property
    def log_values(self) -> FloatArray:
        """Logarithms of the values in the order of `parameters`, for linear algebra on the Jacobian."""
        return np.log(as_array(self.values, self.parameters))


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
    n_train, _ = split_starts(n)
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


def run_latencies_s(
    run: Run, values: Mapping[str, float], model: LearnedModel = PHYSICAL
) -> tuple[FloatArray, FloatArray]:
    """Simulate a run; return each request's E2E latency and TTFT in seconds, NaN where it did not complete."""
    return _latencies_s(run, model.compile(values, run.experiment.deployment), values)


def _latencies_s(run: Run, step_time: CompiledStepTime, values: Mapping[str, float]) -> tuple[FloatArray, FloatArray]:
    experiment = run.experiment
    result = simulate(
        run.requests,
        experiment.server,
        step_time,
        timeout_s=experiment.workload.timeout_s,
        api_before_us=values["api_before_us"],
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


def workload_residuals(
    runs: Sequence[Run], values: Mapping[str, float], *, model: LearnedModel = PHYSICAL, workers: int = 1
) -> tuple[FloatArray, list[str]]:
    """Whitened log errors of every stage mean, and the experiment of each.

    Parameters
    ----------
    runs : sequence of Run
    values : mapping of str to float
        Parameters by name.
    model : LearnedModel
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    residuals : ndarray, shape (n_residuals,)
    labels : list of str
    """
    parts = each(lambda run: _run_residuals(run, *run_latencies_s(run, values, model)), runs, workers=workers)
    labels = [run.experiment.experiment_id for run, own in zip(runs, parts, strict=True) for _ in own]
    return np.concatenate([np.zeros(0), *parts]), labels


def _run_residuals(run: Run, e2e: FloatArray, ttft: FloatArray) -> FloatArray:
    sigmas = SIGMA_OVERLOADED if run.experiment.overloaded else SIGMA_LATENCY
    residuals = []
    for target in run.targets:
        means = stage_means(run, target, e2e, ttft)
        for name, sigma in sigmas.items():
            known = means.get(name, 0.0) > 0
            error = np.log(means[name] / target.values[name]) / sigma if known else MISSING_RESIDUAL
            residuals.append(float(error))
    return soft(np.array(residuals))


def workload_jacobian(
    runs: Sequence[Run], log_values: FloatArray, *, model: LearnedModel = PHYSICAL, workers: int = 1
) -> FloatArray:
    """Central differences of `workload_residuals` by the logarithms of the values, over `DIFFERENCE_SHARE` of the priors.

    A run is simulated anew only for the parameters that change its step time or its API overhead: no collectives without
    tensor parallelism, no mixture layers in a dense model.

    Parameters
    ----------
    runs : sequence of Run
    log_values : ndarray, shape (n_parameters,)
        In the order of the model's parameters.
    model : LearnedModel
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    ndarray, shape (n_residuals, n_parameters)
    """
    learned = model.parameters
    api = {p.name for p in API_PARAMETERS}
    step_times = [model.compile(_values(log_values, learned), run.experiment.deployment) for run in runs]

    def difference(job: tuple[int, int]) -> FloatArray:
        i, j = job
        step = DIFFERENCE_SHARE * learned[j].prior_log_sd * (np.arange(log_values.size) == j)
        ends = []
        for values in (_values(log_values + step, learned), _values(log_values - step, learned)):
            step_time = model.compile(values, runs[i].experiment.deployment)
            if step_time.same_as(step_times[i]) and learned[j].name not in api:
                return np.zeros(_n_residuals(runs[i]))
            ends.append((values, _run_residuals(runs[i], *_latencies_s(runs[i], step_time, values))))
        (above, there), (below, here) = ends
        return (there - here) / np.log(above[learned[j].name] / below[learned[j].name])

    jobs = [(i, j) for j in range(log_values.size) for i in range(len(runs))]
    parts = each(difference, jobs, workers=workers)
    columns = [parts[j * len(runs) : (j + 1) * len(runs)] for j in range(log_values.size)]
    return np.column_stack([np.concatenate([np.zeros(0), *column]) for column in columns])


def _n_residuals(run: Run) -> int:
    return len(run.targets) * len(SIGMA_OVERLOADED if run.experiment.overloaded else SIGMA_LATENCY)


def _values(log_values: FloatArray, learned: Sequence[LearnedParameter]) -> dict[str, float]:
    """Return values by name, rounded: a simulation makes much of the last bit, in which machines differ."""
    return by_name(significant(np.exp(log_values)), learned)


def interval_residuals(level: RequestLevel, values: Mapping[str, float]) -> FloatArray:
    """Whitened log errors of decode intervals; all rows of an experiment together weigh as one figure of it."""
    predicted = PhysicalModel().predict_us(values, level.features)
    sigma, share = interval_scales(level)
    return share * soft(np.log(predicted / level.rows["interval_us"].to_numpy(dtype=float)) / sigma)


def interval_jacobian(level: RequestLevel, values: Mapping[str, float]) -> FloatArray:
    """Derivative of `interval_residuals` by the logarithm of each of `PARAMETERS`, shape (n_requests, n_parameters)."""
    sigma, share = interval_scales(level)
    predicted = PhysicalModel().predict_us(values, level.features)
    slope = soft_slope(np.log(predicted / level.rows["interval_us"].to_numpy(dtype=float)) / sigma)
    return (share * slope / sigma)[:, None] * log_gradient(values, level.features)


def log_gradient(values: Mapping[str, float], features: PhysicalFeatures) -> FloatArray:
    """Derivative of the log step time by the logarithm of each of `PARAMETERS`, shape (n_steps, n_parameters).

    No step says anything about the parameters around the engine.
    """
    model = PhysicalModel()
    predicted, gradient = model.predict_us(values, features), model.gradient_us(values, features)
    silent = np.zeros(len(features))
    return np.column_stack([gradient.get(p.name, silent) * values[p.name] / predicted for p in PARAMETERS])


def interval_scales(level: RequestLevel) -> tuple[FloatArray, FloatArray]:
    """Sigma of each row, and the share of its experiment's weight that it has."""
    sizes = level.rows.groupby("experiment_id")["interval_us"].transform("size").to_numpy(dtype=float)
    sigma = np.where(level.rows["overloaded"], SIGMA_OVERLOADED["tpot"], SIGMA_INTERVAL)
    return sigma, 1.0 / np.sqrt(sizes)


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def calibrate(
    *,
    runs: Sequence[Run] = (),
    level: RequestLevel | None = None,
    model: LearnedModel = PHYSICAL,
    start: Mapping[str, float] | None = None,
    max_jacobians: int | None = None,
    workers: int = 1,
) -> Calibration:
    """Fit the parameters at the request level, the workload level, or jointly.

    Parameters
    ----------
    runs : sequence of Run
        Fitted through the simulator; none for a fit at the request level alone.
    level : RequestLevel, optional
        Training rows (`training_rows`); None for a fit at the workload level alone. Only the physical model has features
        of rows.
    model : LearnedModel
        What is fitted.
    start : mapping of str to float, optional
        Parameters by name; defaults to the priors.
    max_jacobians : int, optional
        Defaults to `MAX_JACOBIANS` through the simulator and `MAX_JACOBIANS_SMOOTH` without it. A workload-level Jacobian
        simulates each run twice a parameter that touches it.
    workers : int
        Threads that simulate; their number changes no bit of the result. Leave it at 1 where processes fit side by side.

    Returns
    -------
    Calibration

    Raises
    ------
    InputError
        If there is nothing to fit, or rows are given for a model without features of rows.
    """
    if level is not None and model is not PHYSICAL:
        raise InputError(f"`level` holds features of the physical model; `{model.variant}` is fitted to `runs` alone.")
    if not runs and (level is None or level.rows.empty):
        raise InputError("There is nothing to fit: give `runs`, `level`, or both.")
    residuals, jacobian = _objective(runs, level, model, workers)
    learned = model.parameters
    low, high = np.array([[p.low for p in learned], [p.high for p in learned]])
    solution = minimise(
        residuals,
        jacobian,
        np.log([p.start for p in learned] if start is None else as_array(start, learned)),
        (np.log(low), np.log(high)),
        tolerance=CONVERGED if runs else CONVERGED_SMOOTH,
        max_jacobians=max_jacobians or (MAX_JACOBIANS if runs else MAX_JACOBIANS_SMOOTH),
        chord_steps=CHORD_STEPS if runs else 1,
        snap=(lambda x: np.log(significant(np.exp(x)))) if runs else (lambda x: x),
    )
    labels = [run.experiment.experiment_id for run in runs for _ in range(_n_residuals(run))]
    labels += [] if level is None else level.rows["experiment_id"].tolist()
    return Calibration(
        _values(solution.x, learned),
        solution.residuals,
        solution.jacobian,
        tuple(labels),
        solution.n_evaluations,
        "joint" if runs and level is not None else "workload" if runs else "request",
        learned,
        solution.remaining,
    )


def _objective(
    runs: Sequence[Run], level: RequestLevel | None, model: LearnedModel, workers: int
) -> tuple[Callable[[FloatArray], FloatArray], Callable[[FloatArray], FloatArray]]:
    """Whitened residuals by log values, priors last, and their Jacobian."""
    learned = model.parameters
    prior = np.log([p.start for p in learned])
    scale = np.array([p.prior_log_sd for p in learned])

    def values_of(x: FloatArray) -> dict[str, float]:
        return _values(x, learned) if runs else by_name(np.exp(x), learned)

    def residuals(x: FloatArray) -> FloatArray:
        parts = [workload_residuals(runs, values_of(x), model=model, workers=workers)[0]] if runs else []
        if level is not None:
            parts.append(interval_residuals(level, values_of(x)))
        return np.concatenate([*parts, (x - prior) / scale])

    def jacobian(x: FloatArray) -> FloatArray:
        parts = [workload_jacobian(runs, x, model=model, workers=workers)] if runs else []
        if level is not None:
            parts.append(interval_jacobian(level, values_of(x)))
        return np.vstack([*parts, np.diag(1.0 / scale)])

    return residuals, jacobian


def fit_joint(runs: Sequence[Run], rows: RequestLevel, *, workers: int = 1) -> Calibration:
    """Fit both levels, starting from what the request level alone gives (milliseconds of work), on that many threads."""
    return calibrate(runs=runs, level=rows, start=calibrate(level=rows).values, workers=workers)


def _mean_e2e(run: Run, stage: int | None = None) -> float:
    table = run.experiment.requests
    if table is None:  # `prepare_runs` refuses such a run
        return float("nan")
    chosen = ~table["has_error"].to_numpy(dtype=bool)
    if stage is not None:
        chosen &= np.asarray(run.requests.stage) == stage
    return float(table["e2e_s"].to_numpy(dtype=float)[chosen].mean())


def fit_steps(table: pd.DataFrame, features: PhysicalFeatures, experiments: Sequence[Experiment]) -> Calibration:
    """Fit the physical model to the corrected labels of the training steps.

    The steps of an experiment together weigh as one figure of it, as decode intervals do at the request level: the model's
    error is common to them. Numbers that no step tells anything about stay at their priors.

    Parameters
    ----------
    table : DataFrame
        `experiment_id`, `interval_us`, `split` of labelled steps; fitted are those whose split is ``train``.
    features : PhysicalFeatures
        Of `step_features`, a row a row of `table`.
    experiments : sequence of Experiment

    Returns
    -------
    Calibration
        Of level ``step``.

    Raises
    ------
    InputError
        If there is no training step, or features and steps differ in number.
    """
    if len(features) != len(table):
        raise InputError(f"`features` has {len(features)} rows and `table` {len(table)}; give one for each step.")
    train = (table["split"] == "train").to_numpy()
    rows = table.loc[train, ["experiment_id", "interval_us"]].reset_index(drop=True)
    overloaded = {e.experiment_id: e.overloaded for e in experiments}
    rows["overloaded"] = rows["experiment_id"].astype(str).map(overloaded).to_numpy(dtype=bool)
    return replace(calibrate(level=RequestLevel(rows, features.rows(train))), level="step")
