"""The numbers that are learned on top of bytes and FLOPs, each with its unit, bounds, prior and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhysicalParameter:
    """A learned number with its prior, which is log-normal around `start`.

    Attributes
    ----------
    name, unit : str
    start : float
        Prior median, and where a fit starts.
    low, high : float
        Bounds of the search.
    prior_log_sd : float
        Standard deviation of the prior in the logarithm.
    source : str
        Where prior and bounds come from.
    """

    name: str
    unit: str
    start: float
    low: float
    high: float
    prior_log_sd: float
    source: str


STEP_PARAMETERS = (
    PhysicalParameter(
        "hbm_read_factor",
        "1",
        1.12,
        1.0,
        2.0,
        0.05,
        "bound: datasheet bandwidth; prior: long streaming kernels reach 0.86-0.94 of it (kernels/mha/decode, > 300 us)",
    ),
    PhysicalParameter(
        "kv_block_ns",
        "ns",
        2.0,
        0.05,
        50.0,
        1.0,
        "prior: 1-2 ns a KV block beyond its bytes (kernels/mha/decode, grouped queries, 128 requests), laid out in order",
    ),
    PhysicalParameter(
        "layer_us",
        "us",
        50.0,
        1.0,
        300.0,
        0.4,
        "prior: about ten kernels a layer at 2-3 us of fill and drain, one attention kernel at 20 us (benchmark floors)",
    ),
    PhysicalParameter(
        "mixture_layer_us",
        "us",
        30.0,
        0.1,
        500.0,
        0.7,
        "prior: router, top-k, alignment and the second grouped GEMM add about five kernels",
    ),
    PhysicalParameter(
        "collective_us",
        "us",
        6.0,
        0.1,
        100.0,
        0.5,
        "prior: a stage of a small all-reduce over NVLink, 4-10 us; one or two stages by the size of the message",
    ),
    PhysicalParameter(
        "collective_bytes_factor",
        "1",
        1.5,
        1.0,
        20.0,
        0.5,
        "bound: datasheet bandwidth, one direction; prior: 60-70% of it at best",
    ),
    PhysicalParameter(
        "request_us",
        "us",
        10.0,
        0.1,
        300.0,
        0.7,
        "prior: sampling, input preparation and output per request; schedule() alone takes 8.5 us on a CPU",
    ),
    PhysicalParameter(
        "mixed_layer_us",
        "us",
        8.0,
        0.1,
        200.0,
        0.6,
        "prior: steps with prefill replay piecewise CUDA graphs and launch attention by hand, a few launches a layer",
    ),
    PhysicalParameter(
        "offload_scan_us",
        "us",
        0.085,
        0.005,
        1.0,
        0.3,
        "prior: a block's share of a scan of the pool in vLLM 0.15.1's prepare_store(), timed on a CPU (our timing)",
    ),
)
"""The nine numbers of the step time, the same for every model."""
API_PARAMETERS = (
    PhysicalParameter(
        "api_before_us",
        "us",
        6_000.0,
        10.0,
        100_000.0,
        0.5,
        "prior: TTFT exceeds 2.5 steps by 6-10 ms (HTTP, tokenisation, first stream event)",
    ),
)
"""Numbers around the engine. The way in and the way out cannot be told apart by TTFT and E2E, so one number holds both."""

PARAMETERS = (*STEP_PARAMETERS, *API_PARAMETERS)
"""All learned numbers, those of the step first."""
N_STEP = len(STEP_PARAMETERS)
