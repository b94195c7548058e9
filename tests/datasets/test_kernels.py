"""The summary of kernel benchmarks: recomputed where they are at hand, and consistent with the constants that rest on it."""

from pathlib import Path

import pandas as pd
import pytest

from stepcal.datasets import kernel_efficiency
from stepcal.datasets.kernels import summarise_kernels
from stepcal.errors import InputError
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.physical import ATTENTION_MFU, GEMM_MFU
from stepcal.step_time.physical_parameters import STEP_PARAMETERS

PRIORS = {p.name: p for p in STEP_PARAMETERS}


def rows(**wanted):
    table = kernel_efficiency()
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def test_the_benchmarks_give_the_shipped_summary(traces_folder: Path) -> None:
    computed = summarise_kernels(traces_folder)
    pd.testing.assert_frame_equal(computed.reset_index(drop=True), kernel_efficiency(), check_dtype=False)


def test_constants_are_what_kernels_reach() -> None:
    large = rows(kernel="gemm", quantity="share_of_flops").query("tokens >= 1024")["median"]
    assert large.min() < GEMM_MFU < large.max()
    (attention,) = rows(kernel="prefill_attention", tokens=4_096)["median"]
    assert round(attention, 2) == ATTENTION_MFU


def test_priors_are_consistent_with_the_kernels() -> None:
    (streams,) = rows(kernel="decode_attention", batch_size=0).to_dict("records")
    assert 1 / streams["high"] < PRIORS["hbm_read_factor"].start < 1 / streams["low"]
    block = rows(quantity="block_excess_ns", heads="grouped")["median"]
    assert block.min() < PRIORS["kv_block_ns"].start < block.max()


def test_gemm_weights_have_one_byte_an_element() -> None:
    """Two bytes would come faster than the memory's bandwidth, and BF16 could not compute that fast."""
    h100 = load_accelerator("h100-sxm")
    flops = rows(kernel="gemm", quantity="share_of_flops")
    assert (flops["high"] * flops["peak"] * 1e12).max() > h100.bf16_dense_flops
    (weights,) = rows(kernel="gemm", quantity="share_of_bandwidth")["high"]
    assert 2 * weights > 1 > weights


def test_a_layout_without_benchmarks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the public layout is incomplete"):
        summarise_kernels(tmp_path)
