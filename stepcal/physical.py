"""Step time from bytes and FLOPs: what a batch reads from memory, computes and sends, with nine learned numbers on top.

``step = max(GPU, host)``, and ``GPU = max(f_w weights, GEMM FLOPs) + f_kv KV + prefill attention + layers (t_layer +
t_mixture + t_mixed) + collectives (t_coll log2 TP + f_net bytes) + t_request requests + t_queue W / (W + slots)``. Bytes
over the datasheet's bandwidth are a floor, so the factors `f` are at least 1. Everything is per rank; heads replicate where
ranks outnumber them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcal.architecture import ModelArchitecture
from stepcal.errors import InputError
from stepcal.hardware import Accelerator
from stepcal.physical_parameters import STEP_PARAMETERS, PhysicalParameter
from stepcal.simulator import CompiledStepTime, ServerConfig, StepBatch

FloatArray = NDArray[np.float64]

US_PER_S = 1e6
FLOPS_PER_MAC = 2
BYTES_PER_ACTIVATION = 2
"""BF16 and FP16 alike; the KV cache and what collectives move are of this width."""
COLLECTIVES_PER_LAYER = 2
"""All-reduces after attention and after the MLP (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053)."""
GEMM_MFU = 0.62
"""Share of the dense peak that GEMMs reach: 0.56-0.64, medians by m from 1,024, of 112 H100 benchmarks (kernels/gemm)."""
ATTENTION_MFU = 0.64
"""Share of the dense peak of prefill attention at 4,096 tokens: median of the H100 benchmarks (kernels/mha/prefill)."""
HOST_REQUEST_US = 8.5
"""Time of vLLM 0.15.1's ``schedule()`` per running request on an idle CPU: 281 us at 35, 401 us at 50 (our timing)."""
DEFAULT_MAX_NUM_SEQS = 128
"""Slots of all 16 servers."""
LONGEST_QUEUE = 20_000
"""Requests beyond which a longer queue costs no more; the term has saturated long before."""
QUEUE_REFERENCE_KV_BYTES = 131_072
"""KV bytes a token and model (all ranks) for which `queue_us` is quoted: Mixtral 8x7B."""


