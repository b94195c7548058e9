"""What attention costs in the layers of a deployment, from measured kernels: keys and values of heads, or latents.

Either kind is affine in what a request reads, so a handful of numbers says all. Products of latent attention are here, too,
because widening matrices are absorbed; decode reads the latents as they are, prefill widens them for each head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepcal.errors import InputError
from stepcal.kernels import GpuKernels
from stepcal.kernels.constants import CHECKS_FILE, attention_bias
from stepcal.kernels.forms import (
    BYTES_PER_ACTIVATION,
    DECODE_ATTENTION,
    GEMM,
    MLA_DECODE,
    MLA_PREFILL,
    PRECISIONS,
    PREFILL_ATTENTION,
    PREFILL_OF_WIDTH,
)
from stepcal.specs.deployment import Deployment
from stepcal.specs.latent_attention import LatentAttention
from stepcal.specs.step_work import FLOPS_PER_MAC, pair_flops
from stepcal.step_time.kernel_parameters import SMALL_KERNEL_US
from stepcal.units import PERCENT, US_PER_S

SMALL_KERNELS_OF_A_MODULE = 2
"""Rotary embedding and the writing of the cache: modules of latent attention were timed with them, and `layer_us` counts
them again."""

NOTED_BIAS = 0.1
"""Smaller medians lie within the spread of most tables."""


@dataclass(frozen=True)
class AttentionCosts:
    """Attention of one layer of a deployment, in microseconds.

    Attributes
    ----------
    floor_us : float
        Of any step.
    request_us, token_us : float
        Of a decoding request, and of a token of context that it reads.
    prefill_token_us, prefill_kv_us, pair_us : float
        Of a prompt token, of a token of context that a prompt reads, and of a query-context pair.
    """

    floor_us: float
    request_us: float
    token_us: float
    prefill_token_us: float
    prefill_kv_us: float
    pair_us: float


def attention_kernels(deployment: Deployment, kernels: GpuKernels) -> list[tuple[str, str]]:
    """Return the kernels and precisions that a deployment's attention takes: of its heads' width where the GPU has one."""
    a, precision = deployment.architecture, deployment.kv_precision
    if a.latent is not None:
        return [(MLA_DECODE, precision), (MLA_PREFILL, precision)]
    own = PREFILL_OF_WIDTH.get(a.head_dim, PREFILL_ATTENTION)
    is_known = (own, precision) in kernels.constants
    return [(DECODE_ATTENTION, precision), (own if is_known else PREFILL_ATTENTION, precision)]


def attention_costs(deployment: Deployment, kernels: GpuKernels) -> AttentionCosts:
    """Return what attention costs in a layer.

    Parameters
    ----------
    deployment : Deployment
    kernels : GpuKernels

    Returns
    -------
    AttentionCosts
    """
    latent = deployment.architecture.latent
    return _of_heads(deployment, kernels) if latent is None else _of_latents(latent, deployment, kernels)


def _of_heads(deployment: Deployment, kernels: GpuKernels) -> AttentionCosts:
    a, tp, accelerator = deployment.architecture, deployment.tensor_parallel, deployment.accelerator
    decode, prefill = (kernels.of(*kernel) for kernel in attention_kernels(deployment, kernels))
    kv_heads, heads = max(a.num_kv_heads / tp, 1.0), a.num_attention_heads / tp
    a_byte = US_PER_S / accelerator.hbm_bandwidth
    kv_bytes = 2.0 * kv_heads * a.head_dim * PRECISIONS[deployment.kv_precision]
    pair = 2.0 * FLOPS_PER_MAC * heads * a.head_dim
    moved = 2.0 * (heads + kv_heads) * a.head_dim * BYTES_PER_ACTIVATION
    token_us = kv_bytes * a_byte / decode.bandwidth_share
    return AttentionCosts(
        floor_us=decode.floor_us,
        request_us=decode.unit_us * kv_heads,
        token_us=token_us,
        prefill_token_us=moved * a_byte / prefill.bandwidth_share,
        prefill_kv_us=token_us,
        pair_us=pair * US_PER_S / (accelerator.bf16_dense_flops * prefill.compute_share),
    )


def _of_latents(latent: LatentAttention, deployment: Deployment, kernels: GpuKernels) -> AttentionCosts:
    """Latents of all heads are read once; each head multiplies with them, so that many heads are bound by FLOPs.

    A prompt widens what it reads of its own context. What it computes in this step is widened by its products already.
    """
    a, accelerator = deployment.architecture, deployment.accelerator
    decode, prefill = (kernels.of(*kernel) for kernel in attention_kernels(deployment, kernels))
    heads = a.num_attention_heads / deployment.tensor_parallel
    a_byte, a_flop = US_PER_S / accelerator.hbm_bandwidth, US_PER_S / accelerator.bf16_dense_flops
    memory = latent.latent_width * PRECISIONS[deployment.kv_precision] * a_byte
    # Both parts are linear in the context, so a blend of the two is: the time of a token holds for any number of them.
    token_us = float(replace(decode, floor_us=0.0).time_us(memory, heads * latent.decode_flops_per_head * a_flop))
    moved = heads * latent.prefill_width * BYTES_PER_ACTIVATION * a_byte / prefill.bandwidth_share
    widened = heads * (latent.nope_dim + latent.value_dim)
    products = kernels.of(GEMM, "bf16")
    widen_us = FLOPS_PER_MAC * widened * latent.kv_rank * a_flop / products.compute_share
    widen_us += widened * BYTES_PER_ACTIVATION * a_byte / products.bandwidth_share
    a_pair = pair_flops(deployment) / a.num_layers
    return AttentionCosts(
        floor_us=max(decode.floor_us - SMALL_KERNELS_OF_A_MODULE * SMALL_KERNEL_US, 0.0),
        request_us=decode.unit_us,
        token_us=token_us,
        prefill_token_us=max(prefill.unit_us + moved - widen_us, 0.0),
        prefill_kv_us=widen_us,
        pair_us=a_pair * a_flop / prefill.compute_share,
    )


def attention_notes(deployment: Deployment) -> list[str]:
    """Return what to know of a deployment's attention: what no server stands behind, and what its kernel's tables deny."""
    return unvalidated_notes(deployment) + _biases(deployment)


def unvalidated_notes(deployment: Deployment) -> list[str]:
    """Return what no measured server stands behind."""
    notes = []
    if deployment.architecture.latent is not None:
        notes.append(
            "Latent attention is fitted to timings of DeepSeek-V3's attention modules; its step times are not validated end "
            "to end, as no server with it was measured."
        )
    if deployment.kv_precision == "fp8":
        notes.append(
            "An FP8 KV cache is known from timings of kernels; its step times are not validated end to end, as no server "
            "with one was measured."
        )
    if deployment.windows is not None:
        notes.append("No server of a model with windows was measured; its step times are not validated end to end.")
    return notes


def _biases(deployment: Deployment) -> list[str]:
    """Attention of heads and windows that the constants were not fitted to, where its tables differ by much."""
    a, gpu = deployment.architecture, deployment.accelerator.name
    if a.latent is not None:
        return []
    windows = deployment.windows
    kinds = {0} if windows is None else {windows.window, *({0} if windows.n_full else ())}
    notes = []
    for window in sorted(kinds):
        for kernel in (DECODE_ATTENTION, PREFILL_ATTENTION):
            bias = attention_bias(gpu, kernel, head_dim=a.head_dim, window=window)
            if bias is not None and abs(bias) > NOTED_BIAS:
                of = f"a window of {window} tokens" if window else "the whole context"
                percent, side = PERCENT * abs(bias), "less" if bias < 0 else "more"
                notes.append(
                    f"`{kernel}` of heads of {a.head_dim} elements over {of} is predicted to take {percent:.0f}% {side} "
                    f"than in its tables on `{gpu}` (data/hardware/{CHECKS_FILE})."
                )
    return notes


def latent_products(deployment: Deployment) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return outputs and inputs of the products of a layer's latent attention on a rank.

    Returns
    -------
    stored : list of (columns, depth)
        In the checkpoint's precision.
    absorbed : list of (columns, depth)
        The widening matrices, which vLLM keeps in 16 bits for decode.

    Raises
    ------
    InputError
        If the model has no latent attention.
    """
    a = deployment.architecture
    if a.latent is None:
        raise InputError(f"`{a.name}` has no latent attention.")
    heads = a.num_attention_heads / deployment.tensor_parallel
    down, queries, keys, values, out = (p.of_heads(heads) for p in a.latent.products(a.hidden_size, absorbed=True))
    return [down, queries, out], [keys, values]
