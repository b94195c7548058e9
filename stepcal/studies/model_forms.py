"""Other forms of the step time, refitted to decode intervals: what do the data say of max, of shared factors, of stages?

A form is a subclass of `PhysicalModel` or the model on changed features. All are fitted as the request level is
(`stepcal.calibration.closed_loop`), ``sum(soft(log(predicted / measured) / sigma)^2 / rows of the run) + sum((log
value - log prior)^2 / tau^2)`` on training rows, and compared on those and on validation rows.
The test part is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from stepcal.calibration.closed_loop import interval_scales
from stepcal.calibration.gauss_newton import significant
from stepcal.calibration.robust import soft
from stepcal.calibration.training_rows import RequestLevel, training_rows
from stepcal.errors import InputError
from stepcal.step_time.physical import PhysicalFeatures, PhysicalModel, Values
from stepcal.step_time.physical_parameters import STEP_PARAMETERS, LearnedParameter, by_name
from stepcal.units import NS_PER_US, PERCENT, FloatArray

SUPPORT_OBJECTIVE = 4.0
"""Smallest difference of objectives (``-2 log`` of a posterior density) that counts: two standard deviations of a number."""
CONVERGED = 1e-14
"""Relative change of parameters, objective and gradient at which a form is fitted: as far as differences of it go."""
SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "cannot tell"


class SumOfWeightsAndGemm(PhysicalModel):
    """Reading weights and computing take turns."""

    def _gpu_parts_us(self, values: Values, features: PhysicalFeatures) -> dict[str, FloatArray]:
        parts = super()._gpu_parts_us(values, features)
        return parts | {"weights_gemm": features.weights_us * values["hbm_read_factor"] + features.gemm_us}


class SumOfGpuAndHost(PhysicalModel):
    """GPU and scheduler take turns."""

    def predict_us(self, values: Values, features: PhysicalFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return self.gpu_us(values, features) + self.host_us(values, features)


class TwoStagesAlways(PhysicalModel):
    """Every all-reduce is a reduce-scatter and an all-gather, however small the message."""

    def _all_reduce_us(self, values: Values, features: PhysicalFeatures) -> tuple[FloatArray, FloatArray]:
        _, two = super()._all_reduce_us(values, features)
        return two, two


class OneStageAlways(PhysicalModel):
    """Every all-reduce sends everything to every rank at once."""

    def _all_reduce_us(self, values: Values, features: PhysicalFeatures) -> tuple[FloatArray, FloatArray]:
        one, _ = super()._all_reduce_us(values, features)
        return one, one


class TwoBandwidths(PhysicalModel):
    """KV is read at a factor of its own, the tenth parameter."""

    def _gpu_parts_us(self, values: Values, features: PhysicalFeatures) -> dict[str, FloatArray]:
        pieces = features.kv_pieces * values["kv_block_ns"] / NS_PER_US
        return super()._gpu_parts_us(values, features) | {"kv": features.kv_us * values["kv_read_factor"] + pieces}


class PhaseModel(PhysicalModel):
    """Steps with prefill read weights at a factor of their own, and a request costs another time in them.

    The time a layer is told apart by the global model already (`mixed_layer_us`). Of the mean of several steps, the share
    with prefill counts.
    """

    def _gpu_parts_us(self, values: Values, features: PhysicalFeatures) -> dict[str, FloatArray]:
        share = np.divide(
            features.mixed_layers, features.layers, out=np.zeros(len(features)), where=features.layers > 0
        )
        decode, mixed = (
            np.maximum(features.weights_us * values[name], features.gemm_us)
            for name in ("hbm_read_factor", "mixed_hbm_read_factor")
        )
        request = (1.0 - share) * values["request_us"] + share * values["mixed_request_us"]
        return super()._gpu_parts_us(values, features) | {
            "weights_gemm": (1.0 - share) * decode + share * mixed,
            "requests": features.requests * request,
        }


def _like(name: str, new_name: str) -> LearnedParameter:
    return replace(next(p for p in STEP_PARAMETERS if p.name == name), name=new_name)


PHASE_PARAMETERS = (_like("hbm_read_factor", "mixed_hbm_read_factor"), _like("request_us", "mixed_request_us"))
"""What steps with prefill have of their own; the priors are those of the number that both share in the global model."""


def _same(features: PhysicalFeatures) -> PhysicalFeatures:
    return features


@dataclass(frozen=True)
class Form:
    """A form of the step time.

    Attributes
    ----------
    name, what : str
        Key, and in words.
    model : PhysicalModel
    features : callable
        What it makes of the features.
    extra : tuple of LearnedParameter
        Parameters beyond the nine.
    n_dropped : int
        Numbers of the nine that have no effect in it.
    """

    name: str
    what: str
    model: PhysicalModel
    features: Callable[[PhysicalFeatures], PhysicalFeatures] = _same
    extra: tuple[LearnedParameter, ...] = ()
    n_dropped: int = 0

    @property
    def parameters(self) -> tuple[LearnedParameter, ...]:
        """The nine and those beyond."""
        return (*STEP_PARAMETERS, *self.extra)

    def predict_us(self, values: Values, features: PhysicalFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return self.model.predict_us(values, self.features(features))


SHIPPED = Form("shipped", "the shipped form", PhysicalModel())
PHASES = Form("phases", "weights and requests of steps with prefill apart", PhaseModel(), extra=PHASE_PARAMETERS)
FORMS = (
    SHIPPED,
    Form("sum_weights_gemm", "weights + GEMM in place of their maximum", SumOfWeightsAndGemm()),
    Form("sum_gpu_host", "GPU + host in place of their maximum", SumOfGpuAndHost()),
    Form(
        "two_bandwidths",
        "a bandwidth factor each for weights and KV",
        TwoBandwidths(),
        extra=(_like("hbm_read_factor", "kv_read_factor"),),
    ),
    Form("two_stages", "all-reduce always in two stages", TwoStagesAlways()),
    Form("one_stage", "all-reduce always in one stage", OneStageAlways()),
    Form(
        "no_offload",
        "no scan of the offload pool",
        PhysicalModel(),
        lambda f: replace(f, scanned=np.zeros(len(f))),
        n_dropped=1,
    ),
    Form(
        "no_kv_blocks",
        "no time a KV block, only its bytes",
        PhysicalModel(),
        lambda f: replace(f, kv_pieces=np.zeros(len(f))),
        n_dropped=1,
    ),
)
"""The shipped form and its alternatives."""


@dataclass(frozen=True)
class FormFit:
    """Learned parameters by name, the objective that they reach, and its part without priors."""

    values: dict[str, float]
    objective: float
    misfit: float


def fit_form(form: Form, rows: RequestLevel) -> FormFit:
    """Fit a form to decode intervals, with the request level's objective and priors.

    Parameters
    ----------
    form : Form
    rows : RequestLevel
        Training rows.

    Returns
    -------
    FormFit

    Raises
    ------
    InputError
        If there is no row.
    """
    if rows.rows.empty:
        raise InputError("`rows` has no request to fit. Give the training rows of at least one experiment.")
    sigma, share = interval_scales(rows)
    measured = rows.rows["interval_us"].to_numpy(dtype=float)
    priors, scale = (
        np.array(v) for v in zip(*((np.log(p.start), p.prior_log_sd) for p in form.parameters), strict=True)
    )
    low, high = np.log([[p.low for p in form.parameters], [p.high for p in form.parameters]])

    def residuals(x: FloatArray) -> FloatArray:
        errors = np.log(form.predict_us(by_name(np.exp(x), form.parameters), rows.features) / measured) / sigma
        return np.concatenate([share * soft(errors), (x - priors) / scale])

    until = {"xtol": CONVERGED, "ftol": CONVERGED, "gtol": CONVERGED}
    solution = least_squares(residuals, priors, jac="3-point", bounds=(low, high), x_scale=scale, **until)
    return FormFit(
        by_name(significant(np.exp(solution.x)), form.parameters),
        float(2.0 * solution.cost),
        float(np.sum(residuals(solution.x)[: measured.size] ** 2)),
    )


def compare_forms(level: RequestLevel, forms: Sequence[Form] = FORMS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Refit every form to the training rows and score it on training and validation rows.

    A form is *contradicted* if its objective is worse than that of the first by more than `SUPPORT_OBJECTIVE` and its
    validation MAPE too, *supported* if both are better, and else the data cannot tell.

    Parameters
    ----------
    level : RequestLevel
        All requests; those of the test part are not used.
    forms : sequence of Form
        The first is what the others are compared with.

    Returns
    -------
    forms : DataFrame
        `form`, `what`, `n_numbers`, `objective`, `misfit` (its part without priors), `objective_more` than the first's,
        `train_percent`, `valid_percent` (mean over runs of the MAPE), `valid_median_percent` (mean over runs of the median
        absolute error), `valid_overloaded_percent` (MAPE of overloaded runs alone), `verdict` (none for the first).
    values : DataFrame
        `form`, `name`, `unit`, `value`.
    """
    rows = training_rows(level)
    table, values = [], []
    for form in forms:
        fitted = fit_form(form, rows)
        predicted = form.predict_us(fitted.values, level.features)
        size = PERCENT * np.abs(predicted / level.rows["interval_us"].to_numpy(dtype=float) - 1.0)
        runs = level.rows.assign(size=size).groupby(["split", "experiment_id"])
        mape, median = runs["size"].mean(), runs["size"].median()
        full = runs["overloaded"].first()
        table.append(
            {
                "form": form.name,
                "what": form.what,
                "n_numbers": len(form.parameters) - form.n_dropped,
                "objective": fitted.objective,
                "misfit": fitted.misfit,
                "train_percent": float(mape["train"].mean()),
                "valid_percent": float(mape["valid"].mean()),
                "valid_median_percent": float(median["valid"].mean()),
                "valid_overloaded_percent": float(mape["valid"][full["valid"]].mean()),
            }
        )
        values += [
            {"form": form.name, "name": p.name, "unit": p.unit, "value": fitted.values[p.name]} for p in form.parameters
        ]
    forms_table = pd.DataFrame(table)
    more = forms_table["objective"] - forms_table["objective"].iloc[0]
    worse = forms_table["valid_percent"] - forms_table["valid_percent"].iloc[0]
    verdict = np.where(
        (more > SUPPORT_OBJECTIVE) & (worse > 0),
        CONTRADICTED,
        np.where((more < -SUPPORT_OBJECTIVE) & (worse < 0), SUPPORTED, OPEN),
    )
    verdict[0] = "reference"
    return forms_table.assign(objective_more=more, verdict=verdict), pd.DataFrame(values)