@dataclass(frozen=True)
class PhysicalModel:
    """The learned numbers of `PhysicalFeatures`, for the fitters.

    The prediction is linear in them but for one maximum, ``max(f_w weights, GEMM)``.
    """

    name: str = "default"

    @property
    def parameters(self) -> tuple[PhysicalParameter, ...]:
        """The parameters, in the order of `theta`."""
        return STEP_PARAMETERS

    def predict_us(self, theta: FloatArray, features: PhysicalFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        memory = features.linear[:, 0] * theta[0]
        gpu = np.maximum(memory, features.gemm_us) + features.linear[:, 1:] @ theta[1:] + features.fixed_us
        return np.maximum(gpu, features.host_us)

    def gradient_us(self, theta: FloatArray, features: PhysicalFeatures) -> FloatArray:
        """Derivative of each step time by each parameter, shape (n_steps, n_parameters)."""
        gradient = features.linear.copy()
        memory = features.linear[:, 0] * theta[0]
        gradient[memory <= features.gemm_us, 0] = 0.0
        gpu = np.maximum(memory, features.gemm_us) + features.linear[:, 1:] @ theta[1:] + features.fixed_us
        gradient[gpu <= features.host_us] = 0.0
        return gradient

    def components_us(self, theta: FloatArray, features: PhysicalFeatures) -> dict[str, FloatArray]:
        """Learned components by name, each of shape (n_steps,), and what is fixed; they add up to the GPU's time."""
        memory = features.linear[:, 0] * theta[0]
        parts = {"weights_gemm": np.maximum(memory, features.gemm_us)}
        names = (
            "kv",
            "layers",
            "mixture",
            "collective_latency",
            "collective_bytes",
            "requests",
            "mixed",
            "queue",
        )
        parts |= {name: features.linear[:, j + 1] * theta[j + 1] for j, name in enumerate(names)}
        return {**parts, "prefill_attention": features.fixed_us}


@dataclass(frozen=True)
class PhysicalFeatures:
    """What the physical model sees of a table of steps: each learned number's multiplier, and what is fixed.

    Attributes
    ----------
    linear : ndarray, shape (n_steps, n_parameters)
        Microseconds (or counts) that each parameter multiplies, in the order of `STEP_PARAMETERS`.
    gemm_us : ndarray, shape (n_steps,)
        GEMM FLOPs at `GEMM_MFU`, which overlap with the reading of weights.
    fixed_us : ndarray, shape (n_steps,)
        Prefill attention at `ATTENTION_MFU`.
    host_us : ndarray, shape (n_steps,)
        The scheduler on the CPU, which overlaps with the GPU.
    """

    linear: FloatArray
    gemm_us: FloatArray
    fixed_us: FloatArray
    host_us: FloatArray

    def __len__(self) -> int:
        return len(self.linear)

    def rows(self, mask: NDArray[np.bool_] | NDArray[np.intp]) -> PhysicalFeatures:
        """Return the features of some steps."""
        return PhysicalFeatures(self.linear[mask], self.gemm_us[mask], self.fixed_us[mask], self.host_us[mask])

    @classmethod
    def joined(cls, parts: list[PhysicalFeatures]) -> PhysicalFeatures:
        """Put the features of several servers under each other."""
        return cls(
            np.vstack([p.linear for p in parts]),
            np.concatenate([p.gemm_us for p in parts]),
            np.concatenate([p.fixed_us for p in parts]),
            np.concatenate([p.host_us for p in parts]),
        )


def weight_bytes(tokens: ArrayLike, architecture: ModelArchitecture, *, tensor_parallel: int = 1) -> FloatArray:
    """Bytes of weights that a rank reads in a step of some tokens.

    A mixture layer reads the experts that its tokens visit: with `k` of `E` experts a token, chosen evenly, ``T`` tokens
    touch ``E (1 - (1 - k / E)^T)`` of them. Keys and values replicate where there are fewer heads than ranks. The
    embedding is a look-up and not read; the output matrix is.

    Parameters
    ----------
    tokens : array_like of float, shape (n_steps,)
    architecture : ModelArchitecture
    tensor_parallel : int

    Returns
    -------
    ndarray of float, shape (n_steps,)

    Raises
    ------
    InputError
        If `tensor_parallel` does not divide the attention heads.
    """
    t = np.atleast_1d(np.asarray(tokens, dtype=float))
    attention, mlp, expert, router, head = _weights_of_a_rank(architecture, tensor_parallel)
    touched = architecture.num_experts * (1.0 - (1.0 - architecture.active_expert_fraction) ** t)
    elements = attention + mlp + head + np.zeros_like(t)
    elements += architecture.num_moe_layers * (touched * expert + router)
    return np.where(t > 0, elements * architecture.bytes_per_weight, 0.0)


def gemm_flops(tokens: ArrayLike, architecture: ModelArchitecture, *, tensor_parallel: int = 1) -> FloatArray:
    """FLOPs of a rank's matrix products for some tokens, shape (n_steps,); a mixture computes the experts visited."""
    t = np.atleast_1d(np.asarray(tokens, dtype=float))
    attention, mlp, expert, router, head = _weights_of_a_rank(architecture, tensor_parallel)
    visited = architecture.num_moe_layers * (architecture.experts_per_token * expert + router)
    return FLOPS_PER_MAC * t * (attention + mlp + head + visited)


def kv_bytes_per_token(architecture: ModelArchitecture, *, tensor_parallel: int = 1) -> float:
    """Bytes of one token's keys and values on a rank, all layers; at least one head a rank, so heads replicate."""
    heads = max(architecture.num_kv_heads / architecture.check_tensor_parallel(tensor_parallel), 1.0)
    return 2.0 * heads * architecture.head_dim * architecture.num_layers * BYTES_PER_ACTIVATION


def collective_bytes(tokens: ArrayLike, architecture: ModelArchitecture, *, tensor_parallel: int = 1) -> FloatArray:
    """Bytes that a rank sends in a step's all-reduces, shape (n_steps,): ``2 (n - 1) / n`` of each message (ring)."""
    t = np.atleast_1d(np.asarray(tokens, dtype=float))
    share = 2.0 * (tensor_parallel - 1) / architecture.check_tensor_parallel(tensor_parallel)
    calls = COLLECTIVES_PER_LAYER * architecture.num_layers
    return calls * share * t * architecture.hidden_size * BYTES_PER_ACTIVATION


def floor_us(
    tokens: ArrayLike,
    kv_tokens: ArrayLike,
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    *,
    tensor_parallel: int = 1,
) -> FloatArray:
    """Time in which the datasheet's bandwidth moves a step's weights and KV, shape (n_steps,): no step is shorter."""
    kv = np.atleast_1d(np.asarray(kv_tokens, dtype=float))
    kv_bytes = kv * kv_bytes_per_token(architecture, tensor_parallel=tensor_parallel)
    return (weight_bytes(tokens, architecture, tensor_parallel=tensor_parallel) + kv_bytes) * (
        US_PER_S / accelerator.hbm_bandwidth
    )


def physical_features(
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    *,
    tensor_parallel: int,
    decode_requests: ArrayLike,
    kv_tokens: ArrayLike,
    prefill_tokens: ArrayLike = 0.0,
    prefill_requests: ArrayLike = 0.0,
    prefill_kv_tokens: ArrayLike = 0.0,
    prefill_pairs: ArrayLike = 0.0,
    waiting: ArrayLike = 0.0,
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
) -> PhysicalFeatures:
    """Multipliers of the learned numbers for the steps of one server.

    Attention over the KV cache is linear in each request's context, so sums over the batch lose nothing; only prefill
    attention needs pairs of query and context. Means over several steps are accepted in place of counts.

    Parameters
    ----------
    architecture : ModelArchitecture
    accelerator : Accelerator
    tensor_parallel : int
    decode_requests, kv_tokens : array_like of float, shape (n_steps,)
        Requests that decode, and their contexts summed.
    prefill_tokens, prefill_requests, prefill_kv_tokens, prefill_pairs, waiting : array_like of float, shape (n_steps,)
        As in `stepcal.simulator.StepBatch`.
    max_num_seqs : int
        Slots of the server, which scale the queue.

    Returns
    -------
    PhysicalFeatures

    Raises
    ------
    InputError
        If a count is negative or not finite, or `tensor_parallel` does not divide the attention heads.
    """
    named = {
        "decode_requests": decode_requests,
        "kv_tokens": kv_tokens,
        "prefill_tokens": prefill_tokens,
        "prefill_requests": prefill_requests,
        "prefill_kv_tokens": prefill_kv_tokens,
        "prefill_pairs": prefill_pairs,
        "waiting": waiting,
    }
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=float)) for v in named.values()))
    for name, values in zip(named, arrays, strict=True):
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            raise InputError(f"`{name}[{bad[0]}]` is {values[bad[0]]}; a step holds zero or more, and finitely many.")
    decode, kv, prefill, n_prefill, prefill_kv, pairs, queue = arrays
    tp = architecture.check_tensor_parallel(tensor_parallel)
    tokens, requests = decode + prefill, decode + n_prefill
    memory = US_PER_S / accelerator.hbm_bandwidth
    compute = US_PER_S / (accelerator.bf16_dense_flops * GEMM_MFU)
    kv_bytes = kv_bytes_per_token(architecture, tensor_parallel=tp)
    one_way = US_PER_S / (accelerator.interconnect_bandwidth / 2)
    has_work = tokens > 0
    calls = COLLECTIVES_PER_LAYER * architecture.num_layers * np.log2(tp)
    linear = np.column_stack(
        [
            weight_bytes(tokens, architecture, tensor_parallel=tp) * memory,
            (kv + prefill_kv + tokens) * kv_bytes * memory,  # each token's own keys and values are written
            architecture.num_layers * has_work,
            architecture.num_moe_layers * has_work,
            calls * has_work,
            collective_bytes(tokens, architecture, tensor_parallel=tp) * one_way,
            requests,
            architecture.num_layers * np.minimum(n_prefill, 1.0),
            queue_share(queue, max_num_seqs) * _queue_scale(architecture),
        ]
    )
    return PhysicalFeatures(
        linear,
        gemm_flops(tokens, architecture, tensor_parallel=tp) * compute,
        pairs * _pair_us(architecture, accelerator, tp),
        requests * HOST_REQUEST_US,
    )


