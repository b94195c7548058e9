"""Which parameters do the data determine, how well, and why not the others?

Everything follows from the Jacobian in relative coordinates, ``J[i, j] = d residual_i / d log(theta_j)``: a direction in
its null space can be walked without any prediction changing, and the inverse of ``J.T J`` carries the uncertainty of the
rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from stepcal.metrics import BLOCK_STEPS, CONFIDENCE
from stepcal.step_time.corrections import Combination, Parameter
from stepcal.units import BoolArray, FloatArray

RANK_TOLERANCE = 1e-7
"""Singular values below this share of the largest count as zero: square root of double precision, with a margin."""
NULL_TOLERANCE = 1e-4
"""A direction whose part in the null space is longer than this is not determined."""
WIDEST_INTERVAL = 1e6
"""Upper over lower bound of an interval beyond which a number cannot be called determined."""
BOUND_TOLERANCE = 1e-3
"""Relative distance to a bound within which a parameter is said to sit at it (trf stays strictly inside)."""


@dataclass(frozen=True)
class Estimate:
    """One parameter or combination: its value, its interval, and the reason where it has none.

    Attributes
    ----------
    name, unit : str
    value, low, high : float
        Bounds are NaN where the value is not identified or sits at a bound of the search.
    identified : bool
    reason : str
        Empty for an identified value inside its bounds.
    """

    name: str
    unit: str
    value: float
    low: float
    high: float
    identified: bool
    reason: str = ""

    def describe(self) -> str:
        """Return one line: value and interval, or value and reason."""
        if not self.identified:
            return f"not identified: {self.reason}"
        if self.reason:
            return f"{self.value:.4g}    {self.reason}"
        return f"{self.value:.4g}    [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Identifiability:
    """Singular values of the relative Jacobian, largest first, and how many of them are not zero."""

    singular_values: FloatArray
    rank: int

    @property
    def n_parameters(self) -> int:
        """Parameters that were fitted, determined or not."""
        return self.singular_values.size


def assess(
    parameters: Sequence[Parameter],
    combinations: Sequence[Combination],
    theta: FloatArray,
    residuals: FloatArray,
    jacobian: FloatArray,
    *,
    block_length: int = BLOCK_STEPS,
) -> tuple[tuple[Estimate, ...], tuple[Estimate, ...], Identifiability]:
    """Judge a least-squares solution.

    Parameters
    ----------
    parameters : sequence of Parameter, length p
    combinations : sequence of Combination
    theta : ndarray, shape (p,)
    residuals : ndarray, shape (n,)
        In time order.
    jacobian : ndarray, shape (n, p)
        ``d residual / d theta``.
    block_length : int
        Neighbouring residuals within a block may depend on each other in any way.

    Returns
    -------
    estimates : tuple of Estimate, length p
    combinations : tuple of Estimate
    identifiability : Identifiability

    Notes
    -----
    The covariance is the cluster-robust sandwich ``H+ (sum_b s_b s_b.T) H+`` with ``H = J.T J`` and ``s_b`` the sum of
    ``J_i r_i`` over block b: residuals of neighbouring steps are far from independent, and their variance is far from
    constant. Intervals are 95% and symmetric in the logarithm.

    References
    ----------
    Liang and Zeger (1986), Biometrika 73(1), doi:10.1093/biomet/73.1.13. White (1980), Econometrica 48(4),
    doi:10.2307/1912934.
    """
    relative = jacobian * theta
    singular, vectors = np.linalg.svd(relative, full_matrices=False)[1:]
    rank = int(np.sum(singular > RANK_TOLERANCE * singular[0])) if singular.size and singular[0] > 0 else 0
    # What counts as zero is the noise of the arithmetic, and differs between machines.
    identifiability = Identifiability(np.where(np.arange(singular.size) < rank, singular, 0.0), rank)

    at_bound = [_bound_reached(p, v) for p, v in zip(parameters, theta, strict=True)]
    unused = ~np.any(relative != 0, axis=0)
    row_space = vectors[:rank]
    covariance = _sandwich(relative, residuals, row_space, singular[:rank], block_length)

    judge = _Judge({p.name: j for j, p in enumerate(parameters)}, theta, row_space, covariance, unused, at_bound)
    estimates = tuple(judge.parameter(p, combinations) for p in parameters)
    return estimates, tuple(judge.combination(c) for c in combinations), identifiability


@dataclass(frozen=True)
class _Judge:
    """What a Jacobian says about directions in ``log(theta)``."""

    index: dict[str, int]
    theta: FloatArray
    row_space: FloatArray
    covariance: FloatArray
    unused: BoolArray
    at_bound: list[str]

    def parameter(self, p: Parameter, combinations: Sequence[Combination]) -> Estimate:
        j = self.index[p.name]
        direction = np.eye(len(self.index))[j]
        determined, reason = _determined(direction, self.row_space), self.at_bound[j]
        if self.unused[j]:
            determined = self.at_bound[j] != "" and self.theta[j] == 0
            reason = reason if determined else _why_unused(p.name)
        elif not determined:
            partners = [c for c in combinations if any(name == p.name for name, _ in c.exponents)]
            known = [c.name for c in partners if _determined(_direction(c, self.index), self.row_space)]
            # Near a bound of zero the relative derivative vanishes with the value, whatever the data say.
            determined = not partners and self.at_bound[j] != ""
            if not determined:
                reason = f"only {known[0]} is" if known else "another parameter does the same"
        return _estimate(p.name, p.unit, self.theta[j], direction, self.covariance, determined, reason)

    def combination(self, c: Combination) -> Estimate:
        members = [(self.index[name], power) for name, power in c.exponents]
        direction = _direction(c, self.index)
        value = float(np.prod([self.theta[j] ** power for j, power in members]))
        idle = all(self.unused[j] for j, _ in members)
        determined = not idle and _determined(direction, self.row_space)
        reason = _why_unused(c.name) if idle else "" if determined else "another combination does the same"
        if determined and all(self.at_bound[j] for j, _ in members):
            reason = "at a bound of the search"
        return _estimate(c.name, "1", value, direction, self.covariance, determined, reason)


def _direction(combination: Combination, index: dict[str, int]) -> FloatArray:
    """Return a combination as a direction in ``log(theta)``."""
    direction = np.zeros(len(index))
    for name, power in combination.exponents:
        direction[index[name]] = power
    return direction


def _determined(direction: FloatArray, row_space: FloatArray) -> bool:
    outside = direction - row_space.T @ (row_space @ direction)
    return bool(np.linalg.norm(outside) <= NULL_TOLERANCE)


def _sandwich(
    relative: FloatArray, residuals: FloatArray, row_space: FloatArray, singular: FloatArray, block_length: int
) -> FloatArray:
    """Covariance of ``log(theta)`` within the row space, shape (p, p)."""
    bread = row_space.T @ (row_space / (singular**2)[:, None])
    starts = np.arange(0, len(residuals), block_length)
    scores = np.add.reduceat(relative * residuals[:, None], starts, axis=0)
    small_sample = len(starts) / max(len(starts) - 1, 1)
    return small_sample * bread @ (scores.T @ scores) @ bread


def _estimate(
    name: str,
    unit: str,
    value: float,
    direction: FloatArray,
    covariance: FloatArray,
    determined: bool,
    reason: str,
) -> Estimate:
    nan = float("nan")
    if not determined or reason:
        return Estimate(name, unit, float(value), nan, nan, bool(determined), reason)
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    spread = z * math.sqrt(max(float(direction @ covariance @ direction), 0.0))
    if 2 * spread > math.log(WIDEST_INTERVAL):
        reason = f"its 95% interval is wider than a factor of {WIDEST_INTERVAL:g}"
        return Estimate(name, unit, float(value), nan, nan, False, reason)
    low, high = value * np.exp([-spread, spread])
    return Estimate(name, unit, float(value), float(low), float(high), True)


def _bound_reached(parameter: Parameter, value: float) -> str:
    if value - parameter.low <= BOUND_TOLERANCE * (abs(parameter.low) or parameter.start):
        return "at its lower bound"
    if parameter.high - value <= BOUND_TOLERANCE * abs(parameter.high):
        return "at its upper bound"
    return ""


def _why_unused(name: str) -> str:
    if "threshold" in name:
        return "a hard threshold has no gradient; its value is the best of a grid"
    if "_compute_factor" in name or "_memory_factor" in name:
        return "its component is zero in every step of its regime"
    return "its component is zero in every step"
