"""Which parameters a log speaks for: the others keep the prior's values to the last bit.

A server either is as the prior says or differs from it, in single parameters or in the speed of its GPU as a whole. Each way
to differ costs prior odds and, by its Bayes factor, the room that it leaves (MacKay 1992, doi:10.1162/neco.1992.4.3.415);
only what lowers the misfit by more than that is learned. So a log that agrees with the prior within the error that the prior
is known to have (`stepcal.servers.inference.error_model`) teaches nothing, instead of something at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from stepcal.servers.inference.error_model import FACTORS, ErrorModel, factor_log_weights
from stepcal.step_time.physical_parameters import LearnedParameter
from stepcal.units import FloatArray

Residuals = Callable[[FloatArray], FloatArray]
GPU_SPEED = "gpu_speed"
"""Name of the direction in which all times of the GPU grow by one factor."""
GPU_SPEED_LOG_SD = 0.2
"""Prior spread of that factor. Power caps and clocks are worth 10 to 20%; our judgement, fitted to nothing."""
OFF_GPU = frozenset({"offload_scan_us", "api_before_us", "api_after_us"})
"""Parameters whose time is not the GPU's."""
DIFFERS = 0.05
"""Share of servers that are taken to differ from the prior in a given direction; our judgement, fitted to nothing."""
LARGEST_STEP = 0.05
"""Largest step of central differences in the logarithm; half the prior's spread where that is less."""
CONVERGED, MAX_EVALUATIONS = 1e-3, 12
MAX_MOVES, TRIES = 12, 3
"""Changes of what is learned, and how many of the most promising ones are fitted before none is believed."""


@dataclass(frozen=True)
class Direction:
    """A way in which a server may differ: parameters, as logarithms, move along `column` by a normal amount."""

    name: str
    column: FloatArray
    log_sd: float


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes
    ----------
    factors : dict
        By which the prior's values along each direction are multiplied, by its name; empty where nothing was learned.
    x : ndarray, shape (n_parameters,)
        Logarithms of the parameters.
    log_odds : float
        Logarithm of the posterior odds, against the prior's values.
    """

    factors: dict[str, float]
    x: FloatArray
    log_odds: float


def directions_of(parameters: Sequence[LearnedParameter]) -> list[Direction]:
    """Return each parameter alone, and all of the GPU's together where there are several."""
    unit = np.eye(len(parameters))
    result = [Direction(p.name, unit[i], p.prior_log_sd) for i, p in enumerate(parameters)]
    of_gpu = np.array([p.name not in OFF_GPU for p in parameters], dtype=np.float64)
    if of_gpu.sum() > 1:
        result.append(Direction(GPU_SPEED, of_gpu, GPU_SPEED_LOG_SD))
    return result


def learn(
    errors: Residuals, start: FloatArray, parameters: Sequence[LearnedParameter], error_model: ErrorModel
) -> Learned:
    """Search, one change at a time, the directions that make the data most probable.

    Parameters
    ----------
    errors : callable
        Logarithms of the parameters to log errors of the figures.
    start : ndarray, shape (n_parameters,)
        Logarithms of the prior's values.
    parameters : sequence of LearnedParameter
    error_model : ErrorModel
        Of the figures.

    Returns
    -------
    Learned
    """
    low, high = np.log([[p.low for p in parameters], [p.high for p in parameters]])
    search = _Search(lambda x: error_model.rotated(errors(x)), start, low, high, error_model)
    candidates = directions_of(parameters)
    current = search.fitted((), np.zeros(0), 1.0)
    at_prior = current.log_evidence
    for _ in range(MAX_MOVES):
        better = search.next_move(current, candidates)
        if better is None:
            break
        current = better
    factors = {d.name: float(np.exp(d.log_sd * u)) for d, u in zip(current.directions, current.u, strict=True)}
    return Learned(factors, current.x, current.log_evidence - at_prior)


@dataclass(frozen=True)
class Evidence:
    """How probable figures are, the coordinates of some directions and the server's error factor integrated out.

    Attributes
    ----------
    log : float
        Up to a constant.
    u : ndarray
        Most probable coordinates, at the most probable factor.
    factor : float
        The most probable one.
    mean_square : float
        Posterior mean of the factor's square.
    """

    log: float
    u: FloatArray
    factor: float
    mean_square: float


