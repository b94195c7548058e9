"""Splits a step into the time of its parts: from step rows to component times, before anything is learned.

The study's backbone is four FLOP counts over the peak rate, ``time = FLOPs / (tensor_parallel * peak)``, for prefill and
decode, GEMM and attention. It is kept here exactly as published, its two faults included (see `study_components_us`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcal.errors import InputError
from stepcal.specs.architecture import ModelArchitecture, load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import Accelerator
from stepcal.specs.step_work import BYTES_PER_ACTIVATION, FLOPS_PER_MAC
from stepcal.step_time.attention_kinds import refuse_latent
from stepcal.units import US_PER_S, FloatArray

if TYPE_CHECKING:
    import pandas as pd

STUDY_COMPONENTS = ("prefill_gemm", "prefill_attn", "decode_gemm", "decode_attn")
"""Order of the components wherever they are columns of an array."""

GATED_MLP_MATRICES = 3
"""Gate, up and down projection, as the study counts every model's MLP (``6 T d d_ff`` FLOPs)."""


def study_components_us(
    prefill_tokens: ArrayLike,
    decode_tokens: ArrayLike,
    deployment: Deployment,
) -> FloatArray:
    """Component times of the study's analytical backbone, as published.

    With ``T`` tokens a layer's GEMMs take ``2 T (d^2 + 2 d d_kv) + 2 T d^2 + 6 T d d_ff m`` FLOPs, where `m` is the
    share of experts that a token visits; prefill attention takes ``4 H P max(P / 2, 1) head_dim``; decode attention is
    zero, since the traces do not say how long each request's context is.

    Parameters
    ----------
    prefill_tokens, decode_tokens : array_like of int, shape (n_steps,)
    deployment : Deployment

    Returns
    -------
    ndarray of float, shape (n_steps, 4)
        Microseconds, in the order of `STUDY_COMPONENTS`.

    Raises
    ------
    InputError
        If token counts are negative or of unequal length.
    NotModelledError
        If the model has latent attention.

    Notes
    -----
    Two faults are kept, because the replication needs them. (1) `m` multiplies the width of *one* expert, so a mixture's
    MLP is too small by the number of experts: Mixtral visits 2 of 8 experts and is charged a quarter of one. (2) A step
    that decodes reads every weight and the whole KV cache from memory, and neither has a term here.

    References
    ----------
    The study of February 2026, ``hypotheses/h-stepml`` in the public repository ``inference-sim/inference-sim``.
    """
    refuse_latent(deployment, "the study's four components")
    prefill, decode = _token_counts(prefill_tokens, decode_tokens)
    architecture = deployment.architecture
    us_per_flop = US_PER_S / deployment.accelerator.bf16_dense_flops
    layers_per_rank = architecture.num_layers / deployment.tensor_parallel
    gemm_us_per_token = _study_gemm_flops_per_token(architecture) * layers_per_rank * us_per_flop

    attention_pairs = prefill * np.maximum(prefill / 2, 1.0)
    # Scores and the weighted sum of values: two matrix products, each one multiply and one add a pair and dimension.
    attention_us_per_pair = 2 * FLOPS_PER_MAC * architecture.query_width * layers_per_rank * us_per_flop

    components = np.zeros((prefill.size, len(STUDY_COMPONENTS)))
    components[:, 0] = gemm_us_per_token * prefill
    components[:, 1] = attention_us_per_pair * attention_pairs
    components[:, 2] = gemm_us_per_token * decode
    return components


def study_intensities(
    prefill_tokens: ArrayLike, decode_tokens: ArrayLike, architecture: ModelArchitecture
) -> FloatArray:
    """Arithmetic intensity of each component, which tells the compute-bound regime from the memory-bound one.

    GEMMs read their weights once a step, so ``T`` tokens do ``2 T`` FLOPs a weight; prefill attention moves queries,
    keys, values and outputs once; decode attention reads each KV element once for the queries that share its head.

    Parameters
    ----------
    prefill_tokens, decode_tokens : array_like of int, shape (n_steps,)
    architecture : ModelArchitecture

    Returns
    -------
    ndarray of float, shape (n_steps, 4)
        FLOP/byte, in the order of `STUDY_COMPONENTS`.

    References
    ----------
    Williams, Waterman and Patterson (2009), "Roofline", CACM 52(4), doi:10.1145/1498765.1498785.
    """
    prefill, decode = _token_counts(prefill_tokens, decode_tokens)
    flops_per_weight_byte = FLOPS_PER_MAC / architecture.bytes_per_weight
    attention_flops = 2 * FLOPS_PER_MAC * architecture.query_width * np.maximum(prefill / 2, 1.0)
    attention_bytes = BYTES_PER_ACTIVATION * 2 * (architecture.query_width + architecture.kv_width)
    queries_per_kv_head = architecture.num_attention_heads / architecture.num_kv_heads
    return np.column_stack(
        [
            flops_per_weight_byte * prefill,
            np.where(prefill > 0, attention_flops / attention_bytes, 0.0),
            flops_per_weight_byte * decode,
            np.where(decode > 0, queries_per_kv_head * FLOPS_PER_MAC / BYTES_PER_ACTIVATION, 0.0),
        ]
    )


