"""Step times of models in which some layers read a window: compiled, by component, and by a reference layer by layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcal.servers.predict import predict_step, step_batch
from stepcal.simulator import StepBatch
from stepcal.simulator.config import ServerConfig
from stepcal.simulator.steptime import add_components
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.attention_kinds import tokens_read
from stepcal.step_time.coefficients import StepTimeModel

GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 6,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 20000,
    "num_local_experts": 32,
    "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}
LLAMA4 = {
    "model_type": "llama4_text",
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 20000,
    "attention_chunk_size": 96,
    "max_position_embeddings": 131072,
}
SERVER = ServerConfig(
    kv_blocks=100, max_num_seqs=16, max_num_batched_tokens=1024, max_model_len=8192, vllm_version="0.33.0"
)
MODELS = {name: StepTimeModel.load(name) for name in ("default", "default-2026-11-24")}
contexts = st.lists(st.integers(1, 3000), max_size=6)


def served(config, **changes):
    return Deployment(
        ModelArchitecture.from_config(config), load_accelerator("h100-sxm"), server=replace(SERVER, **changes)
    )


def read_by(layer_has_window, kind, window, first, last):
    """Tokens that a layer reads for the tokens first..last of a request, and its pairs, position by position."""
    reads = []
    for position in range(first, last + 1):
        start = 0
        if layer_has_window:
            start = max(0, position - window) if kind == "sliding" else (position - 1) // window * window
        reads.append(range(start, position))
    return len(set().union(*map(set, reads))), sum(map(len, reads))


@pytest.mark.parametrize("config", [GPT_OSS, LLAMA4], ids=["sliding", "chunked"])
@settings(max_examples=25, deadline=None)
@given(decode=contexts, prompt=st.integers(0, 700), before=st.integers(0, 900))
def test_the_mean_layer_reads_what_its_layers_read(config, decode, prompt, before):
    deployment = served(config)
    windows = deployment.windows
    chunk = np.array([prompt] if prompt else [], dtype=np.int32)
    batch = StepBatch(chunk, chunk + np.int32(before), np.array(decode, dtype=np.int32), 0)
    kv = prefill_kv = pairs = 0
    for has_window in [True] * windows.n_windowed + [False] * windows.n_full:
        kv += sum(read_by(has_window, windows.kind, windows.window, c, c)[0] for c in decode)
        if prompt:
            one = read_by(has_window, windows.kind, windows.window, before + 1, before + prompt)
            prefill_kv, pairs = prefill_kv + one[0], pairs + one[1]
    found, layers = tokens_read(batch, deployment), windows.n_windowed + windows.n_full
    assert found.decode_kv == pytest.approx(kv / layers)
    assert found.prefill_pairs == pytest.approx(pairs / layers)
    if windows.kind == "sliding":
        assert found.prefill_kv == pytest.approx(prefill_kv / layers)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(decode=contexts, prompt=st.integers(0, 700))
def test_components_add_up_to_the_compiled_step(name, decode, prompt):
    deployment = served(GPT_OSS)
    chunk = np.array([prompt] if prompt else [], dtype=np.int32)
    batch = StepBatch(chunk, chunk, np.array(decode, dtype=np.int32), 0)
    if not batch.requests:
        return
    step = predict_step(MODELS[name], deployment, batch)
    assert sum(step.components_us.values()) == pytest.approx(step.total_us)
    assert step.total_us == pytest.approx(
        MODELS[name].predict_us(deployment, decode_kv_lens=decode, prefill_chunk_tokens=chunk.tolist())
    )


@pytest.mark.parametrize("name", MODELS)
def test_layers_with_a_window_do_not_grow_with_the_context_beyond_it(name):
    """Twice the context adds what the layers without a window read, and no more."""
    deployment = served(GPT_OSS)
    everywhere = replace(deployment, architecture=replace(deployment.architecture, windows=None), server=SERVER)
    at = {n: MODELS[name].predict_us(deployment, decode_kv_lens=[n] * 8) for n in (2000, 4000)}
    full = {n: MODELS[name].predict_us(everywhere, decode_kv_lens=[n] * 8) for n in (2000, 4000)}
    assert at[4000] - at[2000] == pytest.approx((full[4000] - full[2000]) / 2)
    assert at[4000] < full[4000]
    short = {one: MODELS[name].predict_us(one, decode_kv_lens=[100] * 8) for one in (deployment, everywhere)}
    assert short[deployment] == pytest.approx(short[everywhere])


def test_without_a_server_a_step_reads_the_window_too():
    deployment = served(GPT_OSS)
    alone = Deployment(deployment.architecture, deployment.accelerator)
    model = MODELS["default"]
    assert model.predict_us(alone, decode_kv_lens=[5000]) == pytest.approx(
        model.predict_us(replace(deployment, server=replace(SERVER, max_num_seqs=128)), decode_kv_lens=[5000])
    )


def test_an_affine_file_reads_the_window_unless_it_speaks_of_windows():
    deployment, batch = served(GPT_OSS), step_batch(0, 1128, 1)
    plain = StepTimeModel("affine", {"kv_us": 1.0}, "file")
    own = StepTimeModel("affine", {"kv_us": 1.0, "window_kv_us": 2.0}, "file")
    assert predict_step(plain, deployment, batch).total_us == pytest.approx((1128 + 128) / 2)
    assert predict_step(own, deployment, batch).total_us == pytest.approx(1128 + 2 * 128)
    assert add_components(plain.compile(deployment)(batch)) == pytest.approx(1128 / 2)  # a batch without its window