def physical_clock(
    theta: ArrayLike,
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    server: ServerConfig,
    *,
    tensor_parallel: int,
) -> CompiledStepTime:
    """Compile the physical model for one server.

    Parameters
    ----------
    theta : array_like, shape (n_parameters,)
        In the order of `STEP_PARAMETERS`.
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
        If a number is negative or not finite, or `tensor_parallel` does not divide the attention heads.
    """
    values = checked_theta(theta)
    tokens = np.arange(server.max_num_batched_tokens + 1)
    features = physical_features(
        architecture, accelerator, tensor_parallel=tensor_parallel, decode_requests=tokens, kv_tokens=0.0
    )
    request_us, mixed_us = values[6], values[7] * architecture.num_layers
    table = np.maximum(features.linear[:, 0] * values[0], features.gemm_us)
    table += features.linear[:, 1:6] @ values[1:6]
    memory = US_PER_S / accelerator.hbm_bandwidth
    kv_us = values[1] * kv_bytes_per_token(architecture, tensor_parallel=tensor_parallel) * memory
    waiting = np.arange(LONGEST_QUEUE + 1)
    queue = values[8] * _queue_scale(architecture) * queue_share(waiting, server.max_num_seqs)
    return CompiledStepTime(
        tokens_us=table,
        requests_us=float(request_us),
        kv_us=kv_us,
        prefill_kv_us=kv_us,
        prefill_pair_us=_pair_us(architecture, accelerator, tensor_parallel),
        prefill_tokens_us=np.full(tokens.size, mixed_us),
        queue_us=queue,
        host_requests_us=HOST_REQUEST_US,
        combine="max",
    )


