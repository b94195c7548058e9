"""The kernel model against a slow one that goes through the kernels of a step one by one, and laws that any step obeys."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.errors import InputError
from stepcal.kernels import load_kernels
from stepcal.simulator import ServerConfig, StepBatch
from stepcal.specs.architecture import ModelArchitecture, load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.sampling import Sampling
from stepcal.step_time.coefficients import load_coefficients
from stepcal.step_time.kernel_model import (
    compile_kernels,
    kernel_components_us,
    kernel_notes,
    touched_experts,
)
from stepcal.step_time.kernel_parameters import KERNEL_PARAMETERS, KV_BLOCK_NS

VALUES = load_coefficients("default").values
SERVER = ServerConfig(kv_blocks=5_000, max_num_seqs=64, max_num_batched_tokens=1_024)
SORTS = Sampling(top_p=0.9)


def deployed(model="llama-2-70b", gpu="h100-sxm", tp=4, sampling=SORTS) -> Deployment:
    return Deployment(load_architecture(model), load_accelerator(gpu), tp, SERVER, sampling)


def batch(decode=(), prefill=(), context=None) -> StepBatch:
    chunks = np.array(prefill, dtype=np.int32)
    return StepBatch(
        prefill_chunk_tokens=chunks,
        prefill_kv_lens=chunks if context is None else np.array(context, dtype=np.int32),
        decode_kv_lens=np.array(decode, dtype=np.int32),
        waiting=0,
    )


def smooth(memory, compute, p):
    return (memory**p + compute**p) ** (1 / p) if memory or compute else 0.0


def slow_step_us(values, d: Deployment, b: StepBatch) -> float:
    """One step's GPU time, kernel by kernel and layer by layer, in plain arithmetic."""
    a, g, tp, kernels = d.architecture, d.accelerator, d.tensor_parallel, load_kernels(d.accelerator)
    n_tokens = b.prefill_tokens + b.decode_tokens
    n_requests = b.prefill_chunk_tokens.size + b.decode_kv_lens.size
    rows = next((s for s in captured(2 * d.limits.max_num_seqs) if s >= n_tokens), n_tokens)

    def product(m, n, k):
        c = kernels.of("gemm", "bf16")
        memory = (2 * n * k + 2 * m * k + 2 * m * n) / g.hbm_bandwidth * 1e6 / c.bandwidth_share
        return c.floor_us + smooth(memory, 2 * m * n * k / g.bf16_dense_flops * 1e6 / c.compute_share, c.sharpness)

    def reduce(n_bytes):
        return float(kernels.all_reduce(tp).time_us(n_bytes))

    kv_heads, heads, hd, h = max(a.num_kv_heads / tp, 1), a.num_attention_heads / tp, a.head_dim, a.hidden_size
    dec, pre, small = (kernels.of(k, "bf16") for k in ("decode_attention", "prefill_attention", "elementwise"))
    context = [int(k) for k in (*b.decode_kv_lens, *b.prefill_kv_lens)]
    hopper = values["attention_scale"] if g.name.startswith(("h100", "h200")) else 1.0
    total = 0.0
    for _ in range(a.num_layers):
        products = product(rows, (heads + 2 * kv_heads) * hd, h) + product(rows, h, heads * hd)
        if a.num_experts == 1:
            products += product(rows, 2 * a.intermediate_size / tp, h) + product(rows, h, a.intermediate_size / tp)
            inner = a.intermediate_size
        else:
            c, weights = kernels.of("experts", "bf16"), 3 * h * a.expert_intermediate_size / tp
            touched = expected_experts(rows, a.num_experts, a.experts_per_token)
            memory = touched * weights * 2 / g.hbm_bandwidth * 1e6 / c.bandwidth_share
            compute = 2 * rows * a.experts_per_token * weights / g.bf16_dense_flops * 1e6 / c.compute_share
            products += c.floor_us + c.unit_us * touched + smooth(memory, compute, c.sharpness)
            products += product(rows, a.num_experts, h)
            inner = a.experts_per_token * a.expert_intermediate_size
        attention = dec.floor_us + dec.unit_us * len(b.decode_kv_lens) * kv_heads
        for k in context:
            attention += k * 4 * kv_heads * hd / g.hbm_bandwidth * 1e6 / dec.bandwidth_share
        for c, k in zip(b.prefill_chunk_tokens, b.prefill_kv_lens, strict=True):
            pairs = sum(range(int(k) - int(c) + 1, int(k) + 1))
            attention += pairs * 4 * heads * hd / g.bf16_dense_flops * 1e6 / pre.compute_share
            attention += int(c) * 4 * (heads + kv_heads) * hd / g.hbm_bandwidth * 1e6 / pre.bandwidth_share
        moved = n_tokens * (8 * h + 3 * inner / tp) * 2 / g.hbm_bandwidth * 1e6 / small.bandwidth_share
        total += values["products_scale"] * products + hopper * attention + values["layer_us"] + max(moved - 15.0, 0.0)
        total += sum(context) * KV_BLOCK_NS / 1e3 / d.block_size
        total += values["mixed_layer_us"] * (b.prefill_chunk_tokens.size > 0)
        total += 2 * reduce(rows * h * 2) if tp > 1 else 0.0
    logits = n_requests * a.vocab_size
    total += values["products_scale"] * product(n_requests, a.vocab_size / tp, h)
    total += logits * 40 / g.hbm_bandwidth * 1e6
    if tp > 1:
        total += reduce(rows * h * 2) + 0.5 * reduce(logits * 2)
    if d.sampling.restricts_tokens:
        factor = 1.8 if g.name == "a100-80gb" else 1.0
        total += factor * (a.vocab_size * 1e-3 + n_requests * 5.0 + logits * 0.15e-3)
    return total


