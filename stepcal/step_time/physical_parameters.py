"""The parameters that are learned on top of bytes and FLOPs, each with its unit, bounds, prior and where that comes from.

Models take and give parameters by name. Only an optimiser sees an array of them, in the order
of a tuple of `LearnedParameter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.units import FloatArray


@dataclass(frozen=True)
class LearnedParameter:
    """A learned parameter with its prior, which is log-normal around `start`.

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


SCAN = LearnedParameter(
    "offload_scan_us",
    "us",
    0.085,
    0.005,
    1.0,
    0.3,
    "prior: a block's share of a scan of the pool in vLLM 0.15.1's prepare_store(), timed on a CPU (our timing)",
)
"""Price of scanning a block of the offload pool, the same in every model of the step."""

STEP_PARAMETERS = (
    LearnedParameter(
        "hbm_read_factor",
        "1",
        1.12,
        1.0,
        2.0,
        0.05,
        "bound: datasheet bandwidth; prior: long streaming kernels reach 0.86-0.94 of it (kernels/mha/decode, > 300 us)",
    ),
    LearnedParameter(
        "kv_block_ns",
        "ns",
        2.0,
        0.05,
        50.0,
        1.0,
        "prior: 1-2 ns a KV block beyond its bytes (kernels/mha/decode, grouped queries, 128 requests), laid out in order",
    ),
    LearnedParameter(
        "layer_us",
        "us",
        50.0,
        1.0,
        300.0,
        0.4,
        "prior: about ten kernels a layer at 2-3 us of fill and drain, one attention kernel at 20 us (benchmark floors)",
    ),
    LearnedParameter(
        "mixture_layer_us",
        "us",
        30.0,
        0.1,
        500.0,
        0.7,
        "prior: router, top-k, alignment and the second grouped GEMM add about five kernels",
    ),
    LearnedParameter(
        "collective_us",
        "us",
        6.0,
        0.1,
        100.0,
        0.5,
        "prior: a stage of a small all-reduce over NVLink, 4-10 us; one or two stages by the size of the message",
    ),
    LearnedParameter(
        "collective_bytes_factor",
        "1",
        1.5,
        1.0,
        20.0,
        0.5,
        "bound: datasheet bandwidth, one direction; prior: 60-70% of it at best",
    ),
    LearnedParameter(
        "request_us",
        "us",
        10.0,
        0.1,
        300.0,
        0.7,
        "prior: sampling, input preparation and output per request; schedule() alone takes 8.5 us on a CPU",
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
)
"""The nine parameters of the step time, the same for every model."""
API_PARAMETERS = (
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
"""Parameters around the engine. TTFT and E2E cannot tell the way in from the way out, so one parameter holds both."""

PARAMETERS = (*STEP_PARAMETERS, *API_PARAMETERS)
"""All learned parameters, those of the step first."""


def by_name(theta: ArrayLike, parameters: Sequence[LearnedParameter] = PARAMETERS) -> dict[str, float]:
    """Name the values of an optimiser's array.

    Raises
    ------
    ValueError
        If there is not one value for each parameter.

    Examples
    --------
    >>> by_name([0.085], STEP_PARAMETERS[-1:])
    {'offload_scan_us': 0.085}
    """
    return {p.name: float(v) for p, v in zip(parameters, np.asarray(theta, dtype=float), strict=True)}


def as_array(values: Mapping[str, float], parameters: Sequence[LearnedParameter] = PARAMETERS) -> FloatArray:
    """Return values in the order of the parameters, as an optimiser takes them; shape (n_parameters,).

    Raises
    ------
    KeyError
        If one is missing.
    """
    return np.array([values[p.name] for p in parameters], dtype=float)


def priors(parameters: Sequence[LearnedParameter] = PARAMETERS) -> dict[str, float]:
    """Return each parameter's prior median, by name."""
    return {p.name: p.start for p in parameters}


def checked(values: Mapping[str, float], parameters: Sequence[LearnedParameter] = STEP_PARAMETERS) -> dict[str, float]:
    """Return the values of some parameters, each there, finite and not negative.

    Raises
    ------
    InputError
        If one is missing, negative or not finite; it is named.
    """
    for p in parameters:
        value = values.get(p.name, float("nan"))
        if not (np.isfinite(value) and value >= 0):
            state = f"is {value}" if p.name in values else "is missing"
            raise InputError(
                f"`{p.name}` {state}; it must be finite and at least 0 (its prior is {p.start:g} {p.unit})."
            )
    return {p.name: float(values[p.name]) for p in parameters}
