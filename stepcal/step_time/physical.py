"""Step time from bytes and FLOPs: what a batch reads from memory, computes and sends, with nine learned parameters on top.

``step = max(GPU, host)``, where ``GPU = max(f_hbm weights, GEMM FLOPs) + f_hbm KV + t_block KV blocks x layers + prefill
attention + layers (t_layer + t_mixture + t_mixed) + all-reduces (t_coll stages + f_net bytes) + t_request requests`` and
``host = t_schedule requests + t_scan x blocks of the offload pool x requests that it rejects``. Bytes over the datasheet's
bandwidth are a floor, so the factors `f` are at least 1. Everything is per rank; heads replicate where ranks outnumber them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, StepBatch
from stepcal.specs.deployment import Deployment
from stepcal.specs.step_work import (
    COLLECTIVES_PER_LAYER,
    all_reduce_bytes,
    gemm_flops,
    pair_flops,
    weight_bytes,
)
from stepcal.step_time.attention_kinds import refuse_latent, tokens_read, within_windows
from stepcal.step_time.physical_parameters import checked
from stepcal.units import NS_PER_US, US_PER_S, BoolArray, FloatArray

GEMM_MFU = 0.62
"""Share of the dense peak that GEMMs are taken to reach. 0.56-0.64 are the medians by m from 1,024 of 112 H100 benchmarks
(kernels/gemm), of 1,979 TFLOP/s: by their latencies they ran in FP8, and BF16 is assumed to reach the same share."""
ATTENTION_MFU = 0.64
"""Share of the dense peak of prefill attention at 4,096 tokens: median of the H100 benchmarks (kernels/mha/prefill)."""
HOST_REQUEST_US = 8.5
"""Time of vLLM 0.15.1's ``schedule()`` per running request on an idle CPU: 281 us at 35, 401 us at 50 (our timing)."""
FLOOR_US = 1.0
"""No simulated step is shorter; with a floor, tables may hold negative differences."""
Values = Mapping[str, float]
"""Values of parameters by name."""


