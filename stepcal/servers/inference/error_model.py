"""By what a calibration expects the model to miss a server that it knows: the covariance of its log errors.

The model errs by stage of load: each of its steps takes longer or shorter there by one unknown factor. What that does to a
mean is simulated, so near saturation, where 1% of step time is 20% of TTFT, a TTFT says little. The first token has an
error of its own, blocks of time another, and where arrivals are drawn instead of known, so has their draw.

Errors of stages do not average out over their requests: a stage of 10,000 requests is one figure, not 10,000. How large they
are differs between servers, so several stages of one server also say how large they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from stepcal.servers.inference.blocks import Block, figures_of, log_errors
from stepcal.servers.log import ServedLog
from stepcal.servers.replay import replayed_latencies_s
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.threads import each
from stepcal.units import FloatArray, IntArray

FACTOR_LOG_STEP = 0.01
"""Step of the central difference by a factor on the step time: a little less than a stage's error."""
MISSING_LOG_ERROR = 3.0
"""Error of a figure of which nothing completes in the simulation: a factor of 20."""


@dataclass(frozen=True)
class StageError:
    """By what a model misses a stage of load of a server whose like was left out of its fit.

    Attributes
    ----------
    step_log_sd : float
        Standard deviation of the logarithm of the step time.
    ttft_log_sd : float
        Of TTFT, beyond what the step time does to it.
    """

    step_log_sd: float
    ttft_log_sd: float


STAGE_ERRORS = {"kernels": StageError(0.020, 0.085), "default": StageError(0.012, 0.085)}
"""By variant: root mean squares over the 20 stages of the 12 runs of the study that are not overloaded, each model left out
of a fit to the others (``python -m stepcal.studies.kernels.stage_errors``). No other run was looked at for them."""


FREEDOM = 4.0
"""Degrees of freedom of the spread of that size between servers: its square is ``(FREEDOM - 2) / chi-square(FREEDOM)`` times
that above. The 12 runs prefer 3 for the kernel model and a normal law for the older one, both by less than 2 in log
likelihood; 4 is our judgement. It lets stages that agree with each other say so."""
FACTORS: FloatArray = 2.0 ** np.arange(-4.0, 2.5, 0.5)
"""Grid of factors on a server's stage errors."""


@dataclass(frozen=True)
class ErrorModel:
    """Covariance of figures' log errors: ``fixed + factor^2 stage``, the factor a server's own.

    Both parts are diagonal after one rotation, so that a factor costs nothing.

    Attributes
    ----------
    groups : tuple of ndarray of int
        Figures whose errors depend on each other: those of a stage.
    rotations : tuple of ndarray
        Of each group, to independent figures whose fixed part has unit variance.
    stage_variance : ndarray, shape (n_figures,)
        Their stage part.
    """

    groups: tuple[IntArray, ...]
    rotations: tuple[FloatArray, ...]
    stage_variance: FloatArray

    def rotated(self, errors: FloatArray) -> FloatArray:
        """Rotate log errors, shape (n_figures,); one that is missing counts as `MISSING_LOG_ERROR`."""
        known = np.where(np.isnan(errors), MISSING_LOG_ERROR, errors)
        result = np.empty_like(known)
        for own, rotation in zip(self.groups, self.rotations, strict=True):
            result[own] = rotation @ known[own]
        return result

    def variance(self, factor: float) -> FloatArray:
        """Variance of the rotated figures, shape (n_figures,)."""
        return np.asarray(1.0 + factor**2 * self.stage_variance, dtype=np.float64)


def factor_log_weights() -> FloatArray:
    """Return the prior probability of each of `FACTORS`, as logarithms."""
    log_density = chi2.logpdf((FREEDOM - 2.0) / FACTORS**2, FREEDOM) - 2.0 * np.log(FACTORS)
    return np.asarray(log_density - np.logaddexp.reduce(log_density), dtype=np.float64)


