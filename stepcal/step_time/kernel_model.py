"""Step time from measured kernels: every kernel of a step by its shape, and a handful of scales that kernels cannot know.

``step = max(GPU, host)``, where ``GPU = s_products (products and experts of all layers + head) + s_attention attention +
KV blocks + layers (t_small + t_mixed if any prompt is computed) + all-reduces + sampler``. Token counts up to the largest
captured CUDA graph are padded as vLLM pads them. Attention is affine in the context that is read, so the model compiles
into the simulator's tables (`compile_kernels`) and is as fast there as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.kernels import GpuKernels, load_kernels
from stepcal.kernels.forms import (
    BYTES_PER_ACTIVATION,
    ELEMENTWISE,
    EXPERTS,
    GEMM,
    PRECISIONS,
    experts_us,
    gemm_us,
)
from stepcal.simulator import CompiledStepTime, StepBatch
from stepcal.specs.deployment import Deployment
from stepcal.specs.step_work import COLLECTIVES_PER_LAYER
from stepcal.specs.weight_formats import FULL_WIDTH
from stepcal.step_time.attention_kernels import (
    attention_costs,
    attention_kernels,
    attention_notes,
    latent_products,
)
from stepcal.step_time.attention_kinds import tokens_read, within_windows
from stepcal.step_time.cuda_graphs import graph_sizes, padded_tokens
from stepcal.step_time.kernel_parameters import (
    EXPERT_SKEW,
    FLASH_ATTENTION_3,
    KERNEL_PARAMETERS,
    KV_BLOCK_NS,
    SMALL_KERNEL_US,
    SMALL_KERNELS_A_LAYER,
)
from stepcal.step_time.physical import HOST_REQUEST_US
from stepcal.step_time.physical_parameters import checked
from stepcal.step_time.sampler import sampler_costs, sampler_note
from stepcal.units import NS_PER_US, US_PER_S, FloatArray

STEP_KERNEL_PARAMETERS = tuple(p for p in KERNEL_PARAMETERS if p.name != "api_before_us")
HEAD_PRECISION = "bf16"
OWN_PRECISION = {
    "fp8": "fp8", "fp8_block": "fp8_block", "int8": "int8", "int4": "int4", "fp4": "nvfp4", "mxfp4": "mxfp4",
}  # fmt: skip
"""Kernels of the weights that a checkpoint has in other than 16 bits, by their type."""


@dataclass(frozen=True)
class KernelParts:
    """The parts of one deployment's step that do not depend on what is learned.

    Attributes
    ----------
    products_us, collectives_us, small_excess_us : ndarray, shape (n_tokens,)
        Products of all layers, all-reduces, and what small kernels move beyond their floors, by tokens from 0.
    head_us, sampler_us : ndarray, shape (n_requests,)
        Output matrix, and sampling with the exchange of logits, by requests from 0.
    attention_floor_us, attention_request_us, attention_token_us, attention_prefill_kv_us, attention_pair_us : float
        All layers: of any step, a decoding request, a token of its context, a token of a prompt's context, a pair of query
        and context.
    attention_prefill_us : float
        All layers: of a prompt token.
    block_token_us : float
        All layers: what scattered KV blocks add to a token of context.
    layers : int
    """

    products_us: FloatArray
    collectives_us: FloatArray
    small_excess_us: FloatArray
    head_us: FloatArray
    sampler_us: FloatArray
    attention_floor_us: float
    attention_request_us: float
    attention_token_us: float
    attention_prefill_kv_us: float
    attention_pair_us: float
    attention_prefill_us: float
    block_token_us: float
    layers: int

    @property
    def fixed_us(self) -> FloatArray:
        """What nothing is learned of, by tokens from 0."""
        return self.collectives_us + self.small_excess_us


def kernel_parts(
    deployment: Deployment, *, kernels: GpuKernels | None = None, expert_skew: float = EXPERT_SKEW
) -> KernelParts:
    """Ask the kernels what each count of tokens and requests up to the server's limits costs.

    Parameters
    ----------
    deployment : Deployment
        With its server.
    kernels : GpuKernels, optional
        Others than those of the GPU.
    expert_skew : float
        Exponent of the routing's weights; 0 routes evenly.

    Returns
    -------
    KernelParts
    """
    own, server = kernels or load_kernels(deployment.accelerator), deployment.limits
    tokens, requests = np.arange(server.max_num_batched_tokens + 1), np.arange(server.max_num_seqs + 1)
    padded = padded_tokens(tokens, graph_sizes(server, deployment.accelerator.name))
    a, tp, attention = deployment.architecture, deployment.tensor_parallel, attention_costs(deployment, own)
    return KernelParts(
        products_us=_layers_us(padded, deployment, own, expert_skew),
        collectives_us=_collectives_us(padded, deployment, own),
        small_excess_us=_small_excess_us(tokens, deployment, own),
        head_us=gemm_us(
            own.of(GEMM, HEAD_PRECISION), deployment.accelerator, requests, a.vocab_size / tp, a.hidden_size
        )
        * (requests > 0),
        sampler_us=sampler_costs(requests, deployment).total_us + _logits_us(requests, deployment, own),
        attention_floor_us=a.num_layers * attention.floor_us,
        attention_request_us=a.num_layers * attention.request_us,
        attention_token_us=a.num_layers * attention.token_us,
        attention_prefill_kv_us=a.num_layers * attention.prefill_kv_us,
        attention_pair_us=a.num_layers * attention.pair_us,
        attention_prefill_us=a.num_layers * attention.prefill_token_us,
        block_token_us=a.num_layers * KV_BLOCK_NS / NS_PER_US / deployment.block_size,
        layers=a.num_layers,
    )


def _attention_scale(values: Mapping[str, float], deployment: Deployment) -> float:
    """The learned scale where the attention kernel is the one that it was learned on, else 1."""
    is_learned = deployment.accelerator.name in FLASH_ATTENTION_3 and deployment.architecture.latent is None
    return values["attention_scale"] if is_learned else 1.0


def compile_kernels(
    values: Mapping[str, float],
    deployment: Deployment,
    *,
    kernels: GpuKernels | None = None,
    expert_skew: float = EXPERT_SKEW,
) -> CompiledStepTime:
    """Compile the kernel model for one deployment.

    Parameters
    ----------
    values : mapping of str to float
        `KERNEL_PARAMETERS` by name; others are ignored.
    deployment : Deployment
        The limits of its server bound the tables.
    kernels, expert_skew
        See `kernel_parts`.

    Returns
    -------
    CompiledStepTime

    Raises
    ------
    InputError
        If a parameter is missing, negative or not finite, or the deployment names no server.
    """
    v = checked(values, STEP_KERNEL_PARAMETERS)
    parts = kernel_parts(deployment, kernels=kernels, expert_skew=expert_skew)
    layers, scale = float(parts.layers), _attention_scale(v, deployment)
    tokens = np.arange(parts.products_us.size)
    token_us = scale * parts.attention_token_us + parts.block_token_us
    any_work = v["products_scale"] * parts.products_us + parts.fixed_us
    any_work = any_work + (scale * parts.attention_floor_us + layers * v["layer_us"]) * (tokens > 0)
    compiled = CompiledStepTime(
        tokens_us=any_work,
        requests_us=v["products_scale"] * parts.head_us + parts.sampler_us,
        decode_requests_us=scale * parts.attention_request_us,
        kv_us=token_us,
        prefill_kv_us=scale * parts.attention_prefill_kv_us + parts.block_token_us,
        prefill_pair_us=scale * parts.attention_pair_us,
        prefill_tokens_us=layers * v["mixed_layer_us"] + scale * parts.attention_prefill_us * tokens,
        host_requests_us=HOST_REQUEST_US,
        host_rejected_us=v["offload_scan_us"] * deployment.offload_blocks,
        combine="max",
    )
    return within_windows(compiled, deployment)


def kernel_components_us(
    values: Mapping[str, float], deployment: Deployment, batch: StepBatch, *, kernels: GpuKernels | None = None
) -> dict[str, float]:
    """Return where the GPU's time of one step goes, by name, in microseconds.

    Parameters
    ----------
    values : mapping of str to float
    deployment : Deployment
    batch : StepBatch
    kernels : GpuKernels, optional

    Returns
    -------
    dict
        ``products``, ``head``, ``attention``, ``small kernels``, ``all-reduces``, ``sampler``, ``mixed step``.
    """
    v, parts = checked(values, STEP_KERNEL_PARAMETERS), kernel_parts(deployment, kernels=kernels)
    n_tokens, n_prefill = batch.prefill_tokens + batch.decode_tokens, batch.prefill_chunk_tokens.size
    read = tokens_read(batch, deployment)
    kv_tokens = read.decode_kv + read.prefill_kv
    attention = parts.attention_floor_us + parts.attention_request_us * batch.decode_tokens
    attention += parts.attention_token_us * read.decode_kv + parts.attention_prefill_kv_us * read.prefill_kv
    attention += parts.attention_pair_us * read.prefill_pairs + parts.attention_prefill_us * batch.prefill_tokens
    return {
        "products": v["products_scale"] * float(parts.products_us[n_tokens]),
        "head": v["products_scale"] * float(parts.head_us[batch.requests]),
        "attention": _attention_scale(v, deployment) * attention + parts.block_token_us * kv_tokens,
        "small kernels": parts.layers * v["layer_us"] + float(parts.small_excess_us[n_tokens]),
        "all-reduces": float(parts.collectives_us[n_tokens]),
        "sampler": float(parts.sampler_us[batch.requests]),
        "mixed step": parts.layers * v["mixed_layer_us"] * float(n_prefill > 0),
    }


def kernel_notes(deployment: Deployment) -> list[str]:
    """Return a sentence for each kernel of a deployment that was not measured, with the error to expect if known."""
    a = deployment.architecture
    own = load_kernels(deployment.accelerator)
    used = {(GEMM, HEAD_PRECISION), *attention_kernels(deployment, own)}
    used |= {(GEMM, precision) for precision, _ in _group(a.widths.attention, a.weight_dtype)}
    used |= {(GEMM, precision) for precision, _ in _group(a.widths.mlp, a.weight_dtype)}
    if a.num_moe_layers:
        used |= {(EXPERTS, precision) for precision, _ in _group(a.widths.experts, a.weight_dtype)}
    sampler = sampler_note(deployment)
    notes = own.notes(sorted(used), ranks=deployment.tensor_parallel)
    notes += [] if sampler is None else [sampler]
    return notes + attention_notes(deployment)


def touched_experts(tokens: ArrayLike, n_experts: int, experts_per_token: int, skew: float) -> FloatArray:
    """Expected number of experts that at least one of some tokens visits, when popularity falls as ``rank^-skew``.

    Each token visits `experts_per_token` different experts. Expert i is among them with ``1 - exp(-c w_i)``, where c makes
    these probabilities add up (Poisson sampling); tokens choose independently of each other.

    Examples
    --------
    >>> touched_experts([0, 1, 64], 8, 2, 0.0).round(3).tolist()
    [0.0, 2.0, 8.0]
    """
    t = np.atleast_1d(np.asarray(tokens, dtype=float))
    weights = np.arange(1, n_experts + 1, dtype=float) ** -skew
    chance = weights / weights.sum()
    if 1 < experts_per_token < n_experts:
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = 0.5 * (low + high)
            is_low = -np.expm1(-middle * chance).sum() < experts_per_token
            low, high = (middle, high) if is_low else (low, middle)
        chance = -np.expm1(-high * chance)
    elif experts_per_token >= n_experts:
        chance = np.ones(n_experts)
    with np.errstate(divide="ignore"):  # an expert that every token visits
        missed = np.exp(np.outer(t, np.log1p(-np.minimum(chance, 1.0))))
    return np.where(t > 0, n_experts - np.where(t[:, None] > 0, missed, 0.0).sum(axis=1), 0.0)


def _group(width: float, dtype: str) -> list[tuple[str, float]]:
    """Precisions of a group of weights with the share of each, from its mean width; 16 bits beside the checkpoint's own."""
    own = OWN_PRECISION.get(dtype, "bf16")
    wide = PRECISIONS["bf16"]
    if own == "bf16" or width >= wide:
        return [("bf16", 1.0)]
    narrow = min(PRECISIONS[own], width)
    share = (width - narrow) / (wide - narrow)
    few = 0.05  # scales beside the weights widen their mean by less
    return [(own, 1.0)] if share < few else [(own, 1.0 - share), ("bf16", share)]


