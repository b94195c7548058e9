"""Fits correction models: nonlinear least squares on ``log(predicted / actual)``, by scipy's trust region.

Beside the numbers a fit says what they are worth: an interval for each parameter that the data determine, and for each
one that they do not, why not. The Jacobian is analytic, ``d log(p) / d theta = gradient / p``. The trust region stops where
its steps become small, elsewhere on every machine: Gauss-Newton takes the quotients factor / MFU, which data can determine,
from there to the minimum; of all factors and MFUs with these quotients the fit takes those nearest to where it started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from threadpoolctl import threadpool_limits

from stepcal.calibration.gauss_newton import Solution, minimise, significant
from stepcal.calibration.identifiability import Estimate, Identifiability, assess
from stepcal.errors import InputError
from stepcal.step_time.corrections import CorrectionModel, Model36, Phase16, StepFeatures
from stepcal.step_time.decomposition import STUDY_COMPONENTS
from stepcal.units import FloatArray

MAX_EVALUATIONS = 5_000
"""The study's limit."""
THRESHOLD_GRID = 8
"""Quantiles of a component's arithmetic intensity at which `fit_phase16` tries the threshold."""
POLISHED = 1e-11
"""A fit is polished where a step promises to lower the root of its objective by less, which is of the order of 100."""
MAX_POLISHING = 100
PROFILE_SWEEPS = 2
"""Rounds over the four thresholds; the second has changed nothing on any data we have."""


@dataclass(frozen=True)
class FitResult:
    """A fitted correction model and what its numbers are worth.

    Attributes
    ----------
    model : CorrectionModel
    theta : ndarray, shape (n_parameters,)
    estimates : tuple of Estimate
        One for each parameter, in the model's order.
    combinations : tuple of Estimate
        One for each of the model's combinations.
    identifiability : Identifiability
    cost : float
        Sum of squared log ratios at the solution.
    n_steps, n_evaluations : int
    converged : bool
    note : str
        What a reader must know besides, such as thresholds that the optimiser did not move.
    """

    model: CorrectionModel
    theta: FloatArray
    estimates: tuple[Estimate, ...]
    combinations: tuple[Estimate, ...]
    identifiability: Identifiability
    cost: float
    n_steps: int
    n_evaluations: int
    converged: bool
    note: str = ""

    def predict_us(self, features: StepFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return self.model.predict_us(self.theta, features)

    def report(self) -> str:
        """Return the fit as text: a line a parameter with its interval, or the reason why it has none."""
        width = max(len(e.name) for e in (*self.estimates, *self.combinations))
        lines = [f"{self.model.name}, {self.n_steps:,} training steps"]
        lines += [f"  {e.name:<{width}}  {e.describe()}" for e in self.estimates]
        lines += ["  determined together:"]
        lines += [f"  {e.name:<{width}}  {e.describe()}" for e in self.combinations if e.identified]
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)


def log_ratio_residuals(
    model: CorrectionModel, theta: FloatArray, features: StepFeatures, duration_us: FloatArray
) -> FloatArray:
    """``log(predicted / actual)`` of each step, shape (n_steps,)."""
    return np.log(model.predict_us(theta, features) / duration_us)


