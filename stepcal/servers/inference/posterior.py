"""What the parameters may be, given data and prior: drawn, not assumed normal.

A closed loop bends: a slower step makes larger batches, which make slower steps. So the figures are taken as quadratic in
the parameters over the region that the data allow, fitted to simulations drawn there, and a random-walk Metropolis sampler
walks on that and on log-normal priors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stepcal.step_time.physical_parameters import LearnedParameter
from stepcal.units import FloatArray

Residuals = Callable[[FloatArray], FloatArray]
CHAINS, STEPS, WARM_UP, KEEP_EVERY = 64, 1_500, 500, 20
OPTIMAL_SCALE = 2.38
"""Of a random walk's step in d dimensions, times sqrt(d) (Gelman, Roberts and Gilks 1996)."""
ROUNDS = 2
POINTS_A_COEFFICIENT = 1.5
"""Simulations of a round, as a multiple of the coefficients of a quadratic."""
WIDENING = 1.2
"""Points are drawn from a region this much wider than what is believed so far."""
FARTHEST = 3.0
"""Largest multiple of the fitted value at which a parameter is simulated, so that a far point does not bend the rest."""


@dataclass(frozen=True)
class Belief:
    """Bounds and log-normal priors of parameters, as logarithms of shape (n_parameters,).

    Attributes
    ----------
    prior, low, high : ndarray
    whitener : ndarray, shape (n_parameters, n_parameters)
        Turns deviations from the prior into independent ones of unit variance.
    """

    prior: FloatArray
    low: FloatArray
    high: FloatArray
    whitener: FloatArray

    @classmethod
    def of(cls, parameters: Sequence[LearnedParameter], prior: FloatArray, common: FloatArray | None = None) -> Belief:
        """Build from parameters, around the logarithms of their prior values; `common` is what they move by together."""
        low, high = np.log([[p.low for p in parameters], [p.high for p in parameters]])
        covariance = np.diag([p.prior_log_sd**2 for p in parameters])
        if common is not None:
            covariance = covariance + np.outer(common, common)
        return cls(prior, low, high, np.asarray(np.linalg.inv(np.linalg.cholesky(covariance)), dtype=np.float64))

    @property
    def precision(self) -> FloatArray:
        """Inverse of the prior's covariance."""
        return self.whitener.T @ self.whitener

    def log_density(self, x: FloatArray) -> FloatArray:
        """Logarithm of the prior's density, up to a constant, at points of shape (n_points, n_parameters)."""
        inside = ((x >= self.low) & (x <= self.high)).all(axis=1)
        return np.where(inside, -0.5 * (((x - self.prior) @ self.whitener.T) ** 2).sum(axis=1), -np.inf)


@dataclass(frozen=True)
class Quadratic:
    """Whitened residuals as a quadratic in ``value / fitted value - 1``."""

    fit: FloatArray
    coefficients: FloatArray

    @classmethod
    def linear(cls, fit: FloatArray, at_fit: FloatArray, jacobian: FloatArray) -> Quadratic:
        """Build from the values and slopes at the fit."""
        rest = np.zeros((len(_terms(fit, fit[None])[0]) - 1 - len(fit), len(at_fit)))
        return cls(fit, np.vstack([at_fit, jacobian.T, rest]))

    @classmethod
    def through(cls, fit: FloatArray, points: FloatArray, values: FloatArray) -> Quadratic:
        """Fit to simulations at points of shape (n_points, n_parameters)."""
        terms = _terms(fit, points)
        solution, *_ = np.linalg.lstsq(terms, values, rcond=1e-6)
        return cls(fit, np.asarray(solution, dtype=np.float64))

    def residuals(self, x: FloatArray) -> FloatArray:
        """Return residuals at points, shape (n_points, n_figures)."""
        return _terms(self.fit, x) @ self.coefficients


def _terms(fit: FloatArray, x: FloatArray) -> FloatArray:
    u = np.expm1(x - fit)
    first, second = np.triu_indices(len(fit))
    return np.column_stack([np.ones(len(x)), u, u[:, first] * u[:, second]])


def draw(
    belief: Belief, simulate: Residuals, fit: FloatArray, at_fit: FloatArray, jacobian: FloatArray, *, seed: int
) -> FloatArray:
    """Draw parameters given data and prior.

    Parameters
    ----------
    belief : Belief
    simulate : callable
        Logarithms of the parameters to whitened residuals, shape (n_figures,).
    fit : ndarray, shape (n_parameters,)
        Where the density is highest, as logarithms.
    at_fit, jacobian : ndarray
        Residuals there and their derivatives by the logarithms.
    seed : int

    Returns
    -------
    ndarray, shape (n_draws, n_parameters)
        Logarithms.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    covariance = np.linalg.inv(jacobian.T @ jacobian + belief.precision)
    emulator = Quadratic.linear(fit, at_fit, jacobian)
    draws = _walk(belief, emulator, covariance, rng)
    n_points = int(POINTS_A_COEFFICIENT * len(emulator.coefficients))
    points, values = fit[None], at_fit[None]
    for _ in range(ROUNDS):
        chosen = draws[rng.choice(len(draws), n_points, replace=False)]
        wider = np.clip(fit + WIDENING * (chosen - fit), belief.low, np.minimum(belief.high, fit + np.log(FARTHEST)))
        points = np.vstack([points, wider])
        values = np.vstack([values, [simulate(x) for x in wider]])
        emulator = Quadratic.through(fit, points, values)
        draws = _walk(belief, emulator, np.asarray(np.atleast_2d(np.cov(draws.T)), dtype=np.float64), rng)
    return draws


def _walk(belief: Belief, emulator: Quadratic, covariance: np.ndarray, rng: np.random.Generator) -> FloatArray:
    """Random-walk Metropolis of several chains from the fit."""
    n = len(emulator.fit)
    step = np.linalg.cholesky(covariance + 1e-12 * np.eye(n)) * OPTIMAL_SCALE / np.sqrt(n)

    def log_density(x: FloatArray) -> FloatArray:
        return belief.log_density(x) - 0.5 * (emulator.residuals(x) ** 2).sum(axis=1)

    x = np.clip(emulator.fit + rng.normal(size=(CHAINS, n)) @ step.T, belief.low, belief.high)
    density = log_density(x)
    kept = []
    for i in range(STEPS):
        there = x + rng.normal(size=(CHAINS, n)) @ step.T
        density_there = log_density(there)
        moves = np.log(rng.random(CHAINS)) < density_there - density
        x = np.where(moves[:, None], there, x)
        density = np.where(moves, density_there, density)
        if i >= WARM_UP and i % KEEP_EVERY == 0:
            kept.append(x)
    return np.concatenate(kept)