def _products_us(
    rows: FloatArray, shapes: list[tuple[float, float]], width: float, deployment: Deployment, kernels: GpuKernels
) -> FloatArray:
    """Time of some products of one layer, by tokens."""
    total = np.zeros_like(rows)
    for precision, share in _group(width, deployment.architecture.weight_dtype):
        constants = kernels.of(GEMM, precision)
        for columns, depth in shapes:
            total = total + share * gemm_us(constants, deployment.accelerator, rows, columns, depth)
    return total


def _layers_us(tokens: FloatArray, deployment: Deployment, kernels: GpuKernels, skew: float) -> FloatArray:
    """Products and experts of all layers, by tokens; 0 for none."""
    a, tp = deployment.architecture, deployment.tensor_parallel
    h, widths = a.hidden_size, a.widths
    queries, keys = a.query_width / tp, max(a.num_kv_heads / tp, 1.0) * a.head_dim

    def mlp(inner: float) -> list[tuple[float, float]]:
        return [((a.mlp_matrices - 1) * inner / tp, h), (h, inner / tp)]

    if a.latent is None:
        attention = [(queries + 2.0 * keys, h), (h, queries)]
        total = a.num_layers * _products_us(tokens, attention, widths.attention, deployment, kernels)
    else:
        stored, absorbed = latent_products(deployment)
        total = _products_us(tokens, stored, widths.attention, deployment, kernels)
        total = a.num_layers * (total + _products_us(tokens, absorbed, FULL_WIDTH, deployment, kernels))
    dense = a.num_layers - a.num_moe_layers
    if dense:
        total = total + dense * _products_us(tokens, mlp(a.intermediate_size), widths.mlp, deployment, kernels)
    if a.num_moe_layers:
        layer = _experts_of_a_layer_us(tokens, deployment, kernels, skew)
        if a.shared_expert_intermediate_size:
            layer = layer + _products_us(
                tokens, mlp(a.shared_expert_intermediate_size), widths.mlp, deployment, kernels
            )
        total = total + a.num_moe_layers * layer
    return np.where(tokens > 0, total, 0.0)


