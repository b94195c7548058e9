"""The nine-parameter fit without compression, without an analytic Jacobian, and by other optimisers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

FloatArray = NDArray[np.float64]

LOW = np.array([0.01] * 4 + [0.0] + [0.01] * 4)
HIGH = np.array([100.0] * 4 + [1e6] + [1.0] * 4)
START = np.array([1.0] * 4 + [50.0] + [0.5] * 4)


def global9_cost(theta: FloatArray, components: FloatArray, duration_us: FloatArray) -> float:
    """Sum of squared log ratios, a step at a time."""
    total = 0.0
    for row, actual in zip(components.tolist(), duration_us.tolist(), strict=True):
        predicted = theta[4] + sum(theta[c] * row[c] / theta[5 + c] for c in range(4))
        total += float(np.log(max(predicted, 1.0) / actual) ** 2)
    return total


def global9_all_rows(components: FloatArray, duration_us: FloatArray) -> tuple[FloatArray, float]:
    """scipy's trust region over every row, numerical Jacobian, tight tolerances."""

    def residuals(theta: FloatArray) -> FloatArray:
        predicted = (components * theta[:4] / theta[5:]).sum(axis=1) + theta[4]
        return np.log(np.maximum(predicted, 1.0)) - np.log(duration_us)

    solution = least_squares(
        residuals,
        START,
        jac="3-point",
        bounds=(LOW, HIGH),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
        max_nfev=5000,
    )
    return solution.x, 2 * float(solution.cost)


def quotient_cost(components: FloatArray, duration_us: FloatArray, *, n_starts: int, seed: int) -> float:
    """Best of L-BFGS-B from random starts, in the logarithms of the four quotients and in the overhead's root."""
    log_us = np.log(duration_us)
    used = np.flatnonzero(components.any(axis=0))
    part = components[:, used]

    def cost_and_gradient(x: FloatArray) -> tuple[float, FloatArray]:
        quotients, root = np.exp(x[:-1]), x[-1]
        total = part @ quotients + root**2
        residual = np.log(np.maximum(total, 1.0)) - log_us
        slope = 2 * residual * (total > 1.0) / np.maximum(total, 1.0)
        return float(residual @ residual), np.append((slope @ part) * quotients, 2 * root * slope.sum())

    bounds = [(np.log(0.01), np.log(1e4))] * used.size + [(0.0, 1e3)]
    rng = np.random.default_rng(seed)
    starts = [np.append(rng.uniform(-3, 7, used.size), rng.uniform(0, 30)) for _ in range(n_starts)]
    runs = [
        minimize(
            cost_and_gradient, x0, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 5000, "ftol": 1e-14}
        )
        for x0 in starts
    ]
    return float(min(run.fun for run in runs))