def log_ratio_jacobian(model: CorrectionModel, theta: FloatArray, features: StepFeatures) -> FloatArray:
    """Derivative of each residual by each parameter, shape (n_steps, n_parameters)."""
    return model.gradient_us(theta, features) / model.predict_us(theta, features)[:, None]


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def fit(
    model: CorrectionModel,
    features: StepFeatures,
    duration_us: FloatArray,
    *,
    start: FloatArray | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
) -> FitResult:
    """Fit a correction model to measured step times.

    Parameters
    ----------
    model : CorrectionModel
        `Model36` is fitted a family at a time: the objective is a sum over families that share no parameter. `Phase16`
        has its thresholds profiled on a grid (`fit_phase16`).
    features : StepFeatures
    duration_us : ndarray, shape (n_steps,)
        In time order within each experiment, as the intervals take neighbouring steps to be dependent.
    start : ndarray, shape (n_parameters,), optional
        Defaults to each parameter's start.
    max_evaluations : int

    Returns
    -------
    FitResult

    Raises
    ------
    InputError
        If there are fewer steps than parameters, a duration is not positive and finite, or `start` is out of bounds.
    """
    if isinstance(model, Phase16):
        return fit_phase16(model, features, duration_us, start=start, max_evaluations=max_evaluations)
    duration_us, theta = _checked_durations(duration_us, features, model), _checked_start(start, model)
    if isinstance(model, Model36):
        return _fit_families(model, features, duration_us, theta, max_evaluations)
    theta, cost, evaluations, converged = _solve(model, _Cells.of(features, duration_us), theta, max_evaluations)
    return _result(model, theta, features, duration_us, cost, evaluations, converged)


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def fit_phase16(
    model: Phase16,
    features: StepFeatures,
    duration_us: FloatArray,
    *,
    start: FloatArray | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
) -> FitResult:
    """Fit the regime variant: thresholds on a grid, one component after the other, everything else by least squares.

    The thresholds are first left to the optimiser, as proposed; the result's note says how far it moved them.

    Parameters and errors are those of `fit`.
    """
    duration_us, theta0 = _checked_durations(duration_us, features, model), _checked_start(start, model)
    cells = _Cells.of(features, duration_us)
    theta, cost, evaluations, converged = _solve(model, cells, theta0, max_evaluations)
    moved = float(np.max(np.abs(theta[12:] - theta0[12:])))
    for _ in range(PROFILE_SWEEPS):
        before = theta[12:].copy()
        for component in range(len(STUDY_COMPONENTS)):
            for threshold in _threshold_grid(model, features, component):
                candidate = np.concatenate([theta0[:12], theta[12:]])
                candidate[12 + component] = threshold
                tried = _solve(model, cells, candidate, max_evaluations)
                evaluations += tried[2]
                if tried[1] < cost * (1 - 1e-9):
                    theta, cost, converged = tried[0], tried[1], tried[3]
        if np.array_equal(before, theta[12:]):
            break
    note = (
        f"trf moved the thresholds by {moved:.3g} FLOP/byte (a hard threshold has no gradient); they were profiled on a "
        f"grid of {THRESHOLD_GRID} quantiles and the ridge point."
    )
    return replace(_result(model, theta, features, duration_us, cost, evaluations, converged), note=note)


@dataclass(frozen=True)
class _Cells:
    """Steps with equal features, gathered: they share a prediction, so only their mean log duration matters.

    ``sum((log p - y_i)^2) = n (log p - mean(y))^2 + scatter`` holds exactly, and tens of thousands of steps have a few
    hundred different batches.
    """

    features: StepFeatures
    mean_log_us: FloatArray
    root_counts: FloatArray
    scatter: float

    @classmethod
    def of(cls, features: StepFeatures, duration_us: FloatArray) -> _Cells:
        codes = np.unique(features.families, return_inverse=True)[1]
        keys = np.column_stack([features.components_us, features.intensities, codes])
        _, first, cell, counts = np.unique(keys, axis=0, return_index=True, return_inverse=True, return_counts=True)
        log_us = np.log(duration_us)
        mean = np.bincount(cell, weights=log_us) / counts
        return cls(features.rows(first), mean, np.sqrt(counts), float(np.sum((log_us - mean[cell]) ** 2)))

    def residuals(self, model: CorrectionModel, theta: FloatArray) -> FloatArray:
        return self.root_counts * (np.log(model.predict_us(theta, self.features)) - self.mean_log_us)

    def jacobian(self, model: CorrectionModel, theta: FloatArray) -> FloatArray:
        return self.root_counts[:, None] * log_ratio_jacobian(model, theta, self.features)


