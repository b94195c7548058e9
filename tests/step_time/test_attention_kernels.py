"""Latent attention and FP8 caches in the kernel model: held to rows of the tables, and to laws of attention."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.errors import NotModelledError
from stepcal.kernels import load_kernels
from stepcal.kernels.forms import gemm_us
from stepcal.servers.predict import predict_step, step_batch
from stepcal.simulator import StepBatch
from stepcal.simulator.config import ServerConfig
from stepcal.specs.architecture import ModelArchitecture, load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.attention_kernels import (
    SMALL_KERNELS_OF_A_MODULE,
    attention_costs,
    attention_kernels,
    latent_products,
)
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.kernel_model import kernel_notes
from stepcal.step_time.kernel_parameters import SMALL_KERNEL_US

LINES = (Path(__file__).parents[1] / "specs" / "public_models.jsonl").read_text().splitlines()
PUBLIC = {one["model"]: one["config"] for one in map(json.loads, LINES)}
V3 = ModelArchitecture.from_config(PUBLIC["deepseek-ai/DeepSeek-V3"], name="deepseek-v3")
H100 = load_accelerator("h100-sxm")
SERVER = ServerConfig(kv_blocks=1000, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=32768)
DEFAULT = StepTimeModel.load("default")

# Modules of DeepSeek-V3's attention with products in BF16 and a BF16 cache, as the wheel has them: heads, requests, context,
# microseconds. FlashAttention on H100, vLLM 0.24.0.
DECODED = [
    (16, 1, 1025, 100.0), (16, 64, 1025, 150.0), (16, 64, 4097, 224.0), (16, 128, 16385, 926.0), (16, 1024, 4097, 1842.0),
    (128, 1, 1025, 215.0), (128, 64, 1025, 278.0), (128, 64, 4097, 356.0), (128, 128, 16385, 1134.0),
    (128, 1024, 4097, 2648.0),
]  # fmt: skip
# The same of prompts: heads, prompts, tokens of each.
PREFILLED = [
    (16, 1, 1024, 236.0), (16, 8, 1024, 1344.0), (16, 1, 4096, 748.0), (16, 4, 8192, 6319.0),
    (128, 1, 1024, 848.0), (128, 8, 1024, 5905.0), (128, 1, 4096, 3532.0), (128, 4, 8192, 33569.0),
]  # fmt: skip


def served(model=V3, gpu=H100, ranks=1, **changes):
    return Deployment(model, gpu, ranks, replace(SERVER, **changes))


def module_us(heads: int, tokens: float) -> tuple[float, Deployment]:
    """Time of the products of an attention module, and a deployment whose ranks have so many heads."""
    deployment = served(ranks=V3.num_attention_heads // heads)
    wide, absorbed = latent_products(deployment)
    products = load_kernels(H100).of("gemm", "bf16")
    return sum(float(gemm_us(products, H100, tokens, *shape)) for shape in (*wide, *absorbed)), deployment


@pytest.mark.parametrize(("heads", "requests", "context", "measured_us"), DECODED)
def test_a_decoding_module_takes_what_the_table_says(heads, requests, context, measured_us) -> None:
    products_us, deployment = module_us(heads, requests)
    costs = attention_costs(deployment, load_kernels(H100))
    attention_us = costs.floor_us + requests * (costs.request_us + context * costs.token_us)
    small_us = SMALL_KERNELS_OF_A_MODULE * SMALL_KERNEL_US
    assert products_us + attention_us + small_us == pytest.approx(measured_us, rel=0.15)


@pytest.mark.parametrize(("heads", "prompts", "tokens", "measured_us"), PREFILLED)
def test_a_prefilling_module_takes_what_the_table_says(heads, prompts, tokens, measured_us) -> None:
    n = prompts * tokens
    products_us, deployment = module_us(heads, n)
    costs = attention_costs(deployment, load_kernels(H100))
    pairs = prompts * tokens * (tokens + 1) / 2
    attention_us = n * (costs.prefill_token_us + costs.prefill_kv_us) + pairs * costs.pair_us
    floor_us = load_kernels(H100).of("mla_prefill", "bf16").floor_us
    assert products_us + attention_us + floor_us == pytest.approx(measured_us, rel=0.15)


@settings(max_examples=30, deadline=None)
@given(
    decode=st.lists(st.integers(1, 8000), max_size=8),
    prompt=st.integers(0, 900),
    before=st.integers(0, 4000),
    precision=st.sampled_from(["auto", "fp8"]),
    ranks=st.sampled_from([1, 8]),
)
def test_components_add_up_to_the_compiled_step(decode, prompt, before, precision, ranks) -> None:
    deployment = replace(served(ranks=ranks), kv_cache_dtype=precision)
    chunk = np.array([prompt] if prompt else [], dtype=np.int32)
    batch = StepBatch(chunk, chunk + np.int32(before), np.array(decode, dtype=np.int32), 0)
    if batch.requests:
        step = predict_step(DEFAULT, deployment, batch)
        assert sum(step.components_us.values()) == pytest.approx(step.total_us)
        assert min(step.components_us.values()) >= -1e-6
        assert step.floor_us < step.total_us


def test_ranks_share_heads_and_not_latents() -> None:
    """With few heads a rank is bound by the latents, which all ranks read whole; with all of them by their FLOPs."""
    costs = {ranks: attention_costs(served(ranks=ranks), load_kernels(H100)) for ranks in (1, 8, 64)}
    a_byte = 1e6 / H100.hbm_bandwidth
    assert costs[64].token_us >= 576 * 2 * a_byte
    assert costs[1].token_us > costs[8].token_us >= costs[64].token_us
    assert costs[8].token_us == pytest.approx(costs[64].token_us, rel=0.1)
    assert costs[8].pair_us == pytest.approx(costs[1].pair_us / 8)


@pytest.mark.parametrize("name", ["llama-2-7b", "deepseek-v3"])
def test_a_cache_in_fp8_is_read_in_less_time(name) -> None:
    model = V3 if name == V3.name else load_architecture(name)
    wide, narrow = (replace(served(model, ranks=8), kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    assert [kernel[1] for kernel in attention_kernels(narrow, load_kernels(H100))] == ["fp8", "fp8"]
    short, long = ([DEFAULT.predict_us(d, decode_kv_lens=[n] * 64) for d in (wide, narrow)] for n in (4000, 8000))
    assert 0.4 * (long[0] - short[0]) < long[1] - short[1] < 0.8 * (long[0] - short[0])
    assert any("FP8 KV cache" in note for note in kernel_notes(narrow))
    assert not any("FP8 KV cache" in note for note in kernel_notes(wide))


def test_what_was_not_measured_is_said() -> None:
    assert any("not validated end to end" in note for note in kernel_notes(served()))
    on_a100 = kernel_notes(served(gpu=load_accelerator("a100-80gb")))
    assert any("`mla_decode`" in note and "not measured" in note and "expect errors" in note for note in on_a100)


@pytest.mark.parametrize("name", ["default-2026-11-24", "global9"])
def test_models_that_know_heads_alone_refuse_latents(name) -> None:
    with pytest.raises(NotModelledError, match=r"latent attention.*`default`"):
        StepTimeModel.load(name).predict_us(served(), decode_kv_lens=[100])


def test_experts_in_mxfp4_take_their_own_kernel() -> None:
    model = ModelArchitecture.from_config(PUBLIC["openai/gpt-oss-20b"])
    wide = replace(model, weight_dtype="bfloat16", weight_widths=None)
    own, other = (
        predict_step(DEFAULT, served(m, vllm_version="0.33.0"), step_batch(0, 500, 16)) for m in (model, wide)
    )
    assert own.components_us["products"] < 0.5 * other.components_us["products"]
    assert not any("mxfp4" in note for note in kernel_notes(served(model, vllm_version="0.33.0")))


def test_heads_and_windows_that_miss_their_tables_are_named() -> None:
    notes = kernel_notes(served(ModelArchitecture.from_config(PUBLIC["openai/gpt-oss-20b"])))
    assert any("`decode_attention` of heads of 64 elements over a window of 128" in note for note in notes)
    assert not any("elements over" in note for note in kernel_notes(served(load_architecture("llama-2-7b"))))


# Prefill of one layer with heads of 64 elements on H100, as the wheel has it: heads, KV heads, prompts, tokens, window, us.
NARROW_PREFILLS = [
    (64, 8, 1, 1024, 0, 44.4), (64, 8, 1, 4096, 0, 327.3), (64, 8, 4, 4096, 0, 1292.8), (64, 8, 1, 16384, 0, 4263.1),
    (64, 8, 1, 1024, 128, 30.4), (64, 8, 1, 4096, 128, 105.2), (64, 8, 4, 4096, 128, 380.0), (64, 8, 1, 16384, 128, 386.8),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "prompts", "tokens", "window", "measured_us"), NARROW_PREFILLS)
def test_prefill_of_narrow_heads_takes_what_the_table_says(
    heads, kv_heads, prompts, tokens, window, measured_us
) -> None:
    model = replace(load_architecture("llama-2-7b"), num_attention_heads=heads, num_kv_heads=kv_heads, head_dim=64)
    kernels = load_kernels(H100)
    (_, _), (kernel, precision) = attention_kernels(served(model), kernels)
    assert kernel == "prefill_attention_64"
    costs, within = attention_costs(served(model), kernels), min(tokens, window or tokens)
    pairs = prompts * (within * (within + 1) / 2 + (tokens - within) * within)
    predicted_us = kernels.of(kernel, precision).floor_us
    predicted_us += prompts * tokens * costs.prefill_token_us + pairs * costs.pair_us
    assert predicted_us == pytest.approx(measured_us, rel=0.25)


def test_a_gpu_without_tables_of_a_width_takes_its_own_of_the_usual_one() -> None:
    model, gpu = replace(load_architecture("llama-2-7b"), head_dim=64), load_accelerator("a100-80gb")
    assert attention_kernels(served(model, gpu), load_kernels(gpu))[1] == ("prefill_attention", "bf16")