def captured(largest):
    return (
        [1, 2, 4, *range(8, 256, 8), *range(256, min(largest, 512) + 1, 16)]
        if largest >= 256
        else [s for s in (1, 2, 4, *range(8, 256, 8)) if s <= largest]
    )


def expected_experts(tokens, n, k):
    """Experts that are touched, by bisection on the scale of the inclusion probabilities."""
    weights = [(i + 1) ** -0.8 for i in range(n)]
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if sum(1 - math.exp(-middle * w / sum(weights)) for w in weights) < k:
            low = middle
        else:
            high = middle
    return sum(1 - math.exp(-high * w / sum(weights)) ** tokens for w in weights)


BATCHES = {
    "one": batch(decode=[700]),
    "many": batch(decode=range(100, 160)),
    "prompt": batch(prefill=[300]),
    "mixed": batch(decode=[50, 900, 17], prefill=[31, 200], context=[547, 200]),
    "beyond the graphs": batch(decode=[10] * 20, prefill=[500, 400], context=[500, 900]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    "d",
    [
        deployed(),
        deployed("llama-2-7b", tp=1),
        deployed("mixtral-8x7b", tp=2, sampling=Sampling()),
        deployed("llama-2-7b", "a100-80gb", 1),
        deployed("codellama-34b", "l40s", 2),
    ],
    ids=["70b", "7b", "mixture", "a100", "l40s"],
)
def test_compiled_and_components_agree_with_the_slow_model(d, name):
    b = BATCHES[name]
    expected = slow_step_us(VALUES, d, b)
    assert sum(kernel_components_us(VALUES, d, b).values()) == pytest.approx(expected, rel=1e-9)
    compiled = compile_kernels(VALUES, d)
    gpu = {k: v for k, v in compiled(b).items() if k != "host and floor"}
    assert sum(gpu.values()) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    decode=st.lists(st.integers(1, 4_000), min_size=1, max_size=40),
    prefill=st.lists(st.integers(1, 200), max_size=3),
    longer=st.integers(1, 2_000),
)
def test_more_work_takes_no_less_time(decode, prefill, longer):
    d = deployed()
    compiled = compile_kernels(VALUES, d)
    one = sum(compiled(batch(decode=decode, prefill=prefill)).values())
    assert sum(compiled(batch(decode=[*decode, 5], prefill=prefill)).values()) >= one
    assert sum(compiled(batch(decode=[k + longer for k in decode], prefill=prefill)).values()) > one


