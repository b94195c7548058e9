"""The optimiser: true minima of smooth objectives, bounds, and places that do not depend on the last bits."""

import numpy as np
import pytest
from scipy.optimize import minimize

from stepcal.calibration.gauss_newton import minimise, significant

WIDE = (np.full(2, -10.0), np.full(2, 10.0))


def rosenbrock(x):
    return np.array([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])


def rosenbrock_slope(x):
    return np.array([[-20.0 * x[0], 10.0], [-1.0, 0.0]])


def exponential(t, y):
    """Residuals of ``a exp(-b t)`` with large misfit, and their slope."""
    return (
        lambda x: x[0] * np.exp(-x[1] * t) - y,
        lambda x: np.column_stack([np.exp(-x[1] * t), -x[0] * t * np.exp(-x[1] * t)]),
    )


@pytest.mark.parametrize("start", [(-1.2, 1.0), (3.0, -4.0), (0.0, 9.0)])
def test_the_minimum_is_found_to_the_last_digits(start) -> None:
    found = minimise(rosenbrock, rosenbrock_slope, np.array(start), WIDE, tolerance=1e-12, max_jacobians=500)
    np.testing.assert_allclose(found.x, [1.0, 1.0], rtol=1e-10)
    assert found.remaining <= 1e-12


def test_a_fit_with_large_residuals_ends_where_a_general_minimiser_does() -> None:
    rng = np.random.default_rng(0)
    t = np.linspace(0.0, 3.0, 40)
    residuals, slope = exponential(t, 2.0 * np.exp(-0.7 * t) + rng.normal(0.0, 0.5, 40))
    found = minimise(residuals, slope, np.array([1.0, 1.0]), WIDE, tolerance=1e-10, max_jacobians=200)
    other = minimize(
        lambda x: np.sum(residuals(x) ** 2), [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}
    )
    np.testing.assert_allclose(found.x, other.x, rtol=1e-6)
    np.testing.assert_allclose(slope(found.x).T @ residuals(found.x), 0.0, atol=1e-8)


def test_a_bound_is_reached_exactly_and_left_if_that_helps() -> None:
    bounds = (np.array([-10.0, -10.0]), np.array([0.5, 10.0]))
    found = minimise(rosenbrock, rosenbrock_slope, np.array([-1.0, 1.0]), bounds, tolerance=1e-10, max_jacobians=500)
    assert found.x[0] == 0.5
    assert found.x[1] == pytest.approx(0.25, rel=1e-9)
    again = minimise(rosenbrock, rosenbrock_slope, np.array([-10.0, 10.0]), WIDE, tolerance=1e-10, max_jacobians=500)
    np.testing.assert_allclose(again.x, [1.0, 1.0], rtol=1e-8)


def test_a_parameter_without_effect_stays() -> None:
    found = minimise(
        lambda x: np.array([x[0] - 3.0]), lambda x: np.array([[1.0, 0.0]]), np.array([0.0, 7.0]), WIDE,
        tolerance=1e-9, max_jacobians=20,
    )  # fmt: skip
    assert found.x.tolist() == [3.0, 7.0]


def test_last_bits_do_not_move_a_jittering_fit() -> None:
    """As between machines: the same objective, computed with another last bit, and residuals that make much of it."""

    def fit(ulp: float):
        def residuals(x):
            return (x - 0.3) * 5.0 + 0.01 * np.sin(1e9 * x) + ulp

        return minimise(
            residuals, lambda x: 5.0 * np.eye(2), np.array([1.0, -1.0]) + ulp, WIDE,
            tolerance=0.1, max_jacobians=8, chord_steps=4, snap=significant,
        )  # fmt: skip

    assert fit(0.0).x.tolist() == fit(1e-15).x.tolist()
    np.testing.assert_allclose(fit(0.0).x, 0.3, atol=0.02)


@pytest.mark.parametrize(
    ("value", "expected"), [(1.0583717, 1.05837), (8350.8025, 8350.8), (0.0, 0.0), (-2.49999999, -2.5), (1e-9, 1e-9)]
)
def test_significant_digits(value, expected) -> None:
    assert significant(np.array([value])).tolist() == [expected]
    assert significant(significant(np.array([value]))).tolist() == [expected]