@dataclass(frozen=True)
class PhysicalModel:
    """The step time given its parameters by name; for fitters, and to be compiled (`compile_physical`).

    The prediction is linear in the parameters but for ``max(f_hbm weights, GEMM)``, ``max(GPU, host)`` and the all-reduce,
    which takes one stage or two, whichever is faster.
    """

    def predict_us(self, values: Values, features: PhysicalFeatures) -> FloatArray:
        """Step times, shape (n_steps,), microseconds."""
        return np.maximum(self.gpu_us(values, features), self.host_us(values, features))

    def gpu_us(self, values: Values, features: PhysicalFeatures) -> FloatArray:
        """Time of the GPU, shape (n_steps,)."""
        return np.sum(list(self._gpu_parts_us(values, features).values()), axis=0)

    def host_us(self, values: Values, features: PhysicalFeatures) -> FloatArray:
        """Time of the scheduler on the CPU, shape (n_steps,)."""
        return features.schedule_us + features.scanned * values["offload_scan_us"]

    def gradient_us(self, values: Values, features: PhysicalFeatures) -> dict[str, FloatArray]:
        """Derivative of each step time by each parameter, each of shape (n_steps,)."""
        f = features
        is_memory_bound = f.weights_us * values["hbm_read_factor"] > f.gemm_us
        one, two = self._all_reduce_us(values, f)
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
        is_gpu_bound = self.gpu_us(values, f) > self.host_us(values, f)
        gradient = {name: np.where(is_gpu_bound, column, 0.0) for name, column in in_gpu.items()}
        return gradient | {"offload_scan_us": np.where(is_gpu_bound, 0.0, f.scanned)}

    def components_us(self, values: Values, features: PhysicalFeatures) -> dict[str, FloatArray]:
        """Components by name, each of shape (n_steps,), that add up to the step: the GPU's, and how long it waits."""
        gpu, host = self.gpu_us(values, features), self.host_us(values, features)
        return {
            **self._gpu_parts_us(values, features),
            "host_beyond_gpu": np.maximum(host - gpu, 0.0),
        }

    def _gpu_parts_us(self, values: Values, features: PhysicalFeatures) -> dict[str, FloatArray]:
        return {
            "weights_gemm": np.maximum(features.weights_us * values["hbm_read_factor"], features.gemm_us),
            "kv": features.kv_us * values["hbm_read_factor"] + features.kv_pieces * values["kv_block_ns"] / NS_PER_US,
            "prefill_attention": features.attention_us,
            "layers": features.layers * values["layer_us"],
            "mixture": features.mixture_layers * values["mixture_layer_us"],
            "collectives": np.minimum(*self._all_reduce_us(values, features)),
            "requests": features.requests * values["request_us"],
            "mixed": features.mixed_layers * values["mixed_layer_us"],
        }

    def _all_reduce_us(self, values: Values, features: PhysicalFeatures) -> tuple[FloatArray, FloatArray]:
        """All all-reduces of a step in one stage and in two."""
        stage, bytes_factor = values["collective_us"], values["collective_bytes_factor"]
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
        Blocks of the offload pool that the scheduler scans for requests that are rejected.
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
    deployment: Deployment,
    *,
    decode_requests: ArrayLike,
    kv_tokens: ArrayLike,
    prefill_tokens: ArrayLike = 0.0,
    prefill_requests: ArrayLike = 0.0,
    prefill_kv_tokens: ArrayLike = 0.0,
    prefill_pairs: ArrayLike = 0.0,
    rejected: ArrayLike = 0.0,
) -> PhysicalFeatures:
    """Multipliers of the learned parameters for the steps of one deployment.

    Attention over the KV cache is linear in each request's context, so sums over the batch lose nothing; only prefill
    attention needs pairs of query and context. Means over several steps are accepted in place of counts.

    Parameters
    ----------
    deployment : Deployment
        Its server says how long a KV block is and how many the offload pool has, which `rejected` requests scan.
    decode_requests, kv_tokens : array_like of float, shape (n_steps,)
        Requests that decode, and their contexts summed.
    prefill_tokens, prefill_requests, prefill_kv_tokens, prefill_pairs, rejected : array_like of float, (n_steps,)
        As in `stepcal.simulator.StepBatch`.

    Returns
    -------
    PhysicalFeatures

    Raises
    ------
    InputError
        If a count is negative or not finite.
    NotModelledError
        If the model has latent attention.
    """
    refuse_latent(deployment, "bytes and FLOPs alone")
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
    architecture, accelerator, tp = deployment.architecture, deployment.accelerator, deployment.tensor_parallel
    tokens, requests = decode + prefill, decode + n_prefill
    memory = US_PER_S / accelerator.hbm_bandwidth
    compute = US_PER_S / (accelerator.bf16_dense_flops * GEMM_MFU)
    attention = US_PER_S / (accelerator.bf16_dense_flops * ATTENTION_MFU)
    kv_bytes = deployment.kv_bytes_per_token
    one_way = US_PER_S / (accelerator.interconnect_bandwidth / 2)
    has_work = tokens > 0
    one_stage, two_stage = all_reduce_bytes(tokens, deployment)
    kv_touched = kv + prefill_kv + tokens  # each token's own keys and values are written
    return PhysicalFeatures(
        weights_us=weight_bytes(tokens, deployment) * memory,
        kv_us=kv_touched * kv_bytes * memory,
        kv_pieces=kv_touched / deployment.block_size * architecture.num_layers,
        gemm_us=gemm_flops(tokens, deployment) * compute,
        attention_us=pairs * pair_flops(deployment) * attention,
        layers=architecture.num_layers * has_work,
        mixture_layers=architecture.num_moe_layers * has_work,
        mixed_layers=architecture.num_layers * np.minimum(n_prefill, 1.0),
        all_reduces=COLLECTIVES_PER_LAYER * architecture.num_layers * has_work * float(tp > 1),
        one_stage_us=one_stage * one_way,
        two_stage_us=two_stage * one_way,
        requests=requests,
        schedule_us=requests * HOST_REQUEST_US,
        scanned=refused * float(deployment.offload_blocks),
    )


