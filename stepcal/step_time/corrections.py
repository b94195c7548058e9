"""Learned factors on top of component times: ``step time = max(1 us, sum(factor * component / mfu) + overhead)``.

Three variants, as the study proposed them: 9 parameters for all models, 16 that differ between the compute-bound and the
memory-bound regime, and 36 that are nine for each model family. A variant knows its parameters, their start and bounds,
its prediction and its gradient; it does not know how it is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcal.errors import InputError
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import Accelerator
from stepcal.step_time.decomposition import (
    STUDY_COMPONENTS,
    decompose,
    intensities,
    ridge_intensity,
    study_components_us,
    study_intensities,
)
from stepcal.units import BoolArray, FloatArray

if TYPE_CHECKING:
    import pandas as pd

SMALLEST_STEP_US = 1.0
"""Floor of a predicted step, as published."""


@dataclass(frozen=True)
class Parameter:
    """One number to be learned."""

    name: str
    unit: str
    start: float
    low: float
    high: float


@dataclass(frozen=True)
class Combination:
    """A product of powers of parameters, which data may determine where its members alone are not."""

    name: str
    exponents: tuple[tuple[str, float], ...]


def _factor(name: str) -> Parameter:
    return Parameter(f"{name}_factor", "1", start=1.0, low=0.01, high=100.0)


def _mfu(name: str) -> Parameter:
    return Parameter(f"{name}_mfu", "1", start=0.5, low=0.01, high=1.0)


OVERHEAD = Parameter("overhead_us", "us", start=50.0, low=0.0, high=1e6)
"""Start and bounds of all parameters are the study's."""


@dataclass(frozen=True)
class StepFeatures:
    """What a correction model sees of a table of steps.

    Parameters
    ----------
    components_us : ndarray, shape (n_steps, 4)
    intensities : ndarray, shape (n_steps, 4)
        FLOP/byte.
    families : ndarray of str, shape (n_steps,)
        Model family; llama-2-70b and llama-2-70b-hf are one.
    """

    components_us: FloatArray
    intensities: FloatArray
    families: NDArray[np.str_]

    @classmethod
    def of(cls, steps: pd.DataFrame, accelerator: Accelerator) -> StepFeatures:
        """Compute the features of validated step rows."""
        named = {str(model): load_architecture(str(model)).name for model in steps["model"].unique()}
        return cls(
            components_us=decompose(steps, accelerator).to_numpy(),
            intensities=intensities(steps),
            families=steps["model"].astype(str).map(named).to_numpy(dtype=str),
        )

    @classmethod
    def of_batches(
        cls,
        prefill_tokens: ArrayLike,
        decode_tokens: ArrayLike,
        deployment: Deployment,
    ) -> StepFeatures:
        """Compute the features of batches of one server, given as token counts."""
        components = study_components_us(prefill_tokens, decode_tokens, deployment)
        intensity = study_intensities(prefill_tokens, decode_tokens, deployment.architecture)
        return cls(components, intensity, np.full(len(components), deployment.architecture.name))

    def __len__(self) -> int:
        return len(self.components_us)

    def rows(self, mask: BoolArray | NDArray[np.intp]) -> StepFeatures:
        """Return the features of some steps."""
        return StepFeatures(self.components_us[mask], self.intensities[mask], self.families[mask])


