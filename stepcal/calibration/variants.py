"""The step-time models by name, behind one door: ``fit_variant(name, split, accelerator)``.

A variant is either pooled, one model over all experiments (the correction models), or fitted to each experiment by itself
(the baselines), as in the study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stepcal.calibration.identifiability import Estimate
from stepcal.calibration.least_squares import FitResult, fit
from stepcal.datasets.splits import Split
from stepcal.errors import InputError
from stepcal.specs.architecture import load_architecture
from stepcal.specs.hardware import Accelerator
from stepcal.step_time.baselines import (
    Blackbox,
    BucketMedianRatio,
    ConstantStep,
    GradientBoosting,
    RawAnalytical,
    StepBaseline,
)
from stepcal.step_time.corrections import CorrectionModel, Global9, Model36, Phase16, StepFeatures
from stepcal.units import FloatArray

POOLED: dict[str, Callable[[Accelerator, tuple[str, ...]], CorrectionModel]] = {
    "global9": lambda accelerator, families: Global9(),
    "phase16": lambda accelerator, families: Phase16.for_accelerator(accelerator),
    "model36": lambda accelerator, families: Model36(families),
}
PER_EXPERIMENT: dict[str, Callable[[Accelerator], StepBaseline]] = {
    "raw": RawAnalytical,
    "constant": lambda accelerator: ConstantStep(),
    "bucket": BucketMedianRatio,
    "blackbox": lambda accelerator: Blackbox(),
    "xgboost": lambda accelerator: GradientBoosting(),
}
VARIANTS = ("raw", "constant", "bucket", "blackbox", "xgboost", "global9", "phase16", "model36")
"""Names in the order in which tables list them: from nothing learned to most parameters."""


@dataclass(frozen=True)
class FittedVariant:
    """A step-time model that was fitted to a training split.

    Attributes
    ----------
    name : str
    estimates : tuple of Estimate
        What was learned; baselines name the experiment in front, ``<experiment>.<parameter>``.
    combinations : tuple of Estimate
        What the data determine only together; empty for baselines.
    fit : FitResult or None
        The full fit of a pooled variant.
    baselines : dict
        The fitted baseline of each experiment; empty for a pooled variant.
    n_parameters : int
        Numbers learned a model (pooled variants) or an experiment (baselines).
    """

    name: str
    estimates: tuple[Estimate, ...]
    combinations: tuple[Estimate, ...]
    n_parameters: int
    fit: FitResult | None
    baselines: dict[str, StepBaseline]
    _predict: Callable[[pd.DataFrame], FloatArray]

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return self._predict(steps)


def fit_variant(name: str, split: Split, accelerator: Accelerator) -> FittedVariant:
    """Fit a variant to the training part of a split.

    Parameters
    ----------
    name : str
        One of `VARIANTS`.
    split : Split
        The validation part chooses among settings where a variant has any; the test part is not touched.
    accelerator : Accelerator

    Returns
    -------
    FittedVariant

    Raises
    ------
    InputError
        If the name is unknown, or the training part is empty or too small.
    """
    if name not in VARIANTS:
        raise InputError(f"Unknown variant `{name}`. Variants: {', '.join(VARIANTS)}.")
    if split.train.empty:
        raise InputError("There are no training steps. Check the experiment filter and the split.")
    return (_fit_pooled if name in POOLED else _fit_each)(name, split, accelerator)


def _fit_pooled(name: str, split: Split, accelerator: Accelerator) -> FittedVariant:
    families = tuple(sorted({load_architecture(str(m)).name for m in split.train["model"].unique()}))
    model = POOLED[name](accelerator, families)
    result = fit(model, StepFeatures.of(split.train, accelerator), split.train["duration_us"].to_numpy(dtype=float))
    return FittedVariant(
        name=name,
        estimates=result.estimates,
        combinations=result.combinations,
        n_parameters=len(model.parameters),
        fit=result,
        baselines={},
        _predict=lambda steps: result.predict_us(StepFeatures.of(steps, accelerator)),
    )


def _fit_each(name: str, split: Split, accelerator: Accelerator) -> FittedVariant:
    fitted: dict[str, StepBaseline] = {}
    valid_of = dict(iter(split.valid.groupby("experiment_id", observed=True)))
    for experiment, train in split.train.groupby("experiment_id", observed=True):
        fitted[str(experiment)] = PER_EXPERIMENT[name](accelerator).fit(train, valid_of.get(experiment, train.iloc[:0]))
    nan = float("nan")
    estimates = tuple(
        Estimate(f"{experiment}.{parameter}", unit, value, nan, nan, True, "no interval is computed")
        for experiment, model in fitted.items()
        for parameter, (value, unit) in model.parameters().items()
    )

    def predict(steps: pd.DataFrame) -> FloatArray:
        predicted = np.full(len(steps), nan)
        for experiment, rows in steps.groupby("experiment_id", observed=True).indices.items():
            if experiment not in fitted:
                raise InputError(
                    f"`{name}` is fitted to each experiment by itself and never saw `{experiment}`. "
                    f"It knows: {', '.join(fitted)}."
                )
            predicted[rows] = fitted[str(experiment)].predict_us(steps.iloc[rows])
        return predicted

    per_experiment = max((len(m.parameters()) for m in fitted.values()), default=0)
    return FittedVariant(name, estimates, (), per_experiment, None, fitted, predict)