def error_model_at(
    logs: Sequence[ServedLog], blocks: Sequence[Block], coefficients: StepTimeModel, *, workers: int = 1
) -> ErrorModel:
    """Return the error model of the blocks' figures, with sensitivities simulated at some coefficients.

    Parameters
    ----------
    logs : sequence of ServedLog
    blocks : sequence of Block
    coefficients : StepTimeModel
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    ErrorModel
    """
    error = STAGE_ERRORS[coefficients.variant]
    slopes = factor_slopes(logs, blocks, coefficients, workers=workers)
    drawn = arrivals_log_sd(logs, blocks, coefficients, workers=workers)
    figures = figures_of(blocks)
    fixed = np.array([block.log_sd[name] for block, name in figures]) ** 2 + drawn**2
    first_token = np.array([name == "ttft" for _, name in figures], dtype=np.float64)
    keys = [(block.log, block.stage) for block, _ in figures]
    groups, rotations, variances = [], [], np.empty(len(figures))
    for key in dict.fromkeys(keys):
        own = np.flatnonzero([k == key for k in keys])
        stage = error.step_log_sd**2 * np.outer(slopes[own], slopes[own])
        stage += error.ttft_log_sd**2 * np.outer(first_token[own], first_token[own])
        scale = 1.0 / np.sqrt(fixed[own])
        values, vectors = np.linalg.eigh(scale[:, None] * stage * scale)
        groups.append(own)
        rotations.append(np.asarray(vectors.T * scale, dtype=np.float64))
        variances[own] = np.maximum(values, 0.0)
    return ErrorModel(tuple(groups), tuple(rotations), variances)


def factor_slopes(
    logs: Sequence[ServedLog], blocks: Sequence[Block], coefficients: StepTimeModel, *, workers: int = 1
) -> FloatArray:
    """Return by how many percent each figure grows when every step takes 1% longer, shape (n_figures,)."""

    def at(log_factor: float) -> FloatArray:
        factor = float(np.exp(log_factor))
        simulated = each(lambda log: replayed_latencies_s(log, coefficients, step_factor=factor), logs, workers=workers)
        return log_errors(logs, blocks, simulated)

    slopes = (at(FACTOR_LOG_STEP) - at(-FACTOR_LOG_STEP)) / (2 * FACTOR_LOG_STEP)
    return np.nan_to_num(np.asarray(slopes, dtype=np.float64), nan=1.0)


def arrivals_log_sd(
    logs: Sequence[ServedLog], blocks: Sequence[Block], coefficients: StepTimeModel, *, workers: int = 1
) -> FloatArray:
    """Return what other arrivals change of each figure, shape (n_figures,): 0 where the run's own are known.

    The measured mean is over one draw and the simulated one over another, so their difference has twice the variance.
    """

    def spread(i: int) -> dict[tuple[int, str], float]:
        log = logs[i]
        means: dict[tuple[int, str], list[float]] = {}
        for requests in log.redraws:
            e2e, ttft = replayed_latencies_s(log, coefficients, requests=requests)
            stage = np.zeros(len(requests)) if requests.stage is None else np.asarray(requests.stage)
            gaps = np.maximum(np.asarray(requests.output_tokens, dtype=float) - 1, 1)
            for s in np.unique(stage):
                done = (stage == s) & ~np.isnan(e2e)
                for name, values in (("tpot", (e2e - ttft) / gaps), ("ttft", ttft)):
                    means.setdefault((int(s), name), []).append(np.log(values[done].mean()) if done.any() else np.nan)
        return {key: float(np.sqrt(2) * np.std(values, ddof=1)) for key, values in means.items()}

    drawn = [i for i, log in enumerate(logs) if log.redraws]
    spreads = dict(zip(drawn, each(spread, drawn, workers=workers), strict=True))
    return np.array([spreads.get(block.log, {}).get((block.stage, name), 0.0) for block, name in figures_of(blocks)])
