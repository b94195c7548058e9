import math

import pytest

from stepcal.errors import InputError
from stepcal.specs.hardware import accelerators, load_accelerator


def test_the_h100_has_the_dense_rates_of_its_datasheet():
    h100 = load_accelerator("h100-sxm")
    assert h100.bf16_dense_flops == 989.5e12
    assert h100.fp8_dense_flops == 1979e12
    assert h100.hbm_bandwidth == pytest.approx(3.35e12)
    assert h100.hbm_capacity_bytes == 80e9
    assert h100.interconnect_bandwidth == 900e9


def test_the_promised_accelerators_are_there():
    assert set(accelerators()) >= {"h100-sxm", "h100-nvl", "h200-sxm", "a100-80gb", "l40s", "b200"}


@pytest.mark.parametrize("name", ["h100-sxm", "h100-nvl", "h200-sxm", "a100-80gb", "l40s", "b200"])
def test_every_row_is_plausible_and_has_a_source(name):
    gpu = load_accelerator(name)
    assert gpu.name == name
    assert gpu.source
    assert 1e14 < gpu.bf16_dense_flops < 1e16
    assert 5e11 < gpu.hbm_bandwidth < 1e13
    assert 4e10 < gpu.hbm_capacity_bytes < 3e11
    assert gpu.fp8_dense_flops is None or gpu.fp8_dense_flops == pytest.approx(2 * gpu.bf16_dense_flops, rel=0.02)
    assert math.isfinite(gpu.interconnect_bandwidth)


def test_a_gpu_without_fp8_says_so():
    assert load_accelerator("a100-80gb").fp8_dense_flops is None


def test_an_unknown_accelerator_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"Unknown accelerator `tpu-v5`.*h100-sxm.*JSON or YAML file"):
        load_accelerator("tpu-v5")
