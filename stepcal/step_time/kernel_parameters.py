"""The parameters of the kernel model that kernels cannot know, with priors from the kernels' own residuals."""

from __future__ import annotations

from stepcal.step_time.physical_parameters import SCAN, LearnedParameter

SMALL_KERNELS_A_LAYER = 5
"""Two norms, rotary embedding, activation and the writing of keys and values, as torch.compile fuses them (code reading)."""
SMALL_KERNEL_US = 3.0
"""Floor of a memory-bound kernel (the wheel's own constant, data/hardware/kernels.csv, ``elementwise``)."""
KV_BLOCK_NS = 1.0
"""Time of a KV block and layer beyond its bytes: 1-2 ns in benchmarks with paged caches (data/kernel_efficiency.csv). The
tables behind the kernels lay blocks in order; a server's lie where they were free."""
FLASH_ATTENTION_3 = frozenset({"h100-sxm", "h100-nvl", "h200-sxm"})
"""GPUs whose attention kernel is that of the servers on which `attention_scale` is learned. Others take their tables as they
are. Chosen after an L40S run had been seen, where the scale of the H100 does harm."""

KERNEL_PARAMETERS = (
    LearnedParameter(
        "products_scale",
        "1",
        1.0,
        0.5,
        2.0,
        0.05,
        "prior: kernel tables as fitted; matrix products of a model add up several shapes, whose residuals are 6-9%",
    ),
    LearnedParameter(
        "attention_scale",
        "1",
        1.0,
        0.5,
        2.0,
        0.05,
        "prior: kernel tables as fitted, residuals of 5-6% on H100; of FlashAttention-3 only, so of Hopper GPUs",
    ),
    LearnedParameter(
        "layer_us",
        "us",
        SMALL_KERNELS_A_LAYER * SMALL_KERNEL_US,
        1.0,
        100.0,
        0.4,
        "prior: five small kernels a layer (code reading) at 3 us (kernel table); no table of vLLM's has them",
    ),
    LearnedParameter(
        "mixed_layer_us",
        "us",
        8.0,
        0.1,
        200.0,
        0.6,
        "prior: steps with prefill replay piecewise CUDA graphs and launch attention by hand, a few launches a layer",
    ),
    SCAN,
    LearnedParameter(
        "api_before_us",
        "us",
        6_000.0,
        10.0,
        100_000.0,
        0.5,
        "prior: TTFT exceeds 2.5 steps by 6-10 ms (HTTP, tokenisation, first stream event)",
    ),
)
"""Three scales of the GPU, one of steps with prefill, two of the host."""
EXPERT_SKEW = 0.8
"""Exponent of the weights with which routers choose experts: the i-th most popular one has ``i^-0.8``. Even routing is 0;
0.8 was suggested by mixtures that were served (KERNELS study on the 31 runs), not by the 16."""