def _experts_of_a_layer_us(tokens: FloatArray, deployment: Deployment, kernels: GpuKernels, skew: float) -> FloatArray:
    """Router and grouped experts of one layer. Padding is routed too: what it holds is left from earlier steps."""
    a = deployment.architecture
    touched = touched_experts(tokens, a.num_experts, a.experts_per_token, skew)
    weights = a.mlp_matrices * a.hidden_size * a.expert_intermediate_size / deployment.tensor_parallel
    total = gemm_us(kernels.of(GEMM, "bf16"), deployment.accelerator, tokens, a.num_experts, a.hidden_size)
    for precision, share in _group(a.widths.experts, a.weight_dtype):
        total = total + share * experts_us(
            kernels.of(EXPERTS, precision),
            deployment.accelerator,
            tokens,
            touched,
            weights_of_an_expert=weights,
            experts_per_token=a.experts_per_token,
        )
    return total


def _collectives_us(tokens: FloatArray, deployment: Deployment, kernels: GpuKernels) -> FloatArray:
    """All-reduces after attention and MLP of every layer, and of the embedding, whose rows are shared out over the ranks."""
    a, tp = deployment.architecture, deployment.tensor_parallel
    if tp == 1:
        return np.zeros_like(tokens)
    one = kernels.all_reduce(tp).time_us(tokens * a.hidden_size * BYTES_PER_ACTIVATION)
    return np.where(tokens > 0, (COLLECTIVES_PER_LAYER * a.num_layers + 1) * one, 0.0)


