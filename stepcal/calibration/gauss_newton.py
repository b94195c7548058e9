"""Least squares to true convergence, also where the residuals jitter: Gauss-Newton within bounds.

One step solves ``min |r + J d|^2 + damping |D d|^2`` for `d` within the bounds. The fit is done where the decrease that a
step promises, ``|J d|^2``, is below a square of `tolerance`: in units of the whitened residuals, so a tolerance of 0.1 is a
tenth of a parameter's standard deviation. An optimiser that watches its parameters' or its objective's relative change
stops elsewhere on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from stepcal.units import FloatArray

FIRST_DAMPING = 1e-3
"""Damping after a step that did not lower the objective, relative to the Jacobian's column norms."""
MOST_DAMPING = 1e5
"""Damping beyond which no step lowers the objective: what is left is jitter, or a kink."""
ROUNDING = 1e-13
"""Relative change of the objective that its own sum rounds away; the last steps of a smooth fit change it by less."""
SMALLEST = 1e-300
"""Room between bounds that coincide."""
SIGNIFICANT_DIGITS = 6
"""Digits kept of a fitted value: far more than any data determine, far fewer than machines agree on."""


@dataclass(frozen=True)
class Solution:
    """Where a fit ended.

    Attributes
    ----------
    x : ndarray, shape (n_parameters,)
    residuals : ndarray, shape (n,)
    jacobian : ndarray, shape (n, n_parameters)
        At `x`, both.
    n_evaluations : int
        Of the residuals alone.
    remaining : float
        Length of the step that was not taken, in standard deviations: at most the tolerance, unless the residuals jitter by
        more than the step promised, or Jacobians ran out.
    """

    x: FloatArray
    residuals: FloatArray
    jacobian: FloatArray
    n_evaluations: int
    remaining: float


def significant(values: FloatArray, digits: int = SIGNIFICANT_DIGITS) -> FloatArray:
    """Round to significant digits, so that machines whose arithmetic differs in the last bits go on with the same values.

    Examples
    --------
    >>> significant(np.array([1.0583717149, 8350.8025312])).tolist()
    [1.05837, 8350.8]
    """
    return np.array([float(f"{value:.{digits - 1}e}") for value in np.ravel(values)]).reshape(np.shape(values))


def minimise(
    residuals: Callable[[FloatArray], FloatArray],
    jacobian: Callable[[FloatArray], FloatArray],
    start: FloatArray,
    bounds: tuple[FloatArray, FloatArray],
    *,
    tolerance: float,
    max_jacobians: int,
    chord_steps: int = 1,
    snap: Callable[[FloatArray], FloatArray] = lambda x: x,
) -> Solution:
    """Minimise ``sum(residuals(x)^2)`` within bounds.

    Parameters
    ----------
    residuals : callable
        Of `x`; shape (n,).
    jacobian : callable
        Of `x`; shape (n, n_parameters).
    start : ndarray, shape (n_parameters,)
    bounds : (ndarray, ndarray)
        Lowest and highest `x`.
    tolerance : float
        The fit has converged where a step promises to lower the objective by less than its square.
    max_jacobians : int
    chord_steps : int
        Steps taken on one Jacobian.
    snap : callable
        Applied to every `x` before anything is computed of it, so that machines visit the very same places.

    Returns
    -------
    Solution
        At the place of the last Jacobian.
    """
    x = snap(np.clip(start, *bounds))
    search = _Search(residuals, bounds, tolerance, snap, x, residuals(x))
    for n_jacobians in range(1, max_jacobians + 1):
        x, r, matrix = search.x, search.residuals, jacobian(search.x)
        search.look_at(matrix)
        if n_jacobians == max_jacobians:
            break
        for _ in range(chord_steps):
            if not search.goes_on(matrix):
                break
        if search.x is x:
            break
    return Solution(x, r, matrix, search.n_evaluations, float(np.sqrt(search.remaining)))


@dataclass
class _Search:
    """Where a search is, and how careful it has become."""

    evaluate: Callable[[FloatArray], FloatArray]
    bounds: tuple[FloatArray, FloatArray]
    tolerance: float
    snap: Callable[[FloatArray], FloatArray]
    x: FloatArray
    residuals: FloatArray
    n_evaluations: int = 1
    damping: float = 0.0
    remaining: float = np.inf
    is_level: bool = False

    def look_at(self, jacobian: FloatArray) -> None:
        """See what a step promises, after a new Jacobian; where the objective says no more, steps must still shrink."""
        before, self.remaining = self.remaining, max(self._step(jacobian, 0.0)[1], 0.0)
        if self.damping > MOST_DAMPING:
            self.damping = 0.0
        if self.is_level and self.remaining > before:
            self.damping = max(10.0 * self.damping, FIRST_DAMPING)

    def goes_on(self, jacobian: FloatArray) -> bool:
        """Take a step that lowers the objective; False if none promises enough, or none that is tried does."""
        here = float(self.residuals @ self.residuals)
        while self.damping <= MOST_DAMPING:
            step, promised = self._step(jacobian, self.damping)
            if promised <= self.tolerance**2:
                return False
            there = self.snap(np.clip(self.x + step, *self.bounds))
            found = self.evaluate(there)
            self.n_evaluations += 1
            gain = here - float(found @ found)
            if gain > -ROUNDING * here:
                self.x, self.residuals, self.is_level = there, found, gain <= ROUNDING * here
                if not self.is_level:
                    self.damping = self.damping / 10.0 if self.damping > FIRST_DAMPING else 0.0
                return True
            self.damping = max(10.0 * self.damping, FIRST_DAMPING)
        return False

    def _step(self, jacobian: FloatArray, damping: float) -> tuple[FloatArray, float]:
        """Return the step, and by how much it lowers the objective if the residuals are linear."""
        p = jacobian.shape[1]
        triangle: FloatArray = np.linalg.qr(np.column_stack([jacobian, self.residuals])).R
        matrix, target = triangle[:p, :p], -triangle[:p, p]
        scale = np.linalg.norm(matrix, axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        damped = np.vstack([matrix / scale, np.sqrt(damping) * np.eye(p)])
        low, high = ((bound - self.x) * scale for bound in self.bounds)
        bounds = (low, np.maximum(high, low + SMALLEST))
        step: FloatArray = lsq_linear(damped, np.append(target, np.zeros(p)), bounds=bounds, method="bvls").x / scale
        change = matrix @ step
        return step, float(change @ (2.0 * target - change))
