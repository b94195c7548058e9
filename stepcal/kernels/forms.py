"""How long a kernel takes: a floor, its bytes over a share of the bandwidth, its FLOPs over a share of the peak.

``time = floor + unit units + ((bytes / (e bandwidth))^p + (FLOPs / (c peak))^p)^(1/p)``. The shares `e` and `c`, the floor
and the sharpness `p` are fitted to measured tables (`stepcal.kernels.fit`); bandwidth and peak are the datasheet's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.specs.hardware import Accelerator
from stepcal.units import US_PER_S, FloatArray

GEMM, EXPERTS, ELEMENTWISE = "gemm", "experts", "elementwise"
DECODE_ATTENTION, PREFILL_ATTENTION = "decode_attention", "prefill_attention"
MLA_DECODE, MLA_PREFILL = "mla_decode", "mla_prefill"
PREFILL_OF_WIDTH = {64: "prefill_attention_64", 256: "prefill_attention_256"}
"""Prefill of heads that are not 128 elements wide: they reach another share of the peak."""
KERNELS = (
    GEMM, EXPERTS, DECODE_ATTENTION, PREFILL_ATTENTION, ELEMENTWISE, MLA_DECODE, MLA_PREFILL, *PREFILL_OF_WIDTH.values(),
)  # fmt: skip
PRECISIONS = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int8": 1.0, "int4": 0.5, "nvfp4": 0.5625, "mxfp4": 0.53125}
"""Bytes of a stored weight, scales included where they are not negligible (one byte for 16 in nvfp4, for 32 in mxfp4)."""
BYTES_PER_ACTIVATION = 2.0
FLOPS_PER_MAC = 2.0
MATRICES_OF_AN_EXPERT = 3
"""Gate, up and down, as in all tables that are used."""


@dataclass(frozen=True)
class KernelConstants:
    """The constants of one kernel on one GPU.

    Attributes
    ----------
    kernel, precision : str
        One of `KERNELS`; of weights, or of the KV cache for attention.
    floor_us : float
        Time of a launch with hardly any work.
    unit_us : float
        Time a unit: a request and KV head of decode attention, an expert that is touched, a request of latent attention's
        decode and a token of its prefill; else 0.
    bandwidth_share, compute_share : float
        Shares of the datasheet's bandwidth and peak that long kernels reach.
    sharpness : float
        How sharply the longer of memory and compute hides the other: 1 adds them up, infinity takes the maximum.
    residual_log_sd : float
        Spread of ``log(fitted / measured)`` over the table (robust standard deviation): the error to expect of one kernel.
    n_rows : int
        Measurements behind the fit; 0 where the constants are those of other GPUs.
    basis : str
        Table and version, or what stands in for it.
    """

    kernel: str
    precision: str
    floor_us: float
    unit_us: float = 0.0
    bandwidth_share: float = 1.0
    compute_share: float = 1.0
    sharpness: float = 1.0
    residual_log_sd: float = 0.0
    n_rows: int = 0
    basis: str = ""

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise InputError(f"Unknown kernel `{self.kernel}`. Kernels: {', '.join(KERNELS)}.")
        for name, least in (("floor_us", 0.0), ("unit_us", 0.0), ("residual_log_sd", 0.0), ("sharpness", 1.0)):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= least):
                raise InputError(
                    f"`{name}` of `{self.kernel}` is {value}; it must be finite and at least {least:g}. Take a fitted one "
                    "from data/hardware/kernels.csv."
                )
        for name in ("bandwidth_share", "compute_share"):
            value = getattr(self, name)
            if not 0.0 < value <= MOST_SHARE:
                raise InputError(
                    f"`{name}` of `{self.kernel}` is {value}; a share of the datasheet's figure lies above 0 and is at "
                    f"most {MOST_SHARE:g}."
                )

    def time_us(self, memory_us: ArrayLike, compute_us: ArrayLike = 0.0, *, units: ArrayLike = 0.0) -> FloatArray:
        """Time of the kernel, from the times that the datasheet's bandwidth and peak alone would take.

        Examples
        --------
        >>> float(KernelConstants("gemm", "bf16", 4.0, bandwidth_share=0.5, sharpness=2.0).time_us(3.0, 8.0))
        14.0
        """
        memory = np.asarray(memory_us, dtype=float) / self.bandwidth_share
        compute = np.asarray(compute_us, dtype=float) / self.compute_share
        longer, shorter = np.maximum(memory, compute), np.minimum(memory, compute)
        # The longer one in front of the root: powers of large times would overflow.
        ratio = np.divide(shorter, longer, out=np.zeros(np.shape(longer)), where=longer > 0)
        blended = longer * (1.0 + ratio**self.sharpness) ** (1.0 / self.sharpness)
        return np.asarray(self.floor_us + self.unit_us * np.asarray(units, dtype=float) + blended, dtype=float)


MOST_SHARE = 1.2
"""Small weights stay in the L2 cache and beat the bandwidth of memory; nothing that is fitted goes beyond this."""


def gemm_us(
    constants: KernelConstants, accelerator: Accelerator, rows: ArrayLike, columns: float, depth: float
) -> FloatArray:
    """Time of a matrix product of `rows` tokens with a weight matrix of `depth` x `columns`, shape of `rows`.

    Parameters
    ----------
    constants : KernelConstants
        Of ``gemm``; their precision says how wide a weight is.
    accelerator : Accelerator
    rows : array_like of float
        Tokens.
    columns, depth : float
        Outputs and inputs of the matrix, on one rank.

    Returns
    -------
    ndarray of float
        Microseconds.
    """
    m = np.asarray(rows, dtype=float)
    moved = columns * depth * PRECISIONS[constants.precision] + m * (depth + columns) * BYTES_PER_ACTIVATION
    flops = FLOPS_PER_MAC * m * columns * depth
    peak = accelerator.peak_flops(constants.precision)
    return constants.time_us(moved * US_PER_S / accelerator.hbm_bandwidth, flops * US_PER_S / peak)


def experts_us(
    constants: KernelConstants,
    accelerator: Accelerator,
    tokens: ArrayLike,
    touched: ArrayLike,
    *,
    weights_of_an_expert: float,
    experts_per_token: int,
) -> FloatArray:
    """Time of a mixture's grouped matrix products, shape of `tokens`.

    Parameters
    ----------
    constants : KernelConstants
        Of ``experts``; alignment, gather and activation are in their floor.
    accelerator : Accelerator
    tokens, touched : array_like of float
        Tokens of the step, and the experts that at least one of them visits.
    weights_of_an_expert : float
        Elements of its matrices, on one rank.
    experts_per_token : int
    """
    width = PRECISIONS[constants.precision]
    read = np.asarray(touched, dtype=float) * weights_of_an_expert * width
    flops = FLOPS_PER_MAC * np.asarray(tokens, dtype=float) * experts_per_token * weights_of_an_expert
    peak = accelerator.peak_flops(constants.precision)
    return constants.time_us(read * US_PER_S / accelerator.hbm_bandwidth, flops * US_PER_S / peak, units=touched)


@dataclass(frozen=True)
class AllReduce:
    """Measured all-reduces of some ranks, by the size of the message.

    Attributes
    ----------
    ranks : int
    message_bytes, latency_us : ndarray, shape (n_sizes,)
        Ascending sizes. Between them time is a power of the size; below the smallest it is constant, above the largest
        proportional to the size.
    factor : float
        What a table of other ranks or another GPU is multiplied by; 1 for the table of these.
    basis : str
    """

    ranks: int
    message_bytes: FloatArray
    latency_us: FloatArray
    factor: float = 1.0
    basis: str = ""

    def time_us(self, message_bytes: ArrayLike) -> FloatArray:
        """Time of one all-reduce, shape of `message_bytes`.

        Examples
        --------
        >>> table = AllReduce(2, np.array([1e3, 1e6]), np.array([4.0, 16.0]))
        >>> table.time_us([0.0, 31622.7766, 2e6]).round(3).tolist()
        [4.0, 8.0, 32.0]
        """
        size = np.maximum(np.asarray(message_bytes, dtype=float), self.message_bytes[0])
        inside = np.exp(np.interp(np.log(size), np.log(self.message_bytes), np.log(self.latency_us)))
        return np.asarray(self.factor * inside * np.maximum(size / self.message_bytes[-1], 1.0), dtype=float)
