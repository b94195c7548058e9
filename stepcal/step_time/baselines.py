"""What a learned physical model has to beat: from no learning at all to gradient boosting.

Every baseline has ``fit(train, valid) -> self`` and ``predict_us(steps)``, both on validated step rows of one experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from stepcal.errors import InputError
from stepcal.specs.hardware import Accelerator
from stepcal.step_time.decomposition import decompose
from stepcal.units import FloatArray, IntArray

if TYPE_CHECKING:
    import pandas as pd
    import xgboost

SMALLEST_STEP_US = 1.0
BLACKBOX_FEATURES = ("prefill_tokens", "decode_tokens")
BOOSTING_FEATURES = (
    "prefill_tokens",
    "decode_tokens",
    "num_prefill_reqs",
    "num_decode_reqs",
    "running_depth",
    "waiting_depth",
    "num_finished",
    "num_preempted",
    "kv_blocks_free",
)
BATCH_FEATURES = ("prefill_tokens", "decode_tokens")
"""What a simulator knows of a batch before it runs, and what fits a table."""
BOOSTING_DEPTHS = (4, 6)
BOOSTING_LEARNING_RATES = (0.05, 0.1)
"""Depth 4 and rate 0.05 are what the study's own search chose most often."""
BOOSTING_MAX_ROUNDS = 400
BOOSTING_PATIENCE = 20
"""Rounds without improvement on the validation split after which boosting stops."""


class StepBaseline(Protocol):
    """A step-time model that is fitted to one experiment."""

    def fit(self, train: pd.DataFrame, valid: pd.DataFrame) -> Self:
        """Learn from step rows; `valid` is for choosing among settings only."""

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""

    def parameters(self) -> dict[str, tuple[float, str]]:
        """``{name: (value, unit)}`` of what was learned; empty where that is no short list."""


class RawAnalytical:
    """The four components, summed, with nothing learned.

    Parameters
    ----------
    accelerator : Accelerator
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def fit(self, train: pd.DataFrame, valid: pd.DataFrame) -> Self:
        """Learn nothing."""
        return self

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return np.maximum(decompose(steps, self.accelerator).sum(axis=1).to_numpy(), SMALLEST_STEP_US)

    def parameters(self) -> dict[str, tuple[float, str]]:
        """Return none."""
        return {}


class ConstantStep:
    """Every step takes the median of the training steps: the least that any model must beat."""

    median_us: float

    def fit(self, train: pd.DataFrame, valid: pd.DataFrame) -> Self:
        """Take the median of the training durations."""
        self.median_us = float(_nonempty(train)["duration_us"].median())
        return self

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return np.full(len(steps), self.median_us)

    def parameters(self) -> dict[str, tuple[float, str]]:
        """Return the median."""
        return {"median_us": (self.median_us, "us")}


class BucketMedianRatio:
    """The raw analytical time, times the median of measured over analytical in the step's bucket of decode tokens.

    Buckets are powers of two; a bucket that training never saw takes the median ratio of all training steps.

    Parameters
    ----------
    accelerator : Accelerator
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.raw = RawAnalytical(accelerator)
        self.ratios: dict[int, float] = {}
        self.overall = 1.0

    def fit(self, train: pd.DataFrame, valid: pd.DataFrame) -> Self:
        """Take the median ratio of each bucket."""
        import pandas as pd

        ratio = _nonempty(train)["duration_us"].to_numpy() / self.raw.predict_us(train)
        self.overall = float(np.median(ratio))
        medians = pd.Series(ratio).groupby(self._buckets(train)).median()
        self.ratios = dict(zip(medians.index.to_numpy(dtype=int).tolist(), medians.to_numpy().tolist(), strict=True))
        return self

    def ratio(self, steps: pd.DataFrame) -> FloatArray:
        """Learned ratio of measured over analytical time, shape (n_steps,)."""
        import pandas as pd

        ratio = pd.Series(self._buckets(steps)).map(self.ratios).fillna(self.overall)
        return np.asarray(ratio, dtype=np.float64)

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return self.raw.predict_us(steps) * self.ratio(steps)

    def parameters(self) -> dict[str, tuple[float, str]]:
        """Return the ratio of each bucket, by its smallest number of decode tokens."""
        return {f"ratio_from_{2**b if b >= 0 else 0}": (r, "1") for b, r in sorted(self.ratios.items())}

    @staticmethod
    def _buckets(steps: pd.DataFrame) -> IntArray:
        tokens = steps["decode_tokens"].to_numpy()
        return np.where(tokens > 0, np.floor(np.log2(np.maximum(tokens, 1))), -1).astype(np.int64)


