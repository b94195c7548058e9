"""``stepcal calibrate``: what one server's request logs say of the parameters, with the shipped model as prior.

The log is sent again in the simulator (closed loop), and over blocks of time the errors ``log predicted - log measured``
are compared with those that the model is expected to keep (`stepcal.servers.inference.error_model`). Two questions follow.
*Does the server differ from the prior?* Only parameters that the log speaks for move, the others keep the prior's values
(`stepcal.servers.inference.learning`). *What may each parameter be?* Intervals are of the posterior of all of them together,
around a median of its own; a value outside of it is in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares
from threadpoolctl import threadpool_limits

from stepcal.errors import InputError
from stepcal.servers.inference.blocks import (
    BLOCKS,
    SMALLEST_BLOCK,
    Block,
    blocks_of,
    figures_of,
    log_errors,
    training_mask,
)
from stepcal.servers.inference.error_model import ErrorModel, error_model_at
from stepcal.servers.inference.learning import (
    GPU_SPEED,
    GPU_SPEED_LOG_SD,
    OFF_GPU,
    directions_of,
    learn,
    linear_evidence,
)
from stepcal.servers.inference.posterior import Belief, draw
from stepcal.servers.log import ServedLog
from stepcal.servers.replay import replayed_latencies_s, with_values
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.physical_parameters import LearnedParameter
from stepcal.threads import each
from stepcal.units import BoolArray, FloatArray

DETERMINED_SHRINKAGE = 0.5
"""A parameter is known where its spread given the data is below this share of its prior's."""
TAIL = 0.025
"""Probability beyond each end of a 95% interval."""
DIFFERENCE_STEP = 0.1
"""Largest step of central differences in the logarithm; half the prior's spread where that is less. Single requests that
change batches jitter a block's mean by 1e-4: a step of 4e-3 turned that into information that the data do not hold."""
AT_BOUND = 1.001
"""A value that is nearer to the bound of its search than by this factor is at it."""
NEAR_BOUND = 1.01
"""An interval that ends nearer to a bound than by this factor ends there: draws stop just short of it."""
SMALL_CHANGE = 1e-3
MAX_EVALUATIONS = 12
CONVERGED = 1e-3

NO_ERRORS = ErrorModel((), (), np.zeros(0))


