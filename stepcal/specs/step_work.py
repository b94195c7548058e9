"""What a rank has to do in a step: bytes of weights and KV to read, FLOPs to compute, bytes to exchange.

Everything is per rank; keys and values replicate where ranks outnumber their heads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from stepcal.specs.deployment import Deployment
from stepcal.specs.weight_formats import FULL_WIDTH
from stepcal.units import US_PER_S, FloatArray

FLOPS_PER_MAC = 2
BYTES_PER_ACTIVATION = 2
"""BF16 and FP16 alike; what collectives move is of this width."""
COLLECTIVES_PER_LAYER = 2
"""All-reduces after attention and after the MLP (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053)."""


def weight_bytes(tokens: ArrayLike, deployment: Deployment) -> FloatArray:
    """Bytes of weights that a rank reads in a step of some tokens.

    A mixture layer reads the experts that its tokens visit: with `k` of `E` experts a token, chosen evenly, ``T`` tokens
    touch ``E (1 - (1 - k / E)^T)`` of them. Keys and values replicate where there are fewer heads than ranks. The
    embedding is a look-up and not read; the output matrix is. Each group of weights has its own width, scales included.

    Parameters
    ----------
    tokens : array_like of float, shape (n_steps,)
    deployment : Deployment

    Returns
    -------
    ndarray of float, shape (n_steps,)
    """
    t, architecture = np.atleast_1d(np.asarray(tokens, dtype=float)), deployment.architecture
    attention, mlp, expert, router, head = _weights_of_a_rank(deployment)
    widths = architecture.widths
    touched = architecture.num_experts * (1.0 - (1.0 - architecture.active_expert_fraction) ** t)
    size = attention * widths.attention + mlp * widths.mlp + head * widths.head + np.zeros_like(t)
    size += architecture.num_moe_layers * (touched * expert * widths.experts + router * FULL_WIDTH)
    return np.where(t > 0, size, 0.0)


def gemm_flops(tokens: ArrayLike, deployment: Deployment) -> FloatArray:
    """FLOPs of a rank's matrix products for some tokens, shape (n_steps,); a mixture computes the experts visited."""
    t, architecture = np.atleast_1d(np.asarray(tokens, dtype=float)), deployment.architecture
    attention, mlp, expert, router, head = _weights_of_a_rank(deployment)
    visited = architecture.num_moe_layers * (architecture.experts_per_token * expert + router)
    return FLOPS_PER_MAC * t * (attention + mlp + head + visited)


def all_reduce_bytes(tokens: ArrayLike, deployment: Deployment) -> tuple[FloatArray, FloatArray]:
    """Bytes that a rank receives in a step's all-reduces, if they take one stage or two; both of shape (n_steps,).

    In one stage a rank reads the message of each other rank; in two, a reduce-scatter and an all-gather, it receives
    ``2 (n - 1) / n`` of a message, but the ranks wait for each other twice. vLLM 0.15.1 has both kernels
    (csrc/custom_all_reduce.cuh), and takes one stage with two ranks or for small messages.
    """
    t = np.atleast_1d(np.asarray(tokens, dtype=float))
    architecture, ranks = deployment.architecture, deployment.tensor_parallel
    messages = COLLECTIVES_PER_LAYER * architecture.num_layers * t * architecture.hidden_size * BYTES_PER_ACTIVATION
    return messages * (ranks - 1), messages * 2.0 * (ranks - 1) / ranks


def floor_us(tokens: ArrayLike, kv_tokens: ArrayLike, deployment: Deployment) -> FloatArray:
    """Time in which the datasheet's bandwidth moves a step's weights and KV, shape (n_steps,): no step is shorter."""
    kv = np.atleast_1d(np.asarray(kv_tokens, dtype=float))
    kv_bytes = kv * deployment.kv_bytes_per_token
    return (weight_bytes(tokens, deployment) + kv_bytes) * (US_PER_S / deployment.accelerator.hbm_bandwidth)


def pair_flops(deployment: Deployment) -> float:
    """FLOPs of one query-context pair of prefill attention on a rank, all layers: scores and weighted sum of values."""
    a = deployment.architecture
    if a.latent is not None:
        return a.num_layers * a.num_attention_heads * a.latent.prefill_flops_per_head / deployment.tensor_parallel
    return 2.0 * FLOPS_PER_MAC * a.query_width * a.num_layers / deployment.tensor_parallel


def _weights_of_a_rank(deployment: Deployment) -> tuple[float, float, float, float, float]:
    """Elements on a rank: attention and dense MLPs of all layers, one expert, one router, the output matrix."""
    a, tp = deployment.architecture, deployment.tensor_parallel
    kv_width = max(a.num_kv_heads / tp, 1.0) * a.head_dim
    attention = a.num_layers * a.hidden_size * 2.0 * (a.query_width / tp + kv_width)
    if a.latent is not None:
        attention = a.num_layers * a.latent.elements(a.hidden_size, a.num_attention_heads / tp)
    mlp = (a.num_layers - a.num_moe_layers) * a.mlp_matrices * a.hidden_size * a.intermediate_size / tp
    mlp += a.num_moe_layers * a.mlp_matrices * a.hidden_size * a.shared_expert_intermediate_size / tp
    expert = a.mlp_matrices * a.hidden_size * a.expert_intermediate_size / tp
    return attention, mlp, expert, float(a.hidden_size * a.num_experts), a.vocab_size * a.hidden_size / tp