def _logits_us(requests: ArrayLike, deployment: Deployment, kernels: GpuKernels) -> FloatArray:
    """All-gather of the logits: half the traffic of an all-reduce."""
    b, tp = np.asarray(requests, dtype=float), deployment.tensor_parallel
    if tp == 1:
        return np.zeros_like(b)
    message = b * deployment.architecture.vocab_size * BYTES_PER_ACTIVATION
    return np.where(b > 0, 0.5 * kernels.all_reduce(tp).time_us(message), 0.0)


def _small_excess_us(tokens: ArrayLike, deployment: Deployment, kernels: GpuKernels) -> FloatArray:
    """What the small kernels of a step move beyond what their floors hide: it shows with the tokens of prompts.

    A layer reads and writes its hidden state twice with the residual beside it, and reads two and writes one of the MLP's
    inner states.
    """
    a, t = deployment.architecture, np.asarray(tokens, dtype=float)
    inner = a.intermediate_size if a.num_moe_layers == 0 else a.experts_per_token * a.expert_intermediate_size
    elements = 8.0 * a.hidden_size + 3.0 * inner / deployment.tensor_parallel
    moved = t * elements * BYTES_PER_ACTIVATION * US_PER_S / deployment.accelerator.hbm_bandwidth
    busy = moved / kernels.of(ELEMENTWISE, "bf16").bandwidth_share
    return a.num_layers * np.maximum(busy - SMALL_KERNELS_A_LAYER * SMALL_KERNEL_US, 0.0)
