"""Step time from bytes and FLOPs: what a batch reads from memory, computes and sends, with nine learned numbers on top.

``step = max(GPU, host)``, where ``GPU = max(f_hbm weights, GEMM FLOPs) + f_hbm KV + t_block KV blocks x layers + prefill
attention + layers (t_layer + t_mixture + t_mixed) + all-reduces (t_coll stages + f_net bytes) + t_request requests`` and
``host = t_schedule requests + t_scan x blocks of the offload pool x requests that it rejects``. Bytes over the datasheet's
bandwidth are a floor, so the factors `f` are at least 1. Everything is per rank; heads replicate where ranks outnumber them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, ServerConfig, StepBatch
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.hardware import Accelerator
from stepcal.specs.step_work import (
    COLLECTIVES_PER_LAYER,
    all_reduce_bytes,
    gemm_flops,
    kv_bytes_per_token,
    pair_flops,
    weight_bytes,
)
from stepcal.step_time.physical_parameters import STEP_PARAMETERS
from stepcal.units import NS_PER_US, US_PER_S, BoolArray, FloatArray

GEMM_MFU = 0.62
"""Share of the dense peak that GEMMs are taken to reach. 0.56-0.64 are the medians by m from 1,024 of 112 H100 benchmarks
(kernels/gemm), of 1,979 TFLOP/s: by their latencies they ran in FP8, and BF16 is assumed to reach the same share."""
ATTENTION_MFU = 0.64
"""Share of the dense peak of prefill attention at 4,096 tokens: median of the H100 benchmarks (kernels/mha/prefill)."""
HOST_REQUEST_US = 8.5
"""Time of vLLM 0.15.1's ``schedule()`` per running request on an idle CPU: 281 us at 35, 401 us at 50 (our timing)."""
DEFAULT_BLOCK_SIZE = 16
"""Tokens of a KV block, vLLM's default and that of all 16 servers."""
AT = {p.name: i for i, p in enumerate(STEP_PARAMETERS)}
"""Place of each learned number in `theta`."""


