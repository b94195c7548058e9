"""From a fitted step-time model to a clock of the simulator.

A correction model is a sum of a prefill term, a decode term and a constant, so it becomes tables over tokens and is
compiled. Baselines that are no such sums become a table over prefill tokens and decoding requests.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, ServerConfig, StepTime
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.hardware import Accelerator
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

Clock = CompiledStepTime | StepTime


def correction_clock(
    model: CorrectionModel,
    theta: FloatArray,
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    server: ServerConfig,
    *,
    tensor_parallel: int,
) -> CompiledStepTime:
    """Compile a fitted correction model for one server.

    Parameters
    ----------
    model : CorrectionModel
    theta : ndarray, shape (n_parameters,)
    architecture : ModelArchitecture
    accelerator : Accelerator
    server : ServerConfig
        Its limits bound the tables.
    tensor_parallel : int

    Returns
    -------
    CompiledStepTime

    Raises
    ------
    InputError
        If the model was not fitted to the architecture's family, or `tensor_parallel` does not divide its heads.
    """

    def total(prefill: IntArray, decode: IntArray) -> FloatArray:
        features = StepFeatures.of_batches(prefill, decode, architecture, accelerator, tensor_parallel=tensor_parallel)
        return model.total_us(theta, features)

    tokens, requests = np.arange(server.max_num_batched_tokens + 1), np.arange(server.max_num_seqs + 1)
    constant = float(total(np.zeros(1, int), np.zeros(1, int))[0])
    return CompiledStepTime(
        constant_us=constant,
        prefill_tokens_us=total(tokens, np.zeros_like(tokens)) - constant,
        decode_requests_us=total(np.zeros_like(requests), requests) - constant,
        floor_us=SMALLEST_STEP_US,
    )


def baseline_clock(
    baseline: StepBaseline,
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    server: ServerConfig,
    *,
    tensor_parallel: int,
) -> CompiledStepTime:
    """Turn a fitted baseline into a clock of one server.

    Parameters are those of `correction_clock`, and `baseline` is one of `stepcal.step_time.baselines`.

    Raises
    ------
    InputError
        If the baseline looks at something that a simulator does not know before the step runs.
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
        return _boosting_clock(baseline, server)
    prefill, decode = _raw_tables_us(architecture, accelerator, server, tensor_parallel)
    if isinstance(baseline, RawAnalytical):
        return CompiledStepTime(prefill_tokens_us=prefill, decode_requests_us=decode, floor_us=SMALLEST_STEP_US)
    if isinstance(baseline, BucketMedianRatio):
        return _bucket_clock(baseline, prefill, decode)
    raise InputError(f"No clock for a `{type(baseline).__name__}`. Give the simulator a callable of your own.")


def _raw_tables_us(
    architecture: ModelArchitecture, accelerator: Accelerator, server: ServerConfig, tensor_parallel: int
) -> tuple[FloatArray, FloatArray]:
    """Analytical time by prefill tokens, and by decode tokens."""
    tokens, requests = np.arange(server.max_num_batched_tokens + 1), np.arange(server.max_num_seqs + 1)

    def raw(prefill: IntArray, decode: IntArray) -> FloatArray:
        components = study_components_us(prefill, decode, architecture, accelerator, tensor_parallel=tensor_parallel)
        total: FloatArray = components.sum(axis=1)
        return total

    return raw(tokens, np.zeros_like(tokens)), raw(np.zeros_like(requests), requests)


def _bucket_clock(baseline: BucketMedianRatio, prefill_us: FloatArray, decode_us: FloatArray) -> CompiledStepTime:
    ratios = baseline.ratio(pd.DataFrame({"decode_tokens": np.arange(decode_us.size)}))
    raw = np.maximum(prefill_us[:, None] + decode_us, SMALLEST_STEP_US)
    return CompiledStepTime(batch_us=raw * ratios)


def _boosting_clock(baseline: GradientBoosting, server: ServerConfig) -> CompiledStepTime:
    if tuple(baseline.features) != BATCH_FEATURES:
        raise InputError(
            f"Trees that see {', '.join(baseline.features)} cannot drive a simulator, which knows only "
            f"{', '.join(BATCH_FEATURES)} before a step runs. Fit `GradientBoosting(features=BATCH_FEATURES)`."
        )
    shape = (server.max_num_batched_tokens + 1, server.max_num_seqs + 1)
    prefill, decode = (tokens.ravel() for tokens in np.indices(shape))
    batches = pd.DataFrame({"prefill_tokens": prefill, "decode_tokens": decode})
    return CompiledStepTime(batch_us=baseline.predict_us(batches).reshape(shape))