@dataclass(frozen=True)
class ServerCalibration:
    """What was learned of one server.

    Attributes
    ----------
    coefficients : StepTimeModel
        Prior with what was learned in it; the prior itself where nothing was.
    parameters : tuple of LearnedParameter
        All that could be learned; bounds and priors.
    learned : dict
        In what the server differs from the prior, with the factor on the prior's values: single parameters, or
        ``gpu_speed``, all times of the GPU together. Empty where the data agree with the prior within its own error.
    log_odds : float
        Of that against the prior's values, given data and prior odds; 0 where nothing was learned.
    determined : tuple of str
        Parameters that were learned by themselves, and those whose spread the data at least halve.
    draws : ndarray, shape (n_draws, n_parameters)
        Logarithms of the parameters, drawn given data and prior.
    shrinkage : dict
        Spread given the data over the prior's, by name.
    residual_log_sd : dict
        What remains of ``log predicted - log measured`` on the training blocks, by metric.
    error_factor : float
        By how much the model's error by stage seems larger on this server than is expected of it.
    n_blocks : int
    """

    coefficients: StepTimeModel
    parameters: tuple[LearnedParameter, ...]
    learned: dict[str, float]
    log_odds: float
    determined: tuple[str, ...]
    draws: FloatArray
    shrinkage: dict[str, float]
    residual_log_sd: dict[str, float]
    error_factor: float
    n_blocks: int

    @property
    def moved(self) -> tuple[str, ...]:
        """Parameters whose values are not the prior's."""
        along = {d.name: d.column for d in directions_of(self.parameters)}
        is_moved = sum((along[name] for name in self.learned), np.zeros(len(self.parameters))) > 0
        return tuple(p.name for p, moved in zip(self.parameters, is_moved, strict=True) if moved)

    @property
    def in_doubt(self) -> tuple[str, ...]:
        """Parameters whose values lie outside of what all parameters together allow.

        A value comes of as few changes as the odds pay for, an interval of all parameters at once: where the two disagree,
        the logs do not say which change it is, or no change of parameters is what they show.
        """
        limits = ((p.name, *self.interval(p.name)) for p in self.parameters)
        return tuple(name for name, low, high in limits if not low <= self.coefficients.values[name] <= high)

    @property
    def identified(self) -> tuple[str, ...]:
        """Parameters whose values the data determine: `determined`, and not in doubt."""
        return tuple(name for name in self.determined if name not in self.in_doubt)

    def state(self, name: str) -> str:
        """Where a parameter's value comes from, in words: learned, moved with the GPU's speed, or the prior's, and why."""
        if name in self.learned and self._at_bound(self.coefficients.values[name], name, AT_BOUND):
            return "learned, up to its bound: look for a mistake with `stepcal check`"
        if name in self.in_doubt:
            kept = "learned" if name in self.learned else f"moves with {GPU_SPEED}" if name in self.moved else "kept"
            reaches = any(self._at_bound(end, name, NEAR_BOUND) for end in self.interval(name))
            wants = "look for a mistake with `stepcal check`" if reaches else "more stages may tell"
            return f"in doubt: {kept}, but all free it is elsewhere{', at its bound' if reaches else ''}: {wants}"
        if name in self.learned:
            return "learned"
        if name in self.moved:
            return f"moves with {GPU_SPEED}"
        return "as the prior has it" if name in self.determined else "held by the prior"

    def _at_bound(self, value: float, name: str, ratio: float) -> bool:
        """Whether a value is as far as the search goes, but for a ratio."""
        p = next(p for p in self.parameters if p.name == name)
        return not p.low * ratio < value < p.high / ratio

    def free(self, name: str) -> float:
        """Median of a parameter given data and prior, all parameters free: what its interval is around."""
        return float(np.exp(np.median(self._draws_of(name))))

    def interval(self, name: str) -> tuple[float, float]:
        """95% interval of a parameter given data and prior, all parameters free."""
        low, high = np.exp(np.quantile(self._draws_of(name), [TAIL, 1 - TAIL]))
        return float(low), float(high)

    def _draws_of(self, name: str) -> FloatArray:
        return self.draws[:, [p.name for p in self.parameters].index(name)]


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def calibrate_server(
    logs: Sequence[ServedLog],
    prior: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    *,
    masks: Sequence[BoolArray] | None = None,
    n_blocks: int = BLOCKS,
    seed: int = 0,
    workers: int = 1,
) -> ServerCalibration:
    """Learn of one server's parameters what its logs determine.

    Parameters
    ----------
    logs : sequence of ServedLog
        Runs of the same server, or of servers that share the parameters.
    prior : StepTimeModel
        The shipped model; where the fit starts and what is left where the data say nothing.
    parameters : sequence of LearnedParameter
        Bounds and prior spreads.
    masks : sequence of ndarray of bool, optional
        Requests to learn from; by default the first 60% of each run.
    n_blocks : int
    seed : int
        Of the draws.
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    ServerCalibration

    Raises
    ------
    InputError
        If there is nothing to learn from.
    """
    chosen = [training_mask(log) for log in logs] if masks is None else list(masks)
    blocks = blocks_of(logs, chosen, n_blocks)
    if not blocks:
        raise InputError(
            f"No block of {SMALLEST_BLOCK} completed requests in the training part: there is nothing to learn from. Give a "
            "longer run."
        )
    relevant = parameters_that_act(
        [log.deployment for log in logs], prior, parameters, has_api=any(not log.is_engine_side for log in logs)
    )
    problem = _Problem(logs, blocks, prior, tuple(relevant), workers).judged_at(prior)
    start = np.log([prior.values[p.name] for p in relevant])
    belief = Belief.of(relevant, start, gpu_speed(relevant))
    fitted = _fit(problem, belief)
    # How much a figure grows with the step time is asked again where the fit is: the prior may be far from saturation.
    problem = problem.judged_at(with_values(prior, problem.values(fitted)))
    problem = replace(problem, factor=_error_factor(problem, belief, fitted))
    fitted = _fit(problem, belief, fitted)
    draws = draw(belief, problem.residuals, fitted, problem.residuals(fitted), problem.jacobian(fitted), seed=seed)
    shrinkage = dict(zip(problem.names, (draws.std(axis=0) / problem.spread).tolist(), strict=True))
    found = learn(problem.log_errors, start, relevant, problem.error_model)
    result = ServerCalibration(
        coefficients=prior,
        parameters=tuple(relevant),
        learned=found.factors,
        log_odds=found.log_odds,
        determined=(),
        draws=draws,
        shrinkage=shrinkage,
        residual_log_sd=_residual_log_sd(blocks, problem.log_errors(found.x)),
        error_factor=problem.factor,
        n_blocks=len(blocks),
    )
    known = tuple(n for n in problem.names if n in result.learned or shrinkage[n] < DETERMINED_SHRINKAGE)
    values = {name: value for name, value in problem.values(found.x).items() if name in result.moved}
    return replace(result, determined=known, coefficients=with_values(prior, values))


