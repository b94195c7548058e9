"""From a fitted step-time model to a step time that the simulator runs on, compiled for one deployment.

A correction model is a sum of a prefill term, a decode term and a constant, so it becomes tables over tokens and is
compiled. Baselines that are no such sums become a table over prefill tokens and decoding requests.
"""

from __future__ import annotations

import numpy as np

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, ServerConfig, StepTime
from stepcal.specs.deployment import Deployment
from stepcal.step_time.baselines import (
    BATCH_FEATURES,
    Blackbox,
    BucketMedianRatio,
    ConstantStep,
    GradientBoosting,
    RawAnalytical,
    StepBaseline,
)
from stepcal.step_time.corrections import SMALLEST_STEP_US, CorrectionModel, StepFeatures
from stepcal.step_time.decomposition import study_components_us
from stepcal.units import FloatArray, IntArray

AnyStepTime = CompiledStepTime | StepTime
"""What a simulator takes: tables over tokens and requests, or a callable."""


def compile_corrections(model: CorrectionModel, theta: FloatArray, deployment: Deployment) -> CompiledStepTime:
    """Compile a fitted correction model for one deployment.

    Parameters
    ----------
    model : CorrectionModel
    theta : ndarray, shape (n_parameters,)
    deployment : Deployment
        The limits of its server bound the tables.

    Returns
    -------
    CompiledStepTime

    Raises
    ------
    InputError
        If the model was not fitted to the architecture's family, or the deployment names no server.
    """

    def total(prefill: IntArray, decode: IntArray) -> FloatArray:
        return model.total_us(theta, StepFeatures.of_batches(prefill, decode, deployment))

    server = deployment.limits
    tokens, requests = np.arange(server.max_num_batched_tokens + 1), np.arange(server.max_num_seqs + 1)
    constant = float(total(np.zeros(1, int), np.zeros(1, int))[0])
    return CompiledStepTime(
        constant_us=constant,
        prefill_tokens_us=total(tokens, np.zeros_like(tokens)) - constant,
        decode_requests_us=total(np.zeros_like(requests), requests) - constant,
        floor_us=SMALLEST_STEP_US,
    )


def compile_baseline(baseline: StepBaseline, deployment: Deployment) -> CompiledStepTime:
    """Compile a fitted baseline for one deployment.

    Parameters
    ----------
    baseline : StepBaseline
        One of `stepcal.step_time.baselines`.
    deployment : Deployment
        The limits of its server bound the tables.

    Returns
    -------
    CompiledStepTime

    Raises
    ------
    InputError
        If the baseline looks at something that a simulator does not know before the step runs, or the deployment names
        no server.
    """
    if isinstance(baseline, ConstantStep):
        return CompiledStepTime(constant_us=baseline.median_us)
    if isinstance(baseline, Blackbox):
        intercept, per_prefill, per_decode = (float(c) for c in baseline.coefficients)
        return CompiledStepTime(
            constant_us=intercept,
            prefill_tokens_us=per_prefill,
            decode_requests_us=per_decode,
            floor_us=SMALLEST_STEP_US,
        )
    if isinstance(baseline, GradientBoosting):
        return _boosting_table(baseline, deployment.limits)
    prefill, decode = _raw_tables_us(deployment)
    if isinstance(baseline, RawAnalytical):
        return CompiledStepTime(prefill_tokens_us=prefill, decode_requests_us=decode, floor_us=SMALLEST_STEP_US)
    if isinstance(baseline, BucketMedianRatio):
        return _bucket_table(baseline, prefill, decode)
    raise InputError(
        f"No step time can be compiled from a `{type(baseline).__name__}`. Give the simulator a callable of your own."
    )


def _raw_tables_us(deployment: Deployment) -> tuple[FloatArray, FloatArray]:
    """Analytical time by prefill tokens, and by decode tokens."""
    server = deployment.limits
    tokens, requests = np.arange(server.max_num_batched_tokens + 1), np.arange(server.max_num_seqs + 1)

    def raw(prefill: IntArray, decode: IntArray) -> FloatArray:
        total: FloatArray = study_components_us(prefill, decode, deployment).sum(axis=1)
        return total

    return raw(tokens, np.zeros_like(tokens)), raw(np.zeros_like(requests), requests)


def _bucket_table(baseline: BucketMedianRatio, prefill_us: FloatArray, decode_us: FloatArray) -> CompiledStepTime:
    import pandas as pd

    ratios = baseline.ratio(pd.DataFrame({"decode_tokens": np.arange(decode_us.size)}))
    raw = np.maximum(prefill_us[:, None] + decode_us, SMALLEST_STEP_US)
    return CompiledStepTime(batch_us=raw * ratios)


def _boosting_table(baseline: GradientBoosting, server: ServerConfig) -> CompiledStepTime:
    import pandas as pd

    if tuple(baseline.features) != BATCH_FEATURES:
        raise InputError(
            f"Trees that see {', '.join(baseline.features)} cannot drive a simulator, which knows only "
            f"{', '.join(BATCH_FEATURES)} before a step runs. Fit `GradientBoosting(features=BATCH_FEATURES)`."
        )
    shape = (server.max_num_batched_tokens + 1, server.max_num_seqs + 1)
    prefill, decode = (tokens.ravel() for tokens in np.indices(shape))
    batches = pd.DataFrame({"prefill_tokens": prefill, "decode_tokens": decode})
    return CompiledStepTime(batch_us=baseline.predict_us(batches).reshape(shape))