def batch_features(
    batch: StepBatch, architecture: ModelArchitecture, accelerator: Accelerator, *, tensor_parallel: int
) -> PhysicalFeatures:
    """Features of one simulated step, whose requests are known one by one."""
    return physical_features(
        architecture,
        accelerator,
        tensor_parallel=tensor_parallel,
        decode_requests=batch.decode_tokens,
        kv_tokens=batch.decode_kv_tokens,
        prefill_tokens=batch.prefill_tokens,
        prefill_requests=batch.prefill_chunk_tokens.size,
        prefill_kv_tokens=batch.prefill_kv_tokens,
        prefill_pairs=batch.prefill_pairs,
        waiting=batch.waiting,
    )


def queue_share(waiting: ArrayLike, max_num_seqs: int) -> FloatArray:
    """Return ``W / (W + slots)``: no queue is 0, as many waiting as slots one half, and it saturates at 1."""
    w = np.atleast_1d(np.asarray(waiting, dtype=float))
    return w / (w + max_num_seqs)


def checked_theta(theta: ArrayLike) -> FloatArray:
    """Return the learned numbers as an array.

    Raises
    ------
    InputError
        If their number is wrong, or one is negative or not finite.
    """
    values = np.asarray(theta, dtype=float)
    if values.shape != (len(STEP_PARAMETERS),):
        names = ", ".join(p.name for p in STEP_PARAMETERS)
        raise InputError(f"`theta` has shape {values.shape}; it needs one value for each of {names}.")
    for p, value in zip(STEP_PARAMETERS, values, strict=True):
        if not (np.isfinite(value) and value >= 0):
            raise InputError(
                f"`{p.name}` is {value}; it must be finite and at least 0 (its prior is {p.start:g} {p.unit})."
            )
    return values


def _weights_of_a_rank(
    architecture: ModelArchitecture, tensor_parallel: int
) -> tuple[float, float, float, float, float]:
    """Elements on a rank: attention and dense MLPs of all layers, one expert, one router, the output matrix."""
    a, tp = architecture, architecture.check_tensor_parallel(tensor_parallel)
    kv_width = max(a.num_kv_heads / tp, 1.0) * a.head_dim
    attention = a.num_layers * a.hidden_size * 2.0 * (a.query_width / tp + kv_width)
    mlp = (a.num_layers - a.num_moe_layers) * a.mlp_matrices * a.hidden_size * a.intermediate_size / tp
    mlp += a.num_moe_layers * a.mlp_matrices * a.hidden_size * a.shared_expert_intermediate_size / tp
    expert = a.mlp_matrices * a.hidden_size * a.expert_intermediate_size / tp
    return attention, mlp, expert, float(a.hidden_size * a.num_experts), a.vocab_size * a.hidden_size / tp


def _pair_us(architecture: ModelArchitecture, accelerator: Accelerator, tensor_parallel: int) -> float:
    """Time of one query-context pair of prefill attention on a rank, all layers: scores and weighted sum of values."""
    flops = 2 * FLOPS_PER_MAC * architecture.query_width * architecture.num_layers / tensor_parallel
    return flops * US_PER_S / (accelerator.bf16_dense_flops * ATTENTION_MFU)


def _queue_scale(architecture: ModelArchitecture) -> float:
    """Cost of a queue relative to Mixtral 8x7B: inverse to the model's KV bytes a token, all ranks together.

    Empirical, from four models; not carried beyond the smallest of them.
    """
    return min(1.0, QUEUE_REFERENCE_KV_BYTES / kv_bytes_per_token(architecture))