def _error_factor(problem: _Problem, belief: Belief, fitted: FloatArray) -> float:
    """Size of this server's stage errors over the expected one: root mean square given the data, all parameters free."""
    roots = np.linalg.inv(belief.whitener)
    whiten = np.sqrt(problem.error_model.variance(problem.factor))[:, None]
    slopes = whiten * problem.jacobian(fitted)
    at_prior = problem.error_model.rotated(problem.log_errors(fitted)) + slopes @ (belief.prior - fitted)
    return float(np.sqrt(linear_evidence(at_prior, slopes @ roots, problem.error_model).mean_square))


def gpu_speed(parameters: Sequence[LearnedParameter]) -> FloatArray:
    """Return the prior's common part: by how much each parameter's logarithm moves with the GPU's speed, one deviation."""
    return np.array([0.0 if p.name in OFF_GPU else GPU_SPEED_LOG_SD for p in parameters])


@dataclass(frozen=True)
class _Problem:
    """What the optimiser sees: whitened residuals by the logarithms of the parameters that act."""

    logs: Sequence[ServedLog]
    blocks: Sequence[Block]
    prior: StepTimeModel
    parameters: tuple[LearnedParameter, ...]
    workers: int
    error_model: ErrorModel = NO_ERRORS
    factor: float = 1.0

    def judged_at(self, coefficients: StepTimeModel) -> _Problem:
        """The same problem, its errors' covariance simulated at some coefficients."""
        return replace(self, error_model=error_model_at(self.logs, self.blocks, coefficients, workers=self.workers))

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.parameters]

    @property
    def spread(self) -> FloatArray:
        return np.array([p.prior_log_sd for p in self.parameters], dtype=np.float64)

    def values(self, x: FloatArray) -> dict[str, float]:
        return dict(zip(self.names, np.exp(x).tolist(), strict=True))

    def log_errors(self, x: FloatArray) -> FloatArray:
        coefficients = with_values(self.prior, self.values(x))
        simulated = each(lambda log: replayed_latencies_s(log, coefficients), self.logs, workers=self.workers)
        return log_errors(self.logs, self.blocks, simulated)

    def residuals(self, x: FloatArray) -> FloatArray:
        rotated = self.error_model.rotated(self.log_errors(x))
        return np.asarray(rotated / np.sqrt(self.error_model.variance(self.factor)), dtype=np.float64)

    def jacobian(self, x: FloatArray) -> FloatArray:
        """Central differences, wide enough for what a simulation jitters."""
        sizes = np.minimum(DIFFERENCE_STEP, self.spread / 2)
        pairs = [(self.residuals(x + row), self.residuals(x - row), 2 * row.max()) for row in np.diag(sizes)]
        return np.column_stack([(up - down) / width for up, down, width in pairs])


def parameters_that_act(
    deployments: Sequence[Deployment],
    prior: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    *,
    has_api: bool = True,
) -> list[LearnedParameter]:
    """Return the parameters that change anything: no collectives without ranks, no mixtures in a dense model.

    Parameters
    ----------
    deployments : sequence of Deployment
    prior : StepTimeModel
    parameters : sequence of LearnedParameter
    has_api : bool
        Whether latencies hold the API server's time.
    """
    compiled = [prior.compile(deployment) for deployment in deployments]
    result = []
    for p in parameters:
        if p.name not in prior.values:
            continue
        moved = with_values(prior, {p.name: prior.values[p.name] * (1 + SMALL_CHANGE)})
        overheads = has_api and moved.api_overheads_us() != prior.api_overheads_us()
        same = all(_same(moved.compile(d), c) for d, c in zip(deployments, compiled, strict=True))
        if overheads or not same:
            result.append(p)
    return result


def _same(a: object, b: object) -> bool:
    same_as = getattr(a, "same_as", None)
    return bool(same_as(b)) if same_as is not None else False


def _fit(problem: _Problem, belief: Belief, guess: FloatArray | None = None) -> FloatArray:
    """Most probable logarithms of the parameters."""
    solution = least_squares(
        lambda x: np.concatenate([problem.residuals(x), belief.whitener @ (x - belief.prior)]),
        np.clip(belief.prior if guess is None else guess, belief.low + 1e-9, belief.high - 1e-9),
        jac=lambda x: np.vstack([problem.jacobian(x), belief.whitener]),
        bounds=(belief.low, belief.high),
        x_scale=problem.spread,
        xtol=CONVERGED,
        ftol=CONVERGED,
        max_nfev=MAX_EVALUATIONS,
    )
    return solution.x


def _residual_log_sd(blocks: Sequence[Block], errors: FloatArray) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for (_, name), error in zip(figures_of(blocks), errors, strict=True):
        found.setdefault(name, []).append(float(error))
    return {name: float(np.sqrt(np.nanmean(np.square(errors)))) for name, errors in found.items()}