@dataclass(frozen=True)
class PhysicalModel:
    """The learned numbers of `PhysicalFeatures`, for the fitters.

    The prediction is linear in them but for ``max(f_hbm weights, GEMM)``, ``max(GPU, host)`` and the all-reduce, which takes
    one stage or two, whichever is faster.
    """

    def predict_us(self, theta: FloatArray, features: PhysicalFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return np.maximum(self.gpu_us(theta, features), self.host_us(theta, features))

    def gpu_us(self, theta: FloatArray, features: PhysicalFeatures) -> FloatArray:
        """Time of the GPU, shape (n_steps,)."""
        return np.sum(list(self._gpu_parts_us(theta, features).values()), axis=0)

    def host_us(self, theta: FloatArray, features: PhysicalFeatures) -> FloatArray:
        """Time of the scheduler on the CPU, shape (n_steps,)."""
        return features.schedule_us + features.scanned * theta[AT["offload_scan_us"]]

    def gradient_us(self, theta: FloatArray, features: PhysicalFeatures) -> FloatArray:
        """Derivative of each step time by each parameter, shape (n_steps, n_parameters)."""
        f = features
        is_memory_bound = f.weights_us * theta[AT["hbm_read_factor"]] > f.gemm_us
        one, two = self._all_reduce_us(theta, f)
        in_gpu = {
            "hbm_read_factor": f.kv_us + np.where(is_memory_bound, f.weights_us, 0.0),
            "kv_block_ns": f.kv_pieces / NS_PER_US,
            "layer_us": f.layers,
            "mixture_layer_us": f.mixture_layers,
            "collective_us": f.all_reduces * np.where(one <= two, 1.0, 2.0),
            "collective_bytes_factor": np.where(one <= two, f.one_stage_us, f.two_stage_us),
            "request_us": f.requests,
            "mixed_layer_us": f.mixed_layers,
        }
        gradient = np.zeros((len(f), len(AT)))
        is_gpu_bound = self.gpu_us(theta, f) > self.host_us(theta, f)
        for name, column in in_gpu.items():
            gradient[:, AT[name]] = np.where(is_gpu_bound, column, 0.0)
        gradient[:, AT["offload_scan_us"]] = np.where(is_gpu_bound, 0.0, f.scanned)
        return gradient

    def components_us(self, theta: FloatArray, features: PhysicalFeatures) -> dict[str, FloatArray]:
        """Components by name, each of shape (n_steps,), that add up to the step: the GPU's, and how long it waits."""
        gpu, host = self.gpu_us(theta, features), self.host_us(theta, features)
        return {
            **self._gpu_parts_us(theta, features),
            "host_beyond_gpu": np.maximum(host - gpu, 0.0),
        }

    def _gpu_parts_us(self, theta: FloatArray, features: PhysicalFeatures) -> dict[str, FloatArray]:
        return {
            "weights_gemm": np.maximum(features.weights_us * theta[AT["hbm_read_factor"]], features.gemm_us),
            "kv": features.kv_us * theta[AT["hbm_read_factor"]]
            + features.kv_pieces * theta[AT["kv_block_ns"]] / NS_PER_US,
            "prefill_attention": features.attention_us,
            "layers": features.layers * theta[AT["layer_us"]],
            "mixture": features.mixture_layers * theta[AT["mixture_layer_us"]],
            "collectives": np.minimum(*self._all_reduce_us(theta, features)),
            "requests": features.requests * theta[AT["request_us"]],
            "mixed": features.mixed_layers * theta[AT["mixed_layer_us"]],
        }

    def _all_reduce_us(self, theta: FloatArray, features: PhysicalFeatures) -> tuple[FloatArray, FloatArray]:
        """All all-reduces of a step in one stage and in two."""
        stage, bytes_factor = theta[AT["collective_us"]], theta[AT["collective_bytes_factor"]]
        one = features.all_reduces * stage + features.one_stage_us * bytes_factor
        return one, 2.0 * features.all_reduces * stage + features.two_stage_us * bytes_factor


@dataclass(frozen=True)
class PhysicalFeatures:
    """What the physical model sees of a table of steps, each field of shape (n_steps,).

    Attributes
    ----------
    weights_us, kv_us : ndarray
        Weights and KV over the datasheet's bandwidth.
    kv_pieces : ndarray
        KV blocks that are read, each once a layer: so many pieces of memory on every rank.
    gemm_us : ndarray
        GEMM FLOPs at `GEMM_MFU`, which overlap with the reading of weights.
    attention_us : ndarray
        Prefill attention at `ATTENTION_MFU`.
    layers, mixture_layers, mixed_layers : ndarray
        Layers that are run; of those, mixtures; layers of a step with prefill (means of steps may be fractions).
    all_reduces : ndarray
    one_stage_us, two_stage_us : ndarray
        Their bytes over the datasheet's interconnect, if done in one stage or in two.
    requests : ndarray
    schedule_us : ndarray
        The scheduler on the CPU, which overlaps with the GPU.
    scanned : ndarray
        Blocks of the offload pool that the scheduler looks at in vain.
    """

    weights_us: FloatArray
    kv_us: FloatArray
    kv_pieces: FloatArray
    gemm_us: FloatArray
    attention_us: FloatArray
    layers: FloatArray
    mixture_layers: FloatArray
    mixed_layers: FloatArray
    all_reduces: FloatArray
    one_stage_us: FloatArray
    two_stage_us: FloatArray
    requests: FloatArray
    schedule_us: FloatArray
    scanned: FloatArray

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def terms(self) -> FloatArray:
        """Terms of the step time without learned numbers, shape (n_steps, n_terms), for regressions on them."""
        names = (
            "weights_us",
            "kv_us",
            "kv_pieces",
            "layers",
            "mixture_layers",
            "all_reduces",
            "two_stage_us",
            "requests",
        )
        return np.column_stack([getattr(self, name) for name in (*names, "mixed_layers")])

    def rows(self, mask: BoolArray | NDArray[np.intp]) -> PhysicalFeatures:
        """Return the features of some steps."""
        return PhysicalFeatures(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    @classmethod
    def joined(cls, parts: list[PhysicalFeatures]) -> PhysicalFeatures:
        """Put the features of several servers under each other."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})


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
    rejected: ArrayLike = 0.0,
    block_size: int = DEFAULT_BLOCK_SIZE,
    offload_blocks: int = 0,
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
    prefill_tokens, prefill_requests, prefill_kv_tokens, prefill_pairs, rejected : array_like of float, (n_steps,)
        As in `stepcal.simulator.StepBatch`.
    block_size : int
        Tokens of a KV block.
    offload_blocks : int
        Size of the server's offload pool, which `rejected` requests scan.

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
        "rejected": rejected,
    }
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=float)) for v in named.values()))
    for name, values in zip(named, arrays, strict=True):
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            raise InputError(f"`{name}[{bad[0]}]` is {values[bad[0]]}; a step holds zero or more, and finitely many.")
    decode, kv, prefill, n_prefill, prefill_kv, pairs, refused = arrays
    tp = architecture.check_tensor_parallel(tensor_parallel)
    tokens, requests = decode + prefill, decode + n_prefill
    memory = US_PER_S / accelerator.hbm_bandwidth
    compute = US_PER_S / (accelerator.bf16_dense_flops * GEMM_MFU)
    attention = US_PER_S / (accelerator.bf16_dense_flops * ATTENTION_MFU)
    kv_bytes = kv_bytes_per_token(architecture, tensor_parallel=tp)
    one_way = US_PER_S / (accelerator.interconnect_bandwidth / 2)
    has_work = tokens > 0
    one_stage, two_stage = all_reduce_bytes(tokens, architecture, tensor_parallel=tp)
    return PhysicalFeatures(
        weights_us=weight_bytes(tokens, architecture, tensor_parallel=tp) * memory,
        kv_us=(kv + prefill_kv + tokens) * kv_bytes * memory,  # each token's own keys and values are written
        kv_pieces=(kv + prefill_kv + tokens) / block_size * architecture.num_layers,
        gemm_us=gemm_flops(tokens, architecture, tensor_parallel=tp) * compute,
        attention_us=pairs * pair_flops(architecture, tensor_parallel=tp) * attention,
        layers=architecture.num_layers * has_work,
        mixture_layers=architecture.num_moe_layers * has_work,
        mixed_layers=architecture.num_layers * np.minimum(n_prefill, 1.0),
        all_reduces=COLLECTIVES_PER_LAYER * architecture.num_layers * has_work * float(tp > 1),
        one_stage_us=one_stage * one_way,
        two_stage_us=two_stage * one_way,
        requests=requests,
        schedule_us=requests * HOST_REQUEST_US,
        scanned=refused * float(offload_blocks),
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
        architecture,
        accelerator,
        tensor_parallel=tensor_parallel,
        decode_requests=tokens,
        kv_tokens=0.0,
        block_size=server.block_size,
    )
    # A table by tokens takes everything but what counts requests; a token's own keys and values are in it.
    table = PhysicalModel().gpu_us(values, replace(features, requests=np.zeros(tokens.size)))
    kv_bytes = kv_bytes_per_token(architecture, tensor_parallel=tensor_parallel)
    token_us = values[AT["hbm_read_factor"]] * kv_bytes * US_PER_S / accelerator.hbm_bandwidth
    token_us += values[AT["kv_block_ns"]] / NS_PER_US * architecture.num_layers / server.block_size
    pair_us = pair_flops(architecture, tensor_parallel=tensor_parallel) * US_PER_S
    pair_us /= accelerator.bf16_dense_flops * ATTENTION_MFU
    return CompiledStepTime(
        tokens_us=table,
        requests_us=float(values[AT["request_us"]]),
        kv_us=token_us,
        prefill_kv_us=token_us,
        prefill_pair_us=pair_us,
        prefill_tokens_us=np.full(tokens.size, values[AT["mixed_layer_us"]] * architecture.num_layers),
        host_requests_us=HOST_REQUEST_US,
        host_rejected_us=float(values[AT["offload_scan_us"]]) * server.offload_blocks,
        combine="max",
    )


def batch_features(
    batch: StepBatch,
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    *,
    tensor_parallel: int,
    offload_blocks: int = 0,
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
        rejected=batch.rejected,
        offload_blocks=offload_blocks,
    )


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
