"""Kernel constants: the fits find what they were planted with, stand-ins say so, and what ships holds together."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.errors import InputError
from stepcal.kernels import AllReduce, KernelConstants, load_kernels
from stepcal.kernels.build import typical
from stepcal.kernels.constants import KERNELS_FILE, measured_gpus
from stepcal.kernels.fit import fit_decode_attention, fit_experts, fit_gemm, fit_prefill_attention
from stepcal.kernels.forms import experts_us, gemm_us
from stepcal.kernels.mla_fit import DEEPSEEK_V3, fit_mla
from stepcal.kernels.tables import open_wheel
from stepcal.locations import data_folder
from stepcal.specs.hardware import load_accelerator, read_accelerator

H100 = load_accelerator("h100-sxm")
NOISE = 0.03
positive = st.floats(1e-3, 1e6)


def noisy(times, seed=0):
    return times * np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(times)))


def grid(**columns):
    return pd.MultiIndex.from_product(columns.values(), names=columns.keys()).to_frame(index=False)


def same(fitted, planted, *names, rel=0.05):
    found = fitted.constants
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(planted, name), rel=rel), name


def test_products_are_found_again():
    planted = KernelConstants("gemm", "bf16", 4.0, bandwidth_share=0.85, compute_share=0.7, sharpness=3.0)
    table = grid(m=[8, 64, 256, 1024, 4096], n=[2048, 4096, 8192, 28672], k=[2048, 4096, 8192])
    times = [gemm_us(planted, H100, r.m, r.n, r.k) for r in table.itertuples()]
    found = fit_gemm(table.assign(latency_us=noisy(np.array(times))), H100, "bf16")
    same(found, planted, "floor_us", "bandwidth_share", "compute_share", rel=0.1)
    assert found.constants.residual_log_sd == pytest.approx(NOISE, rel=0.4)


def test_attention_is_found_again():
    planted = KernelConstants("decode_attention", "bf16", 12.0, unit_us=0.02, bandwidth_share=0.9)
    table = grid(
        batch_size=[1, 8, 32, 128, 512], context=[128, 512, 2048, 8192, 32768], num_key_value_heads=[1, 2, 4, 8]
    )
    heads = table["batch_size"] * table["num_key_value_heads"]
    memory = heads * table["context"] * 512 / H100.hbm_bandwidth * 1e6
    times = noisy(planted.time_us(memory, units=heads))
    found = fit_decode_attention(table.assign(head_dim=128, latency_us=times), H100, "bf16", 50e6)
    same(found, planted, "floor_us", "unit_us", "bandwidth_share", rel=0.15)
    planted = KernelConstants("prefill_attention", "bf16", 15.0, bandwidth_share=0.5, compute_share=0.6)
    table = grid(
        batch_size=[1, 4, 16], isl=[128, 512, 1024, 4096, 16384], num_heads=[8, 16, 32], num_key_value_heads=[8]
    )
    tokens = table["batch_size"] * table["isl"]
    compute = 4 * tokens * (table["isl"] + 1) / 2 * table["num_heads"] * 128 / H100.bf16_dense_flops * 1e6
    memory = tokens * 4 * (table["num_heads"] + 8) * 128 / H100.hbm_bandwidth * 1e6
    found = fit_prefill_attention(
        table.assign(head_dim=128, latency_us=noisy(planted.time_us(memory, compute))), H100, "bf16"
    )
    same(found, planted, "floor_us", "bandwidth_share", "compute_share", rel=0.15)


def test_experts_are_found_again():
    planted = KernelConstants(
        "experts", "bf16", 30.0, unit_us=0.1, bandwidth_share=0.9, compute_share=0.6, sharpness=1.5
    )
    shape = {"hidden_size": [4096], "inter_size": [1536, 14336], "num_experts": [8, 128], "topk": [2, 8]}
    table = grid(num_tokens=[1, 8, 64, 512, 4096], **shape)
    touched = np.minimum(table["num_experts"], table["num_tokens"] * table["topk"])
    times = [
        experts_us(
            planted, H100, r.num_tokens, t, weights_of_an_expert=3 * 4096 * r.inter_size, experts_per_token=r.topk
        )
        for r, t in zip(table.itertuples(), touched, strict=True)
    ]
    table = table.assign(moe_tp_size=1, distribution="balanced", latency_us=noisy(np.array(times)))
    same(fit_experts(table, H100, "bf16", 50e6), planted, "bandwidth_share", "compute_share", rel=0.15)


def test_too_few_rows_or_too_much_noise_is_no_fit():
    table = grid(m=[8, 64], n=[4096], k=[4096]).assign(latency_us=10.0)
    assert fit_gemm(table, H100, "bf16") is None
    table = grid(m=[8, 64, 256, 512], n=[2048, 4096, 8192], k=[2048, 4096, 8192])
    wild = 10.0 * np.exp(2.0 * np.random.default_rng(0).standard_normal(len(table)))
    assert fit_gemm(table.assign(latency_us=wild), H100, "bf16") is None


@settings(max_examples=100, deadline=None)
@given(memory=positive, compute=positive, sharpness=st.floats(1.0, 8.0))
def test_a_kernel_takes_at_least_the_longer_part_and_at_most_both(memory, compute, sharpness):
    kernel = KernelConstants("gemm", "bf16", 5.0, sharpness=sharpness)
    time = float(kernel.time_us(memory, compute)) - 5.0
    assert max(memory, compute) * (1 - 1e-9) <= time + 1e-9
    assert time <= (memory + compute) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1e12), st.sampled_from(measured_gpus()), st.sampled_from([2, 4, 8]))
def test_an_all_reduce_takes_a_time_between_those_of_the_sizes_measured_beside_it(message_bytes, gpu, ranks):
    """No more is true: measured times dip by up to 135 % from one size to the next, where the algorithm changes."""
    table = load_kernels(load_accelerator(gpu)).all_reduce(ranks)
    beside = np.searchsorted(table.message_bytes, message_bytes)
    measured = table.factor * table.latency_us[np.clip([beside - 1, beside], 0, len(table.latency_us) - 1)]
    measured = measured * max(message_bytes / table.message_bytes[-1], 1.0)
    assert measured.min() * (1 - 1e-9) <= table.time_us(message_bytes) <= measured.max() * (1 + 1e-9)


@pytest.mark.parametrize("gpu", measured_gpus())
def test_what_ships_is_measured_and_plausible(gpu):
    kernels = load_kernels(load_accelerator(gpu))
    assert kernels.is_measured
    for kernel in ("gemm", "experts", "decode_attention", "prefill_attention"):
        constants = kernels.of(kernel, "bf16")
        assert constants.n_rows >= 30
        assert 0 < constants.residual_log_sd <= 0.3
    assert not any(table.basis.startswith("not measured") for table in kernels.all_reduces.values())


def test_the_issue_names_nine_gpus():
    assert set(measured_gpus()) == {
        "a100-80gb", "h100-sxm", "h200-sxm", "b200", "b300-sxm", "gb200", "gb300", "l40s", "rtx-pro-6000",
    }  # fmt: skip


def test_stand_ins_say_so_and_expect_more_error():
    own, other = load_kernels(H100), load_kernels(load_accelerator("h100-nvl"))
    assert own.notes([("gemm", "bf16")], ranks=2) == []
    assert own.of("gemm", "int4").basis.startswith("not measured: constants of bf16")
    assert own.of("gemm", "int4").residual_log_sd > own.of("gemm", "bf16").residual_log_sd
    assert other.of("gemm", "bf16").basis == "not measured: medians of other GPUs, on the datasheet of h100-nvl"
    assert other.of("gemm", "bf16").residual_log_sd > own.of("gemm", "bf16").residual_log_sd
    assert len(other.notes([("gemm", "bf16")], ranks=2)) == 2


def test_more_ranks_than_were_measured_are_scaled_by_their_traffic():
    kernels = load_kernels(load_accelerator("gb300"))
    eight, four = kernels.all_reduce(8), kernels.all_reduce(4)
    assert float(eight.time_us(1e6)) == pytest.approx(float(four.time_us(1e6)) * (7 / 8) / (3 / 4))


def test_typical_constants_carry_the_spread_between_gpus():
    one = KernelConstants("gemm", "bf16", 4.0, bandwidth_share=0.8, residual_log_sd=0.05)
    other = KernelConstants("gemm", "bf16", 8.0, bandwidth_share=0.4, residual_log_sd=0.05)
    alike, apart = typical({"a": [one], "b": [replace(one)]})[0], typical({"a": [one], "b": [other]})[0]
    assert alike.residual_log_sd == pytest.approx(0.05)
    assert apart.residual_log_sd > 0.3


def test_a_gpu_of_the_users_brings_its_own_kernels(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nbf16_dense_tflops: 500\nhbm_bandwidth_tb_s: 2\nhbm_capacity_gb: 96\ninterconnect_gb_s: 900\n"
        "kernels:\n  - {kernel: gemm, precision: bf16, floor_us: 3.0, bandwidth_share: 0.8, compute_share: 0.7}\n"
    )
    kernels = load_kernels(read_accelerator(path))
    assert kernels.of("gemm", "bf16").floor_us == 3.0
    assert kernels.of("decode_attention", "bf16").basis.startswith("not measured")
    path.write_text(path.read_text().replace("kernel: gemm", "kernel: convolution"))
    with pytest.raises(InputError, match="Unknown kernel `convolution`"):
        load_kernels(read_accelerator(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"floor_us": -1.0}, "`floor_us`"),
        ({"bandwidth_share": 0.0}, "`bandwidth_share`"),
        ({"sharpness": 0.5}, "`sharpness`"),
    ],
)
def test_impossible_constants_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        KernelConstants("gemm", "bf16", **{"floor_us": 1.0, **change})


def test_another_wheel_is_refused(tmp_path):
    with pytest.raises(InputError, match="No wheel at"):
        open_wheel(tmp_path / "absent.whl")
    (tmp_path / "other.whl").write_bytes(b"not it")
    with pytest.raises(InputError, match="is not the pinned wheel"):
        open_wheel(tmp_path / "other.whl")


def test_an_all_reduce_is_a_power_between_its_points():
    table = AllReduce(2, np.array([1e3, 1e6]), np.array([4.0, 16.0]))
    assert table.time_us(np.sqrt(1e9)) == pytest.approx(8.0)


def mla_table(decode, prefill, n=DEEPSEEK_V3):
    """Modules of DeepSeek-V3's attention that take what planted constants say, with noise."""
    products = load_kernels(H100).of("gemm", "bf16")
    tables = {}
    for phase, planted in (("generation", decode), ("context", prefill)):
        lengths = {"context": [128, 1024, 8192, 65536]} if phase == "generation" else {"isl": [128, 512, 2048, 8192]}
        table = grid(batch_size=[1, 8, 64, 512], num_heads=[1, 8, 32, 128], **lengths)
        batch, heads, length = (table[c].to_numpy(float) for c in ("batch_size", "num_heads", *lengths))
        tokens = batch if phase == "generation" else batch * length
        times = []
        for b, h, t, c in zip(batch, heads, tokens, length, strict=True):
            shapes = [p.of_heads(h) for p in n.products(7168, absorbed=phase == "generation")]
            fixed = sum(float(gemm_us(products, H100, t, *shape)) for shape in shapes)
            if phase == "generation":
                memory = b * c * n.latent_width * 2 / H100.hbm_bandwidth * 1e6
                compute = b * c * h * n.decode_flops_per_head / H100.bf16_dense_flops * 1e6
            else:
                memory = t * h * n.prefill_width * 2 / H100.hbm_bandwidth * 1e6
                compute = t * (c + 1) / 2 * h * n.prefill_flops_per_head / H100.bf16_dense_flops * 1e6
            units = b if phase == "generation" else t
            times.append(fixed + float(planted.time_us(memory, compute, units=units)))
        about = {"precision": "bf16", "gemm_type": "bfloat16", "latency_us": noisy(np.array(times))}
        tables[phase] = table.assign(**about)
    return SimpleNamespace(mla=tables.get, version=lambda operation: "0.24.0")