def linear_evidence(
    at_start: FloatArray, slopes: FloatArray, error_model: ErrorModel, at: FloatArray | None = None
) -> Evidence:
    """Return the evidence where rotated errors are linear in coordinates that are standard normal beforehand.

    Parameters
    ----------
    at_start : ndarray, shape (n_figures,)
        Rotated errors at the prior's values.
    slopes : ndarray, shape (n_figures, n_directions)
    error_model : ErrorModel
    at : ndarray, shape (n_directions,), optional
        Coordinates to ask about, by default the most probable ones of each factor.
    """
    k = slopes.shape[1]
    logs, found = [], []
    for factor, log_weight in zip(FACTORS, factor_log_weights(), strict=True):
        variance = error_model.variance(float(factor))
        own, errors = slopes / np.sqrt(variance)[:, None], at_start / np.sqrt(variance)
        normal = own.T @ own + np.eye(k)
        u = -np.linalg.solve(normal, own.T @ errors) if at is None else at
        left = errors + own @ u
        misfit = float(left @ left + u @ u)
        volume = float(np.linalg.slogdet(normal)[1]) + float(np.log(variance).sum())
        logs.append(log_weight - 0.5 * (misfit + volume))
        found.append(u)
    best, total = int(np.argmax(logs)), float(np.logaddexp.reduce(logs))
    mean_square = float(np.exp(np.array(logs) - total) @ FACTORS**2)
    return Evidence(total, np.asarray(found[best], dtype=np.float64), float(FACTORS[best]), mean_square)


@dataclass(frozen=True)
class _Fit:
    directions: tuple[Direction, ...]
    u: FloatArray
    x: FloatArray
    log_evidence: float


@dataclass(frozen=True)
class _Search:
    rotated: Residuals
    start: FloatArray
    low: FloatArray
    high: FloatArray
    error_model: ErrorModel

    def x_of(self, u: FloatArray, chosen: tuple[Direction, ...]) -> FloatArray:
        """Parameters at coordinates in units of the directions' spreads."""
        moved = self.start + sum((d.log_sd * u[i] * d.column for i, d in enumerate(chosen)), np.zeros_like(self.start))
        return np.asarray(np.clip(moved, self.low, self.high), dtype=np.float64)

    def slopes(self, x: FloatArray, chosen: Sequence[Direction]) -> FloatArray:
        """Derivatives of the rotated errors by the directions' coordinates, shape (n_figures, n_directions)."""
        columns = []
        for d in chosen:
            step = min(LARGEST_STEP, d.log_sd / 2)
            up, down = (self.rotated(np.clip(x + s * d.column, self.low, self.high)) for s in (step, -step))
            columns.append((up - down) / (2 * step / d.log_sd))
        return np.column_stack([np.zeros((self.error_model.stage_variance.size, 0)), *columns])

    def fitted(self, chosen: tuple[Direction, ...], guess: FloatArray, factor: float) -> _Fit:
        """Fit some directions at one error factor; the evidence is of Laplace's method, all factors counted."""
        k = len(chosen)
        if not k:
            at_start = self.rotated(self.start)
            evidence = linear_evidence(at_start, np.zeros((at_start.size, 0)), self.error_model).log
            return _Fit((), guess, self.start, evidence)
        whiten = 1.0 / np.sqrt(self.error_model.variance(factor))
        solution = least_squares(
            lambda u: np.concatenate([whiten * self.rotated(self.x_of(u, chosen)), u]),
            guess,
            jac=lambda u: np.vstack([whiten[:, None] * self.slopes(self.x_of(u, chosen), chosen), np.eye(k)]),
            xtol=CONVERGED,
            ftol=CONVERGED,
            max_nfev=MAX_EVALUATIONS,
        )
        slopes = solution.jac[:-k] / whiten[:, None]
        at_start = solution.fun[:-k] / whiten - slopes @ solution.x
        # Of what was simulated, not of a better place that the slopes promise: near a bound they promise too much.
        found = linear_evidence(at_start, slopes, self.error_model, solution.x)
        evidence = found.log + k * _log_prior_odds()
        return _Fit(chosen, solution.x, self.x_of(solution.x, chosen), evidence)

    def next_move(self, current: _Fit, candidates: Sequence[Direction]) -> _Fit | None:
        """Add one or two directions, drop one or exchange one, if the data become more probable."""
        slopes = self.slopes(current.x, candidates)
        spread = np.array([d.log_sd for d in candidates[: len(self.start)]])  # the first ones are single parameters
        at_start = self.rotated(current.x) + slopes[:, : len(self.start)] @ ((self.start - current.x) / spread)
        position = {d.name: i for i, d in enumerate(candidates)}
        now = [position[d.name] for d in current.directions]
        others = [i for i in range(len(candidates)) if i not in now]
        moves = [[*now, *added] for n in (1, 2) for added in itertools.combinations(others, n)]
        moves += [[*(j for j in now if j != out), i] for out in now for i in others]
        moves += [[j for j in now if j != out] for out in now]

        def promise(move: list[int]) -> tuple[float, Evidence]:
            found = linear_evidence(at_start, slopes[:, move], self.error_model)
            return found.log + len(move) * _log_prior_odds(), found

        here = promise(now)[0]
        promised = sorted(((*promise(move), move) for move in moves), key=lambda p: -p[0])
        for log, found, move in promised[:TRIES]:
            if log <= here:
                break
            there = self.fitted(tuple(candidates[i] for i in move), found.u, found.factor)
            if there.log_evidence > current.log_evidence:
                return there
        return None


def _log_prior_odds() -> float:
    return float(np.log(DIFFERS / (1.0 - DIFFERS)))