def test_no_step_is_shorter_than_its_bytes():
    d = deployed("llama-2-7b", tp=1, sampling=Sampling())
    b = batch(decode=[1_000] * 10)
    a = d.architecture
    moved = 2 * (a.num_parameters() - a.vocab_size * a.hidden_size) + 10 * 1_000 * 2 * 2 * a.kv_width * a.num_layers
    assert sum(kernel_components_us(VALUES, d, b).values()) > moved / d.accelerator.hbm_bandwidth * 1e6


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 64), st.data())
def test_touched_experts_lie_between_those_of_a_token_and_all(n, data):
    k = data.draw(st.integers(1, n))
    tokens = np.array([1, 2, 8, 1_000_000])
    for skew in (0.0, 0.8):
        touched = touched_experts(tokens, n, k, skew)
        assert touched[0] == pytest.approx(k, rel=1e-6)
        assert (np.diff(touched) >= -1e-9).all()
        assert touched[-1] == pytest.approx(n, rel=1e-3)
    assert touched_experts(8, n, k, 0.8)[0] <= touched_experts(8, n, k, 0.0)[0] + 1e-9


def test_the_sampler_shows_with_the_vocabulary_and_only_where_tokens_are_cut_off():
    d = deployed("llama-2-7b", tp=1)
    large = replace(d, architecture=replace(d.architecture, vocab_size=128_256, other_parameters=0))
    b = batch(decode=[500] * 40)
    cost = kernel_components_us(VALUES, large, b)["sampler"]
    assert cost > 2.5 * kernel_components_us(VALUES, d, b)["sampler"]
    plain = kernel_components_us(VALUES, replace(large, sampling=Sampling()), b)["sampler"]
    assert plain < 0.2 * cost
    greedy = replace(large, sampling=Sampling(top_p=0.5, temperature=0.0))
    assert kernel_components_us(VALUES, greedy, b)["sampler"] == plain
    penalised = replace(large, sampling=Sampling(repetition_penalty=1.05))
    assert plain < kernel_components_us(VALUES, penalised, b)["sampler"] < cost


def test_fp8_weights_are_read_faster_than_16_bits():
    path = "data/transfer/architectures/llama-4-scout-17b-16e-instruct-fp8-dynamic.json"
    narrow = ModelArchitecture.from_config(path, max_model_len=4_096)
    wide = replace(narrow, weight_dtype="bfloat16", weight_widths=None)
    b = batch(decode=[600] * 30)
    times = [
        kernel_components_us(VALUES, Deployment(a, load_accelerator("h100-sxm"), 2, SERVER), b)["products"]
        for a in (narrow, wide)
    ]
    assert 0.5 * times[1] < times[0] < 0.75 * times[1]


def test_measured_gpus_need_no_note_and_others_get_one():
    assert kernel_notes(deployed()) == []
    notes = kernel_notes(deployed("llama-2-7b", "h100-nvl", 1))
    assert len(notes) == 3
    assert all("not measured: medians of other GPUs" in note and "expect errors of" in note for note in notes)


def test_a_missing_parameter_is_named():
    with pytest.raises(InputError, match="`layer_us` is missing"):
        compile_kernels({k: v for k, v in VALUES.items() if k != "layer_us"}, deployed())


def test_every_parameter_says_where_its_prior_comes_from():
    assert all(p.source.startswith("prior") and p.low < p.start < p.high for p in KERNEL_PARAMETERS)