def _solve(
    model: CorrectionModel, cells: _Cells, theta0: FloatArray, max_evaluations: int
) -> tuple[FloatArray, float, int, bool]:
    """Return the parameters, the sum of squared log ratios over all steps, evaluations used, and whether it converged."""
    low = np.array([p.low for p in model.parameters])
    high = np.array([p.high for p in model.parameters])
    solution = least_squares(
        lambda theta: cells.residuals(model, theta),
        theta0,
        jac=lambda theta: cells.jacobian(model, theta),
        bounds=(low, high),
        method="trf",
        x_scale="jac",
        max_nfev=max_evaluations,
    )
    if not solution.success:
        return solution.x, 2 * float(solution.cost) + cells.scatter, int(solution.nfev), False
    theta, evaluations = _polish(model, cells, solution.x, theta0)
    cost = float(np.sum(cells.residuals(model, theta) ** 2)) + cells.scatter
    return theta, cost, int(solution.nfev) + evaluations, True


def _polish(model: CorrectionModel, cells: _Cells, theta: FloatArray, start: FloatArray) -> tuple[FloatArray, int]:
    """Go from a nearby point to the minimum, and to one of the many places where it is; return that and evaluations used."""
    low, high = (np.array([getattr(p, name) for p in model.parameters]) for name in ("low", "high"))
    used = np.any(cells.jacobian(model, theta) != 0, axis=0)
    groups = {mfu: factors[used[factors]] for mfu, factors in _factors_of(model).items()}
    # With all MFUs at 1 the factors are the quotients, and every one of them can be told.
    quotients, lowest, highest = theta.copy(), low.copy(), high.copy()
    for mfu, own in groups.items():
        quotients[own] /= theta[mfu]
        quotients[mfu] = 1.0
        lowest[own], highest[own] = low[own] / high[mfu], high[own] / low[mfu]
    told = used & ~np.isin(np.arange(theta.size), list(groups))
    solution = _minimum(model, cells, quotients, told, (lowest, highest))
    if not all(_mfu_range(solution.x[own], mfu, own, (low, high))[2] for mfu, own in groups.items()):
        # Factors that share an MFU can be farther apart than their bounds.
        solution = _minimum(model, cells, theta, used, (low, high))
    polished = solution.x.copy()
    for mfu, factors in _factors_of(model).items():
        own = groups[mfu]
        polished[factors[~used[factors]]] = start[factors[~used[factors]]]
        ratio = solution.x[own] / solution.x[mfu]
        shortest, longest, _ = _mfu_range(ratio, mfu, own, (low, high))
        # As near to the start as the bounds allow, in the logarithm.
        nearest = np.exp(np.mean(np.log([start[mfu], *(start[own] / ratio)])))
        polished[mfu] = np.clip(nearest, shortest, max(shortest, longest))
        polished[own] = ratio * polished[mfu]
    # A threshold is a step's own intensity: rounded, it would put that step in another regime.
    named = {name for c in model.combinations for name, _ in c.exponents}
    fitted = used | np.array([p.name in named for p in model.parameters])
    return np.where(fitted, np.clip(significant(polished), low, high), theta), solution.n_evaluations


def _minimum(
    model: CorrectionModel,
    cells: _Cells,
    theta: FloatArray,
    moving: NDArray[np.bool_],
    bounds: tuple[FloatArray, FloatArray],
) -> Solution:
    """Minimise over some of the parameters; the solution holds all of them."""

    def moved(x: FloatArray) -> FloatArray:
        full = theta.copy()
        full[moving] = x
        return full

    solution = minimise(
        lambda x: cells.residuals(model, moved(x)),
        lambda x: cells.jacobian(model, moved(x))[:, moving],
        theta[moving],
        (bounds[0][moving], bounds[1][moving]),
        tolerance=POLISHED,
        max_jacobians=MAX_POLISHING,
    )
    return replace(solution, x=moved(solution.x))


def _mfu_range(
    quotients: FloatArray, mfu: int, factors: NDArray[np.intp], bounds: tuple[FloatArray, FloatArray]
) -> tuple[float, float, bool]:
    """MFUs with which all factors, quotient times MFU, are within bounds, and whether there are any but for rounding."""
    shortest = float(np.max([bounds[0][mfu], *(bounds[0][factors] / quotients)]))
    longest = float(np.min([bounds[1][mfu], *(bounds[1][factors] / quotients)]))
    return shortest, longest, shortest <= longest * (1.0 + 1e-9)