def decompose(steps: pd.DataFrame, accelerator: Accelerator) -> pd.DataFrame:
    """Component times of step rows of any mix of models and tensor-parallel degrees.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows: `model`, `tensor_parallel`, `prefill_tokens` and `decode_tokens` are used.
    accelerator : Accelerator

    Returns
    -------
    DataFrame, indexed as `steps`
        A column ``<component>_us`` for each of `STUDY_COMPONENTS`.

    Raises
    ------
    InputError
        If a model is unknown or a tensor-parallel degree does not divide its heads.
    """
    import pandas as pd

    components = np.zeros((len(steps), len(STUDY_COMPONENTS)))
    for rows, architecture, tensor_parallel in _server_groups(steps):
        components[rows] = study_components_us(
            steps["prefill_tokens"].to_numpy()[rows],
            steps["decode_tokens"].to_numpy()[rows],
            Deployment(architecture, accelerator, tensor_parallel),
        )
    return pd.DataFrame(components, index=steps.index, columns=[f"{name}_us" for name in STUDY_COMPONENTS])


def intensities(steps: pd.DataFrame) -> FloatArray:
    """Arithmetic intensities (FLOP/byte) of step rows of any mix of models, shape (n_steps, 4)."""
    result = np.zeros((len(steps), len(STUDY_COMPONENTS)))
    for rows, architecture, _ in _server_groups(steps):
        result[rows] = study_intensities(
            steps["prefill_tokens"].to_numpy()[rows], steps["decode_tokens"].to_numpy()[rows], architecture
        )
    return result


def phase(steps: pd.DataFrame) -> pd.Series:
    """Name each step's phase: ``pure_prefill``, ``pure_decode``, ``mixed`` or ``empty``."""
    import pandas as pd

    has_prefill, has_decode = steps["prefill_tokens"] > 0, steps["decode_tokens"] > 0
    names = np.select(
        [has_prefill & has_decode, has_prefill, has_decode], ["mixed", "pure_prefill", "pure_decode"], default="empty"
    )
    return pd.Series(names, index=steps.index, name="phase")


def ridge_intensity(accelerator: Accelerator) -> float:
    """FLOP/byte at which a GPU turns from memory-bound to compute-bound, by its datasheet."""
    return accelerator.bf16_dense_flops / accelerator.hbm_bandwidth


def _study_gemm_flops_per_token(architecture: ModelArchitecture) -> float:
    hidden, kv_width = architecture.hidden_size, architecture.kv_width
    attention_weights = hidden * (hidden + 2 * kv_width) + hidden * hidden
    mlp_weights = GATED_MLP_MATRICES * hidden * architecture.intermediate_size * architecture.active_expert_fraction
    return FLOPS_PER_MAC * (attention_weights + mlp_weights)


def _server_groups(steps: pd.DataFrame) -> list[tuple[NDArray[np.intp], ModelArchitecture, int]]:
    """Row numbers of each (model, tensor-parallel degree) in `steps`."""
    groups: dict[Any, Any] = steps.groupby(["model", "tensor_parallel"], sort=False, observed=True).indices
    return [(rows, load_architecture(str(model)), int(degree)) for (model, degree), rows in groups.items()]


def _token_counts(prefill_tokens: ArrayLike, decode_tokens: ArrayLike) -> tuple[FloatArray, FloatArray]:
    counts = []
    for name, values in (("prefill_tokens", prefill_tokens), ("decode_tokens", decode_tokens)):
        array = np.atleast_1d(np.asarray(values, dtype=float))
        bad = np.flatnonzero(~((array >= 0) & np.isfinite(array)))
        if bad.size:
            raise InputError(f"`{name}[{bad[0]}]` is {array[bad[0]]}; a step schedules zero tokens or more.")
        counts.append(array)
    if counts[0].shape != counts[1].shape:
        raise InputError(
            f"`prefill_tokens` has {counts[0].size} steps and `decode_tokens` {counts[1].size}; give one of each a step."
        )
    return counts[0], counts[1]