class Blackbox:
    """Ordinary least squares with intercept on prefill and decode tokens, as published: no floor, no weights."""

    coefficients: FloatArray

    def fit(self, train: pd.DataFrame, valid: pd.DataFrame) -> Self:
        """Solve the least-squares problem."""
        self.coefficients = np.linalg.lstsq(
            self._design(_nonempty(train)), train["duration_us"].to_numpy(dtype=float), rcond=None
        )[0]
        return self

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds; negative where the line goes there."""
        return self._design(steps) @ self.coefficients

    def parameters(self) -> dict[str, tuple[float, str]]:
        """Return intercept and slopes."""
        names = ("intercept", *BLACKBOX_FEATURES)
        units = ("us", "us/token", "us/token")
        return {n: (float(c), u) for n, c, u in zip(names, self.coefficients, units, strict=True)}

    @staticmethod
    def _design(steps: pd.DataFrame) -> FloatArray:
        return np.column_stack([np.ones(len(steps)), steps[list(BLACKBOX_FEATURES)].to_numpy(dtype=float)])


class GradientBoosting:
    """Gradient-boosted trees on the logarithm of the duration: a yardstick of what the features hold, physics aside.

    Depth and learning rate are chosen, and the number of trees stopped, on the validation split.

    Parameters
    ----------
    seed : int
    features : sequence of str
        Columns of the step rows that the trees see.
    """

    def __init__(self, seed: int = 0, features: Sequence[str] = BOOSTING_FEATURES) -> None:
        self.seed = seed
        self.features = list(features)
        self.booster: xgboost.Booster | None = None
        self.settings: dict[str, float] = {}

    def fit(self, train: pd.DataFrame, valid: pd.DataFrame) -> Self:
        """Fit one model a setting and keep the one with the smallest validation error."""
        xgboost = _xgboost()
        training, validation = self._matrix(_nonempty(train)), self._matrix(_nonempty(valid, "validation"))
        smallest = np.inf
        for depth in BOOSTING_DEPTHS:
            for rate in BOOSTING_LEARNING_RATES:
                booster = xgboost.train(
                    {"max_depth": depth, "eta": rate, "tree_method": "hist", "seed": self.seed, "nthread": 1},
                    training,
                    num_boost_round=BOOSTING_MAX_ROUNDS,
                    evals=[(validation, "valid")],
                    early_stopping_rounds=BOOSTING_PATIENCE,
                    verbose_eval=False,
                )
                if booster.best_score < smallest:
                    smallest, self.booster = booster.best_score, booster
                    self.settings = {"max_depth": depth, "learning_rate": rate, "trees": booster.best_iteration + 1}
        return self

    def predict_us(self, steps: pd.DataFrame) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        if self.booster is None:
            raise InputError("`GradientBoosting` was not fitted. Call `fit(train, valid)` first.")
        rounds = (0, int(self.settings["trees"]))
        return np.exp(self.booster.inplace_predict(self._features(steps), iteration_range=rounds).astype(float))

    def parameters(self) -> dict[str, tuple[float, str]]:
        """Return the settings that the validation split chose."""
        return {name: (float(value), "1") for name, value in self.settings.items()}

    def _matrix(self, steps: pd.DataFrame) -> xgboost.DMatrix:
        xgboost = _xgboost()
        return xgboost.DMatrix(
            self._features(steps), label=np.log(steps["duration_us"].to_numpy(dtype=float)), nthread=1
        )

    def _features(self, steps: pd.DataFrame) -> FloatArray:
        return steps[self.features].to_numpy(dtype=float)


def _xgboost() -> ModuleType:
    try:
        import xgboost
    except ImportError:
        raise InputError(
            "Gradient boosting needs the package `xgboost-cpu`, which is not installed. `pip install 'stepcal[xgboost]'` "
            "installs it."
        ) from None
    return xgboost


def _nonempty(steps: pd.DataFrame, part: str = "training") -> pd.DataFrame:
    if steps.empty:
        raise InputError(f"There are no {part} steps. Check the experiment filter and the split.")
    return steps