def _factors_of(model: CorrectionModel) -> dict[int, NDArray[np.intp]]:
    """Place of each MFU and of the factors that it divides; each combination is a factor over an MFU."""
    index = {p.name: j for j, p in enumerate(model.parameters)}
    pairs = [[index[name] for name, _ in c.exponents] for c in model.combinations]
    return {mfu: np.array([f for f, m in pairs if m == mfu]) for mfu in sorted({m for _, m in pairs})}


def _fit_families(
    model: Model36, features: StepFeatures, duration_us: FloatArray, theta0: FloatArray, max_evaluations: int
) -> FitResult:
    theta = theta0.copy()
    cost, evaluations, converged = 0.0, 0, True
    for _, rows, columns in model.blocks(features):
        cells = _Cells.of(features.rows(rows), duration_us[rows])
        solved = _solve(model.block, cells, theta0[columns], max_evaluations)
        theta[columns] = solved[0]
        cost, evaluations, converged = cost + solved[1], evaluations + solved[2], converged and solved[3]
    return _result(model, theta, features, duration_us, cost, evaluations, converged)


def _result(
    model: CorrectionModel,
    theta: FloatArray,
    features: StepFeatures,
    duration_us: FloatArray,
    cost: float,
    evaluations: int,
    converged: bool,
) -> FitResult:
    estimates, combinations, identifiability = assess(
        model.parameters,
        model.combinations,
        theta,
        log_ratio_residuals(model, theta, features, duration_us),
        log_ratio_jacobian(model, theta, features),
    )
    return FitResult(
        model, theta, estimates, combinations, identifiability, cost, len(features), evaluations, converged
    )


def _threshold_grid(model: Phase16, features: StepFeatures, component: int) -> list[float]:
    """Candidate thresholds: only those that put at least one step with work on each side can matter."""
    intensity = features.intensities[features.components_us[:, component] > 0, component]
    if not intensity.size or np.ptp(intensity) == 0:
        return []
    inner = np.linspace(0, 1, THRESHOLD_GRID + 2)[1:-1]
    candidates = {float(q) for q in np.quantile(intensity, inner)} | {model.ridge}
    highest = model.parameters[12 + component].high
    return sorted(c for c in candidates if c <= highest)


def _checked_durations(duration_us: FloatArray, features: StepFeatures, model: CorrectionModel) -> FloatArray:
    duration_us = np.asarray(duration_us, dtype=float)
    if duration_us.shape != (len(features),):
        raise InputError(f"`duration_us` has shape {duration_us.shape}; {len(features)} steps need ({len(features)},).")
    if len(features) < len(model.parameters):
        raise InputError(
            f"{len(features)} steps cannot determine the {len(model.parameters)} parameters of `{model.name}`. "
            "Give more steps, or a variant with fewer parameters."
        )
    bad = np.flatnonzero(~(np.isfinite(duration_us) & (duration_us > 0)))
    if bad.size:
        raise InputError(f"`duration_us[{bad[0]}]` is {duration_us[bad[0]]}; a step takes a positive, finite time.")
    return duration_us


def _checked_start(start: FloatArray | None, model: CorrectionModel) -> FloatArray:
    if start is None:
        return np.array([p.start for p in model.parameters])
    theta0 = np.asarray(start, dtype=float)
    if theta0.shape != (len(model.parameters),):
        raise InputError(
            f"`start` has shape {theta0.shape}; `{model.name}` needs one value for each of its {len(model.parameters)} "
            "parameters."
        )
    for p, value in zip(model.parameters, theta0, strict=True):
        if not p.low <= value <= p.high:
            raise InputError(f"`start` of `{p.name}` is {value}; its bounds are [{p.low}, {p.high}].")
    return theta0