def compile_physical(
    values: Values, deployment: Deployment, *, model: PhysicalModel | None = None, by_batch: bool = False
) -> CompiledStepTime:
    """Compile the physical model for one deployment, by asking its formula what each kind of work costs alone.

    Parameters
    ----------
    values : mapping of str to float
        The parameters by name; others than the model's are ignored.
    deployment : Deployment
        The limits of its server bound the tables.
    model : PhysicalModel, optional
        Another form of the step time than the shipped one.
    by_batch : bool
        Whether the form tells steps with prefill apart in more than time a layer, so that it needs a table over prefill
        tokens and decoding requests together; its times may then fall with the batch, and are floored at `FLOOR_US`.

    Returns
    -------
    CompiledStepTime

    Raises
    ------
    InputError
        If a parameter is missing, negative or not finite, or the deployment names no server.
    """
    values, form, server = dict(values) | checked(values), model or PhysicalModel(), deployment.limits

    def gpu_us(**counts: ArrayLike) -> FloatArray:
        features = physical_features(deployment, **{"decode_requests": 0.0, "kv_tokens": 0.0, **counts})
        return form.gpu_us(values, replace(features, requests=np.zeros(len(features))))

    def host_us(**counts: float) -> float:
        features = physical_features(deployment, **{"decode_requests": 0.0, "kv_tokens": 0.0, **counts})
        return float(form.host_us(values, features)[0])

    nothing = physical_features(deployment, decode_requests=0.0, kv_tokens=0.0)
    tokens = np.arange(server.max_num_batched_tokens + 1)
    kv_us = float(gpu_us(kv_tokens=1.0)[0])
    compiled = CompiledStepTime(
        # Everything that goes by tokens: a token's own keys and values are in it, and what counts requests is not.
        tokens_us=gpu_us(decode_requests=tokens),
        requests_us=float(form.gpu_us(values, replace(nothing, requests=np.ones(1)))[0]),
        kv_us=kv_us,
        prefill_kv_us=kv_us,
        prefill_pair_us=float(gpu_us(prefill_pairs=1.0)[0]),
        prefill_tokens_us=np.full(tokens.size, gpu_us(prefill_requests=1.0)[0]),
        host_requests_us=host_us(decode_requests=1.0),
        host_rejected_us=host_us(rejected=1.0),
        combine="max",
    )
    whole = _with_batch_table(compiled, form, values, deployment) if by_batch else compiled
    return within_windows(whole, deployment)


def _with_batch_table(
    compiled: CompiledStepTime, form: PhysicalModel, values: Values, deployment: Deployment
) -> CompiledStepTime:
    """Add what the form says of a step with prefill beyond the tables over tokens and requests.

    Of such a step, decoding requests cost what the form says; those that are prefilled cost what they do without prefill.
    """
    server = deployment.limits
    shape = (server.max_num_batched_tokens + 1, server.max_num_seqs + 1)
    prefill, decode = (counts.ravel().astype(float) for counts in np.indices(shape))
    features = physical_features(
        deployment,
        decode_requests=decode,
        kv_tokens=0.0,
        prefill_tokens=prefill,
        prefill_requests=np.minimum(prefill, 1.0),
    )
    whole = form.gpu_us(values, replace(features, requests=decode))
    alone = physical_features(deployment, decode_requests=prefill + decode, kv_tokens=0.0)
    tables = form.gpu_us(values, replace(alone, requests=decode)) + np.asarray(compiled.prefill_tokens_us)[0]
    extra = np.where(prefill > 0, whole - tables, 0.0)
    return replace(compiled, batch_us=extra.reshape(shape), floor_us=FLOOR_US)


def batch_features(batch: StepBatch, deployment: Deployment) -> PhysicalFeatures:
    """Features of one simulated step, whose requests are known one by one."""
    read = tokens_read(batch, deployment)
    return physical_features(
        deployment,
        decode_requests=batch.decode_tokens,
        kv_tokens=read.decode_kv,
        prefill_tokens=batch.prefill_tokens,
        prefill_requests=batch.prefill_chunk_tokens.size,
        prefill_kv_tokens=read.prefill_kv,
        prefill_pairs=read.prefill_pairs,
        rejected=batch.rejected,
    )
