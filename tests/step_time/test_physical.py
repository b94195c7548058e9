"""Physics holds for any transformer, and the gradient is the derivative."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.errors import InputError
from stepcal.simulator import ServerConfig, StepBatch
from stepcal.specs.architecture import ModelArchitecture, load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.kv_cache import kv_bytes_per_token
from stepcal.specs.step_work import all_reduce_bytes, floor_us, gemm_flops, weight_bytes
from stepcal.step_time.physical import (
    PhysicalModel,
    batch_features,
    compile_physical,
    physical_features,
)
from stepcal.step_time.physical_parameters import API_PARAMETERS, STEP_PARAMETERS, checked, priors

H100 = load_accelerator("h100-sxm")
VALUES = priors(STEP_PARAMETERS)
MODEL = PhysicalModel()


@st.composite
def architectures(draw):
    head_dim = draw(st.sampled_from([64, 128]))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 4, 8]))
    experts = draw(st.sampled_from([1, 8, 64]))
    layers = draw(st.integers(2, 80))
    width = draw(st.integers(8, 64)) * 128
    return ModelArchitecture(
        name="random",
        hidden_size=draw(st.integers(8, 64)) * 128,
        num_layers=layers,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=width,
        vocab_size=32_000,
        num_experts=experts,
        experts_per_token=1 if experts == 1 else draw(st.integers(1, 4)),
        expert_intermediate_size=width,
        num_moe_layers=0 if experts == 1 else draw(st.integers(1, layers)),
    )


values_ = st.fixed_dictionaries({p.name: st.floats(p.low, p.high) for p in STEP_PARAMETERS})
SERVER = ServerConfig(kv_blocks=9000)


def features(architecture, tp=1, offload_blocks=0, **counts):
    counts = {"decode_requests": 16, "kv_tokens": 16_000, **counts}
    server = replace(SERVER, offload_blocks=offload_blocks)
    return physical_features(Deployment(architecture, H100, tp, server), **counts)


def step_us(architecture, values=VALUES, tp=1, **counts):
    return float(MODEL.predict_us(values, features(architecture, tp, **counts))[0])


@given(architectures(), values_, st.integers(1, 512), st.integers(0, 10**6), st.integers(0, 2048), st.data())
@settings(max_examples=60, deadline=None)
def test_no_step_is_shorter_than_its_bytes_take(architecture, values, batch, kv, prefill, data):
    tp = data.draw(st.sampled_from(architecture.tensor_parallel_degrees()))
    took = step_us(architecture, values, tp, decode_requests=batch, kv_tokens=kv, prefill_tokens=prefill)
    assert took >= floor_us(batch + prefill, kv, Deployment(architecture, H100, tp))[0] * (1 - 1e-12)


@given(architectures(), values_, st.integers(1, 200), st.integers(0, 10**5), st.integers(0, 500), st.data())
@settings(max_examples=60, deadline=None)
def test_it_grows_with_batch_context_prefill_and_rejections(architecture, values, batch, kv, more, data):
    tp = data.draw(st.sampled_from(architecture.tensor_parallel_degrees()))
    base = step_us(architecture, values, tp, decode_requests=batch, kv_tokens=kv)
    for change in (
        {"decode_requests": batch + more},
        {"kv_tokens": kv + more},
        {"prefill_tokens": more, "prefill_requests": min(more, 1), "prefill_pairs": more},
        {"rejected": min(more, batch), "offload_blocks": 4096},
    ):
        assert step_us(architecture, values, tp, **{"decode_requests": batch, "kv_tokens": kv, **change}) >= base


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_it_grows_with_the_model(field):
    small = load_architecture("llama-2-7b")
    assert step_us(replace(small, **{field: 2 * getattr(small, field)})) > step_us(small)


@given(architectures(), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_weights_and_flops_of_a_rank_fall_with_tensor_parallelism(architecture, tokens):
    degrees = architecture.tensor_parallel_degrees()
    for function in (weight_bytes, gemm_flops):
        of_rank = [function(tokens, Deployment(architecture, H100, tp))[0] for tp in degrees]
        assert all(a > b for a, b in pairwise(of_rank))


def test_collectives_and_replicated_heads_are_charged():
    llama = load_architecture("llama-2-70b")
    one_stage, two_stages = all_reduce_bytes(8, Deployment(llama, H100, 4))
    message = 2 * 80 * 8 * 8192 * 2
    assert (one_stage[0], two_stages[0]) == (3 * message, 2 * 3 / 4 * message)
    assert all_reduce_bytes(8, Deployment(llama, H100))[0][0] == 0
    # Eight KV heads: sixteen ranks hold one each, as eight do.
    assert kv_bytes_per_token(llama, tensor_parallel=16) == kv_bytes_per_token(llama, tensor_parallel=8)
    assert kv_bytes_per_token(llama, tensor_parallel=8) == kv_bytes_per_token(llama) / 8
    alone, shared = (MODEL.components_us(VALUES, features(llama, tp))["collectives"][0] for tp in (1, 4))
    assert alone == 0 < shared


def test_large_messages_take_two_stages_and_small_ones_one():
    llama = load_architecture("llama-2-70b")
    rows = features(llama, 4, decode_requests=[1, 2000], kv_tokens=0.0)
    stages = MODEL.gradient_us(VALUES, rows)["collective_us"] / rows.all_reduces
    assert stages.tolist() == [1.0, 2.0]
    two_ranks = features(llama, 2, decode_requests=[1, 2000], kv_tokens=0.0)
    assert (MODEL.gradient_us(VALUES, two_ranks)["collective_us"] == two_ranks.all_reduces).all()


def test_the_host_counts_only_where_it_is_slower_than_the_gpu():
    llama = load_architecture("llama-2-7b")
    rows = features(llama, decode_requests=100, kv_tokens=1e5, rejected=[0, 10, 90], offload_blocks=4096)
    gpu, host, step = MODEL.gpu_us(VALUES, rows), MODEL.host_us(VALUES, rows), MODEL.predict_us(VALUES, rows)
    assert host[1] < gpu[1] and host[2] > gpu[2]
    assert step[0] == step[1] == gpu[0] and step[2] == host[2]
    assert (MODEL.gradient_us(VALUES, rows)["offload_scan_us"] > 0).tolist() == [False, False, True]


def test_a_mixture_reads_the_experts_its_tokens_visit():
    mixtral = load_architecture("mixtral-8x7b")
    one, many = weight_bytes([1, 4096], Deployment(mixtral, H100))
    expert = 32 * 3 * 4096 * 14336 * 2
    assert many == pytest.approx(mixtral.num_parameters() * 2 - 32_000 * 4096 * 2, rel=1e-3)
    assert many - one == pytest.approx(6 * expert, rel=1e-9)


def test_a_dense_model_reads_its_parameters_but_the_embedding():
    llama = load_architecture("llama-2-7b")
    assert weight_bytes(1, Deployment(llama, H100))[0] == pytest.approx(
        (llama.num_parameters() - 32_000 * 4096) * 2, rel=1e-3
    )
    assert weight_bytes(0, Deployment(llama, H100))[0] == 0


@given(architectures(), values_)
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_the_derivative(architecture, values):
    rows = features(
        architecture,
        decode_requests=[4, 60, 100],
        kv_tokens=[900, 40_000, 200_000],
        prefill_tokens=[0, 700, 0],
        rejected=[0, 0, 95],
        offload_blocks=8192,
    )
    gradient = MODEL.gradient_us(values, rows)
    assert set(gradient) == set(values)
    for name, value in values.items():
        step = 1e-5 * value
        up, down = values | {name: value + step}, values | {name: value - step}
        slope = (MODEL.predict_us(up, rows) - MODEL.predict_us(down, rows)) / (2 * step)
        kink = np.abs(rows.weights_us * values["hbm_read_factor"] / rows.gemm_us - 1) < 1e-3
        kink |= np.abs(MODEL.host_us(values, rows) / MODEL.gpu_us(values, rows) - 1) < 1e-3
        assert np.allclose(gradient[name][~kink], slope[~kink], rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=60), st.integers(0, 300), st.integers(0, 2), st.data())
@settings(max_examples=40, deadline=None)
def test_the_compiled_step_time_is_the_model(contexts, waiting, n_prefill, data):
    architecture = load_architecture(data.draw(st.sampled_from(["llama-2-70b", "mixtral-8x7b"])))
    chunk = np.full(n_prefill, 120, dtype=np.int32)
    batch = StepBatch(chunk, chunk + 32, np.array(contexts, dtype=np.int32), waiting)
    deployment = Deployment(architecture, H100, 2, SERVER)
    step_time, rows = compile_physical(VALUES, deployment), batch_features(batch, deployment)
    # A batch's contexts count the step's own tokens, which are written rather than read: at most one token in a context.
    own = VALUES["hbm_read_factor"] * 1e6 / H100.hbm_bandwidth * kv_bytes_per_token(architecture, tensor_parallel=2)
    own += VALUES["kv_block_ns"] / 1e3 * architecture.num_layers / 16
    difference = sum(step_time(batch).values()) - MODEL.predict_us(VALUES, rows)[0]
    assert abs(difference) <= own * (batch.decode_tokens + batch.prefill_tokens) + 1e-6


def test_the_components_add_up():
    llama = load_architecture("llama-2-70b")
    rows = features(llama, 4, decode_requests=[3, 80], kv_tokens=[500, 60_000], prefill_tokens=[0, 64])
    total = sum(MODEL.components_us(VALUES, rows).values())
    assert np.allclose(total, MODEL.predict_us(VALUES, rows))


def test_at_most_nine_numbers_make_the_step_and_three_the_api():
    assert len(STEP_PARAMETERS) <= 9
    assert len(API_PARAMETERS) <= 3
    for p in (*STEP_PARAMETERS, *API_PARAMETERS):
        assert p.low < p.start < p.high
        assert p.prior_log_sd > 0
        assert p.source


def test_bad_numbers_are_refused():
    with pytest.raises(InputError, match="`kv_block_ns` is missing"):
        checked({"hbm_read_factor": 1.0})
    with pytest.raises(InputError, match=r"`layer_us` is -1\.0"):
        checked(VALUES | {"layer_us": -1.0})
    with pytest.raises(InputError, match="names no `server`"):
        compile_physical(VALUES, Deployment(load_architecture("llama-2-7b"), H100))
    with pytest.raises(InputError, match=r"`kv_tokens\[0\]` is -5"):
        features(load_architecture("llama-2-7b"), kv_tokens=-5)
    with pytest.raises(InputError, match="does not divide"):
        features(load_architecture("llama-2-7b"), tp=3)
