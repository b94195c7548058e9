"""What the page on kernels shows: constants with residuals, tables against fits, and where each parameter comes from."""

from __future__ import annotations

import pandas as pd

from stepcal.kernels.constants import ANY, KERNELS_FILE
from stepcal.locations import data_folder
from stepcal.step_time.coefficients import DEFAULT, load_coefficients
from stepcal.step_time.kernel_parameters import (
    EXPERT_SKEW,
    KERNEL_PARAMETERS,
    KV_BLOCK_NS,
    SMALL_KERNEL_US,
    SMALL_KERNELS_A_LAYER,
)
from stepcal.step_time.physical import HOST_REQUEST_US
from stepcal.step_time.sampler import (
    FLASHINFER_BYTES_A_LOGIT,
    FLASHINFER_TOP_K_BYTES_A_LOGIT,
    PENALTY_BYTES_A_LOGIT,
    PLAIN_BYTES_A_LOGIT,
    SCAN_NS_A_LOGIT,
    SORT_FACTORS,
    SORT_NS_A_LOGIT,
    SORT_US_A_REQUEST,
    TRITON_BYTES_A_LOGIT,
)
from stepcal.units import PERCENT

DATASHEET, KERNEL_TABLE, CODE, FITTED, TIMED = (
    "datasheet",
    "kernel table",
    "code reading",
    "fitted on the 16",
    "our timing",
)
SUGGESTED = "suggested by the 31"


def constants() -> pd.DataFrame:
    """Return ``data/hardware/kernels.csv`` without the medians, with `residual_percent`."""
    table = _hardware(KERNELS_FILE)
    own = table[table["gpu"] != ANY]
    return own.assign(residual_percent=PERCENT * own["residual_log_sd"]).reset_index(drop=True)


def samples() -> pd.DataFrame:
    """Return rows of the kernel tables beside what the fitted constants say of them."""
    return _hardware("kernel_samples.csv")


def datasheet_differences() -> pd.DataFrame:
    """Return our datasheet figures that differ from the wheel's by more than 1%."""
    table = _hardware("wheel_datasheet.csv")
    return table[table["difference_percent"].abs() > 1.0].reset_index(drop=True)


def parameter_sources() -> pd.DataFrame:
    """Return the numbers of the kernel model beside kernels' constants: `name`, `value`, `unit`, `source`, `about`."""
    values = load_coefficients(DEFAULT).values
    fitted = [(p.name, values[p.name], p.unit, FITTED, p.source.removeprefix("prior: ")) for p in KERNEL_PARAMETERS]
    sort_a100 = SORT_FACTORS["a100-80gb"]
    others = [
        ("bandwidth, peaks, interconnect", None, "", DATASHEET, "data/hardware/accelerators.csv"),
        ("floors and shares of each kernel", None, "", KERNEL_TABLE, "data/hardware/kernels.csv"),
        ("all-reduce", None, "", KERNEL_TABLE, "data/hardware/all_reduce.csv"),
        (
            "small kernels a layer",
            SMALL_KERNELS_A_LAYER,
            "1",
            CODE,
            "two norms, rotary embedding, activation, KV write",
        ),
        ("small kernel", SMALL_KERNEL_US, "us", KERNEL_TABLE, "the wheel's constant for memory-bound kernels"),
        ("KV block and layer", KV_BLOCK_NS, "ns", KERNEL_TABLE, "paged benchmarks, data/kernel_efficiency.csv"),
        ("sort, a logit", SORT_NS_A_LOGIT, "ns", SUGGESTED, "a public benchmark has 0.21 with all around it"),
        ("sort, a request", SORT_US_A_REQUEST, "us", CODE, "torch.sort goes through few rows one by one"),
        ("softmax and sum, a logit of the vocabulary", SCAN_NS_A_LOGIT, "ns", SUGGESTED, "one block a row"),
        ("sort on A100, over H100", sort_a100, "1", SUGGESTED, "not measured"),
        ("bytes a logit", PLAIN_BYTES_A_LOGIT, "byte", CODE, "passes over float32 logits"),
        ("bytes a logit, Triton's cut", TRITON_BYTES_A_LOGIT, "byte", CODE, "from vLLM 0.19.0, a lower bound"),
        ("bytes a logit, FlashInfer", FLASHINFER_BYTES_A_LOGIT, "byte", CODE, "from vLLM 0.24.0, a lower bound"),
        (
            "bytes a logit, FlashInfer's top-k",
            FLASHINFER_TOP_K_BYTES_A_LOGIT,
            "byte",
            CODE,
            "from vLLM 0.24.0, a lower bound",
        ),
        ("bytes a logit, penalties", PENALTY_BYTES_A_LOGIT, "byte", CODE, "a guess that no run measures"),
        ("skew of the routing", EXPERT_SKEW, "1", SUGGESTED, "weights of experts fall as rank^-0.8"),
        ("schedule(), a request", HOST_REQUEST_US, "us", TIMED, "vLLM 0.15.1 on an idle CPU"),
    ]
    return pd.DataFrame([*fitted, *others], columns=["name", "value", "unit", "source", "about"])


def _hardware(name: str) -> pd.DataFrame:
    return pd.read_csv(data_folder() / "hardware" / name)
