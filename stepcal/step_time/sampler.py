"""What sampling adds to a step: passes over the logits, what it takes to cut tokens off, counts where they are penalised.

Which kernel cuts tokens off (top-k, top-p) was recorded for each release (`stepcal.simulator.versions.SamplerPath`):

- vLLM 0.15.1 sorts the float32 logits of every request in PyTorch. ``torch.sort`` goes through fewer than 128 rows one by
  one, so a sort costs launches a request beside its logits; the softmax and the running sum that follow give each row to
  one block, whose time goes by the vocabulary whatever the batch.
- 0.19.0 does so below 8 requests, and from there on searches for the pivot with a Triton kernel.
- 0.24.0 and later draw with FlashInfer until a token lies within what is kept.

Only the sort rests on measured times. The other two are the bytes that they must read and write over the memory's
bandwidth, counted in their code: a lower bound, and `sampler_note` says so. Every rank samples over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.simulator.versions import OLDEST, SamplerPath, release_of
from stepcal.specs.deployment import Deployment
from stepcal.units import NS_PER_US, US_PER_S, FloatArray

PLAIN_BYTES_A_LOGIT = 40.0
"""Bytes moved a logit without a sort: to float32 (6), by the temperature (8), softmax (12), noise (4), quotient and argmax
(10); code reading, all of it at the memory's bandwidth."""
PENALTY_BYTES_A_LOGIT = 80.0
"""Bytes moved a logit by penalties: two counts of 8 bytes, filled and scattered, masks, and three passes over the logits;
code reading, a guess that no run of ours measures."""
DRAW_BYTES_A_LOGIT = 14.0
"""The part of the plain bytes that FlashInfer replaces: noise, quotient and argmax."""
FLASHINFER_BYTES_A_LOGIT = 16.0
"""Bytes read a logit by FlashInfer's top-p kernel: two draws of two passes over float32 probabilities (0.6.12,
``TopPSamplingFromProbKernel``). A draw is outside of what is kept with probability ``1 - top_p``; the slowest row counts."""
FLASHINFER_TOP_K_BYTES_A_LOGIT = 24.0
"""Bytes moved a logit by its top-k mask: four counts of eight bits each, and a pass that reads and writes; code reading."""
TRITON_BYTES_A_LOGIT = 20.0
"""Bytes moved a logit by the Triton kernel: passes for the range, for softmax and outliers, and for the mask, two of which
write; the search itself goes over the outliers alone (0.19.0, ``topk_topp_triton.py``, code reading)."""
SORT_NS_A_LOGIT = 0.15
"""Time of a sort a logit on H100. A public vLLM benchmark has 57.6 ms for 2,048 x 131,072 logits, 0.21 ns each with
everything around the sort; 0.11-0.17 fits the slopes of several such figures."""
SORT_US_A_REQUEST = 5.0
"""Launches of a sort a row: eight kernels of a radix sort, which overlap in part."""
SCAN_NS_A_LOGIT = 1.0
"""Time a logit of the vocabulary, whatever the batch: softmax and running sum of one row in one block."""
SORT_FACTORS = {"a100-80gb": 1.8}
"""Sort times relative to H100. Not measured: excess over kernels on A100 is 1.6 to 2 times that on H100, on L40S about the
same; other GPUs are taken to be like H100."""

NAMES = {"sort": "PyTorch's sort", "triton": "a Triton kernel", "flashinfer": "FlashInfer"}


@dataclass(frozen=True)
class SamplerCosts:
    """Where the sampler's time goes, each of shape (n_steps,), in microseconds: drawing, cutting off, penalties."""

    plain_us: FloatArray
    cut_us: FloatArray
    penalty_us: FloatArray

    @property
    def total_us(self) -> FloatArray:
        """All of it."""
        return self.plain_us + self.cut_us + self.penalty_us


def sampler_costs(requests: ArrayLike, deployment: Deployment) -> SamplerCosts:
    """Time of sampling a token for each of some requests.

    Parameters
    ----------
    requests : array_like of float, shape (n_steps,)
        Requests that are sampled for.
    deployment : Deployment
        Its `sampling` says what is cut off and penalised, and its server's release how; without a server, as the oldest
        recorded release does.

    Returns
    -------
    SamplerCosts

    Examples
    --------
    >>> from stepcal.specs.architecture import load_architecture
    >>> from stepcal.specs.hardware import load_accelerator
    >>> plain = Deployment(load_architecture("llama-2-7b"), load_accelerator("h100-sxm"))
    >>> float(sampler_costs(0, plain).total_us[0])
    0.0
    """
    b = np.atleast_1d(np.asarray(requests, dtype=float))
    logits = b * deployment.architecture.vocab_size
    a_byte = US_PER_S / deployment.accelerator.hbm_bandwidth
    cut_us = np.zeros_like(b)
    if deployment.sampling.restricts_tokens:
        for path in reversed(_paths(deployment)):
            cut_us = np.where(b >= path.from_requests, _cut_us(path.kernel, b, deployment), cut_us)
    penalty = logits * PENALTY_BYTES_A_LOGIT * a_byte * float(deployment.sampling.penalises)
    return SamplerCosts(logits * PLAIN_BYTES_A_LOGIT * a_byte, cut_us, penalty)


def sampler_note(deployment: Deployment) -> str | None:
    """What to tell a user whose release cuts tokens off in a way that was not timed, or None.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from stepcal.specs.sampling import Sampling
    >>> served = Deployment.of("llama-2-7b", "h100-sxm", kv_blocks=1000, vllm_version="0.33.0")
    >>> sampler_note(served) is None
    True
    >>> sampler_note(replace(served, sampling=Sampling(top_p=0.9)))[:67]
    'sampling with top-k or top-p goes through FlashInfer in vLLM 0.33.0'
    """
    if not deployment.sampling.restricts_tokens:
        return None
    untimed = [path.kernel for path in _paths(deployment) if path.kernel != "sort"]
    if not untimed:
        return None
    return (
        f"sampling with top-k or top-p goes through {NAMES[untimed[0]]} in vLLM {deployment.limits.vllm_version}, which was "
        "not timed: its bytes over the memory's bandwidth are a lower bound."
    )


def _paths(deployment: Deployment) -> tuple[SamplerPath, ...]:
    version = OLDEST if deployment.server is None else deployment.server.vllm_version
    return release_of(version).samplers


def _cut_us(kernel: str, requests: FloatArray, deployment: Deployment) -> FloatArray:
    """Time of cutting tokens off, beside what sampling takes without."""
    vocabulary, sampling = deployment.architecture.vocab_size, deployment.sampling
    logits = requests * vocabulary
    if kernel == "sort":
        scan = SCAN_NS_A_LOGIT * vocabulary / NS_PER_US * (requests > 0)
        sort = requests * SORT_US_A_REQUEST + logits * SORT_NS_A_LOGIT / NS_PER_US
        return np.asarray((scan + sort) * SORT_FACTORS.get(deployment.accelerator.name, 1.0))
    moved = TRITON_BYTES_A_LOGIT
    if kernel == "flashinfer":
        both = sampling.top_k > 0 and sampling.top_p < 1.0
        moved = FLASHINFER_BYTES_A_LOGIT - DRAW_BYTES_A_LOGIT + (FLASHINFER_TOP_K_BYTES_A_LOGIT if both else 0.0)
    return np.asarray(logits * moved * US_PER_S / deployment.accelerator.hbm_bandwidth)