def test_latent_attention_is_found_again_beside_its_products():
    decode = KernelConstants(
        "mla_decode", "bf16", 60.0, unit_us=0.1, bandwidth_share=0.85, compute_share=0.7, sharpness=2.0
    )
    prefill = KernelConstants("mla_prefill", "bf16", 80.0, unit_us=0.03, bandwidth_share=0.3, compute_share=0.8)
    found = {
        f.constants.kernel: f for f in fit_mla(mla_table(decode, prefill), H100, load_kernels(H100).of("gemm", "bf16"))
    }
    same(found["mla_decode"], decode, "floor_us", "bandwidth_share", rel=0.15)
    assert found["mla_decode"].constants.residual_log_sd == pytest.approx(NOISE, rel=0.4)  # share and sharpness trade
    same(found["mla_prefill"], prefill, "floor_us", "unit_us", "bandwidth_share", "compute_share", rel=0.2)


def test_added_kernels_stand_beside_the_frozen_ones_and_not_among_them():
    kernels = load_kernels(H100)
    assert kernels.of("experts", "mxfp4").n_rows > 100
    assert kernels.of("mla_decode", "bf16").n_rows > 100
    assert not load_kernels(load_accelerator("a100-80gb")).of("mla_decode", "bf16").n_rows
    frozen = (data_folder() / "hardware" / KERNELS_FILE).read_text()
    assert "mla" not in frozen
    assert "mxfp4" not in frozen