class CorrectionModel(Protocol):
    """What the fitter asks of a variant."""

    @property
    def name(self) -> str:
        """Name of the variant."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters, in the order of `theta`."""

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """Combinations worth an interval of their own."""

    def total_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Corrected components and overhead, summed, before the floor; shape (n_steps,)."""

    def predict_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Step times, shape (n_steps,)."""

    def gradient_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Derivative of each step time by each parameter, shape (n_steps, n_parameters)."""


@dataclass(frozen=True)
class Global9:
    """Four factors, four MFU discounts and one overhead, the same for every model.

    A factor and the MFU of its component enter only as their quotient, so of nine parameters no fit can determine more
    than five, and four where decode attention is zero.
    """

    name: str = "global9"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Factors, overhead, MFU discounts."""
        return (*map(_factor, STUDY_COMPONENTS), OVERHEAD, *map(_mfu, STUDY_COMPONENTS))

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The quotients factor / MFU."""
        return tuple(
            Combination(f"{c}_factor / {c}_mfu", ((f"{c}_factor", 1), (f"{c}_mfu", -1))) for c in STUDY_COMPONENTS
        )

    def total_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Corrected components and overhead, summed, before the floor; shape (n_steps,), microseconds."""
        factors, overhead, mfu = theta[:4], theta[4], theta[5:]
        total: FloatArray = features.components_us @ (factors / mfu) + overhead
        return total

    def predict_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return np.maximum(self.total_us(theta, features), SMALLEST_STEP_US)

    def gradient_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Derivative of each step time by each parameter, shape (n_steps, 9)."""
        factors, mfu = theta[:4], theta[5:]
        components = features.components_us
        above_floor = self.total_us(theta, features) > SMALLEST_STEP_US
        gradient = np.column_stack([components / mfu, np.ones(len(components)), -components * (factors / mfu**2)])
        return gradient * above_floor[:, None]


@dataclass(frozen=True)
class Phase16:
    """A factor for each regime of each component, four MFU discounts and four thresholds; no overhead.

    A component is compute-bound in a step whose arithmetic intensity is at least the component's threshold. The
    threshold is a step function's edge: its derivative is zero wherever it exists, so a gradient method leaves it where
    it started. `stepcal.calibration.least_squares.fit_phase16` profiles it on a grid instead.

    Parameters
    ----------
    ridge : float
        FLOP/byte at which the datasheet puts the edge; the thresholds start there.
    """

    ridge: float
    name: str = "phase16"

    @classmethod
    def for_accelerator(cls, accelerator: Accelerator) -> Phase16:
        """Start the thresholds at the datasheet's ridge point."""
        return cls(ridge=ridge_intensity(accelerator))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Compute-bound factors, memory-bound factors, MFU discounts, thresholds."""
        highest = 1e4
        thresholds = (Parameter(f"{c}_threshold", "FLOP/byte", self.ridge, 0.0, highest) for c in STUDY_COMPONENTS)
        return (
            *(_factor(f"{c}_compute") for c in STUDY_COMPONENTS),
            *(_factor(f"{c}_memory") for c in STUDY_COMPONENTS),
            *map(_mfu, STUDY_COMPONENTS),
            *thresholds,
        )

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The quotients factor / MFU of each regime."""
        return tuple(
            Combination(f"{c}_{regime}_factor / {c}_mfu", ((f"{c}_{regime}_factor", 1), (f"{c}_mfu", -1)))
            for regime in ("compute", "memory")
            for c in STUDY_COMPONENTS
        )

    def total_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Corrected components, summed, before the floor; shape (n_steps,), microseconds."""
        return self._sum_us(theta, features)[0]

    def predict_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return np.maximum(self.total_us(theta, features), SMALLEST_STEP_US)

    def gradient_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Derivative of each step time by each parameter, shape (n_steps, 16); zero for the thresholds."""
        total, compute_bound = self._sum_us(theta, features)
        mfu = theta[8:12]
        factors = np.where(compute_bound, theta[:4], theta[4:8])
        scaled = features.components_us / mfu
        gradient = np.column_stack(
            [scaled * compute_bound, scaled * ~compute_bound, -scaled * factors / mfu, np.zeros_like(scaled)]
        )
        return gradient * (total > SMALLEST_STEP_US)[:, None]

    def _sum_us(self, theta: FloatArray, features: StepFeatures) -> tuple[FloatArray, BoolArray]:
        compute_bound = features.intensities >= theta[12:]
        factors = np.where(compute_bound, theta[:4], theta[4:8])
        return np.sum(features.components_us * factors / theta[8:12], axis=1), compute_bound


@dataclass(frozen=True)
class Model36:
    """`Global9` once for each model family; with the study's four families, 36 parameters.

    Parameters
    ----------
    families : tuple of str
        In the order of the parameter blocks.
    """

    families: tuple[str, ...]
    name: str = "model36"

    @property
    def block(self) -> Global9:
        """The model of one family."""
        return Global9()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Nine parameters a family, named ``family.parameter``."""
        return tuple(
            Parameter(f"{family}.{p.name}", p.unit, p.start, p.low, p.high)
            for family in self.families
            for p in self.block.parameters
        )

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The quotients factor / MFU of each family."""
        return tuple(
            Combination(f"{family}.{c.name}", tuple((f"{family}.{name}", power) for name, power in c.exponents))
            for family in self.families
            for c in self.block.combinations
        )

    def total_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Corrected components and overhead, summed, before the floor; shape (n_steps,), microseconds.

        Raises `InputError` as `predict_us` does.
        """
        total = np.empty(len(features))
        for _, rows, columns in self.blocks(features):
            total[rows] = self.block.total_us(theta[columns], features.rows(rows))
        return total

    def predict_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds.

        Raises
        ------
        InputError
            If a step's family was not fitted: the variant says nothing about a model that it never saw.
        """
        return np.maximum(self.total_us(theta, features), SMALLEST_STEP_US)

    def gradient_us(self, theta: FloatArray, features: StepFeatures) -> FloatArray:
        """Derivative of each step time by each parameter, shape (n_steps, 9 * n_families)."""
        gradient = np.zeros((len(features), theta.size))
        for _, rows, columns in self.blocks(features):
            gradient[np.ix_(rows, np.arange(columns.start, columns.stop))] = self.block.gradient_us(
                theta[columns], features.rows(rows)
            )
        return gradient

    def blocks(self, features: StepFeatures) -> list[tuple[str, BoolArray, slice]]:
        """``(family, its steps, its parameters)`` of each family that occurs in `features`."""
        unknown = sorted(set(features.families.tolist()) - set(self.families))
        if unknown:
            raise InputError(
                f"`model36` was fitted to {', '.join(self.families)} and cannot predict `{unknown[0]}`. "
                "Fit it with that model's steps, or use a variant whose parameters are shared (`global9`)."
            )
        width = len(self.block.parameters)
        return [
            (family, features.families == family, slice(i * width, (i + 1) * width))
            for i, family in enumerate(self.families)
            if np.any(features.families == family)
        ]
