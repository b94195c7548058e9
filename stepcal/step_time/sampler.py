"""What sampling adds to a step: passes over the logits, a sort where tokens are cut off, counts where they are penalised.

vLLM 0.15.1 samples in PyTorch (its wheel, ``vllm/v1/sample/ops/topk_topp_sampler.py``): with top-k or top-p it sorts the
float32 logits of every request. ``torch.sort`` goes through fewer than 128 rows one by one, so a sort costs launches a
request beside its logits; the softmax and the running sum that follow give each row to one block, whose time goes by the
vocabulary whatever the batch. Every rank samples over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.specs.deployment import Deployment
from stepcal.units import NS_PER_US, US_PER_S, FloatArray

PLAIN_BYTES_A_LOGIT = 40.0
"""Bytes moved a logit without a sort: to float32 (6), by the temperature (8), softmax (12), noise (4), quotient and argmax
(10); code reading, all of it at the memory's bandwidth."""
PENALTY_BYTES_A_LOGIT = 80.0
"""Bytes moved a logit by penalties: two counts of 8 bytes, filled and scattered, masks, and three passes over the logits;
code reading, a guess that no run of ours measures."""
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


@dataclass(frozen=True)
class SamplerCosts:
    """Where the sampler's time goes, each of shape (n_steps,), in microseconds."""

    plain_us: FloatArray
    sort_us: FloatArray
    penalty_us: FloatArray

    @property
    def total_us(self) -> FloatArray:
        """All of it."""
        return self.plain_us + self.sort_us + self.penalty_us


def sampler_costs(requests: ArrayLike, deployment: Deployment) -> SamplerCosts:
    """Time of sampling a token for each of some requests.

    Parameters
    ----------
    requests : array_like of float, shape (n_steps,)
        Requests that are sampled for.
    deployment : Deployment
        Its `sampling` says what is cut off and penalised.

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
    sorted_us = np.zeros_like(b)
    if deployment.sampling.restricts_tokens:
        scan = SCAN_NS_A_LOGIT * deployment.architecture.vocab_size / NS_PER_US * (b > 0)
        sorted_us = scan + b * SORT_US_A_REQUEST + logits * SORT_NS_A_LOGIT / NS_PER_US
        sorted_us = sorted_us * SORT_FACTORS.get(deployment.accelerator.name, 1.0)
    penalty = logits * PENALTY_BYTES_A_LOGIT * a_byte * float(deployment.sampling.penalises)
    return SamplerCosts(logits * PLAIN_BYTES_A_LOGIT * a_byte, sorted_us, penalty)
