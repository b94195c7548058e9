import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.decomposition import components_us

from stepcal.datasets import published_h1_per_experiment
from stepcal.errors import InputError
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.step_time.decomposition import (
    STUDY_COMPONENTS,
    decompose,
    intensities,
    phase,
    ridge_intensity,
    study_components_us,
    study_intensities,
)

MODELS = ("llama-2-7b", "llama-2-70b", "codellama-34b", "mixtral-8x7b")
PUBLISHED_R = {
    ("20260217-202857-llama-2-70b-tp4-general", "total"): 0.5954076480261503,
    ("20260217-203421-llama-2-70b-hf-tp4-codegen", "total"): 0.36001597641675215,
    ("20260218-150304-codellama-34b-tp2-general", "total"): 0.6435782737020876,
    ("20260217-202857-llama-2-70b-tp4-general", "decode_gemm"): 0.8495289977397491,
    ("20260217-203421-llama-2-70b-hf-tp4-codegen", "decode_gemm"): 0.7880543854458884,
    ("20260218-150304-codellama-34b-tp2-general", "decode_gemm"): 0.7280721256594813,
}
tokens = st.integers(0, 16384)
models = st.sampled_from(MODELS)
degrees = st.sampled_from([1, 2, 4, 8])


@given(st.lists(st.tuples(tokens, tokens, models, degrees), min_size=1, max_size=12))
def test_mixed_tables_equal_the_scalar_reference(make_steps, h100, rows):
    prefill, decode, names, tps = map(list, zip(*rows, strict=True))
    steps = make_steps(prefill, decode, model=names, tensor_parallel=tps)
    expected = [components_us(p, d, load_architecture(name), h100.bf16_dense_flops, tp) for p, d, name, tp in rows]
    result = decompose(steps, h100)
    np.testing.assert_allclose(result.to_numpy(), expected, rtol=1e-12, atol=0)
    assert list(result.columns) == [f"{c}_us" for c in STUDY_COMPONENTS]


def test_rows_keep_their_index_and_their_order(make_steps, h100):
    steps = make_steps([0, 5, 0, 7], [1, 2, 3, 4], model=["llama-2-7b", "mixtral-8x7b"] * 2)
    shuffled = steps.set_axis([9, 3, 7, 1]).sort_index()
    pd.testing.assert_frame_equal(decompose(shuffled, h100), decompose(steps, h100).set_axis([9, 3, 7, 1]).sort_index())


@given(tokens, tokens, models, degrees)
def test_gemm_is_linear_in_tokens_and_everything_in_the_inverse_degree(h100, prefill, decode, name, tp):
    architecture = load_architecture(name)
    whole = study_components_us([prefill, 3 * prefill], [decode, 3 * decode], Deployment(architecture, h100))
    shared = study_components_us([prefill, 3 * prefill], [decode, 3 * decode], Deployment(architecture, h100, tp))
    np.testing.assert_allclose(shared * tp, whole, rtol=1e-12)
    np.testing.assert_allclose(whole[1, [0, 2]], 3 * whole[0, [0, 2]], rtol=1e-12)


def test_prefill_attention_is_quadratic_beyond_two_tokens(h100):
    attention = study_components_us([0, 1, 2, 4, 8], [0] * 5, Deployment(load_architecture("llama-2-7b"), h100))[:, 1]
    assert attention[0] == 0
    np.testing.assert_allclose(attention[2:] / attention[1], [2, 8, 32])


def test_decode_attention_is_zero_and_so_is_an_empty_step(h100):
    components = study_components_us([0, 100], [0, 500], Deployment(load_architecture("llama-2-70b"), h100))
    assert not components[0].any()
    assert components[1, 3] == 0


def test_the_published_mixture_fault_is_kept(h100):
    """Mixtral visits two experts and is charged a quarter of one."""
    mixtral = load_architecture("mixtral-8x7b")
    charged_us = study_components_us([0], [1], Deployment(mixtral, h100))[0, 2]
    attention_flops = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096)
    charged_mlp_flops = charged_us / 1e6 * h100.bf16_dense_flops / 32 - attention_flops
    one_expert_flops = 6 * 4096 * 14336
    assert charged_mlp_flops == pytest.approx(0.25 * one_expert_flops, rel=1e-9)


@pytest.mark.parametrize("prefill", [[-1], [float("nan")]])
def test_impossible_token_counts_are_refused(h100, prefill):
    with pytest.raises(InputError, match=r"`prefill_tokens\[0\]` is"):
        study_components_us(prefill, [1], Deployment(load_architecture("llama-2-7b"), h100))
    with pytest.raises(InputError, match=r"`decode_tokens\[1\]` is"):
        study_components_us([1, 1], [1, *prefill], Deployment(load_architecture("llama-2-7b"), h100))


def test_columns_of_unequal_length_are_refused(h100):
    with pytest.raises(InputError, match="`prefill_tokens` has 2 steps and `decode_tokens` 3"):
        study_components_us([1, 2], [1, 2, 3], Deployment(load_architecture("llama-2-7b"), h100))


def test_an_unknown_model_and_a_degree_that_does_not_fit_are_refused(make_steps, h100):
    with pytest.raises(InputError, match="Unknown model `llama-9`"):
        decompose(make_steps([0], [1], model="llama-9"), h100)
    with pytest.raises(InputError, match=r"`tensor_parallel=3`.*`llama-2-7b`"):
        decompose(make_steps([0], [1], tensor_parallel=3), h100)


def test_every_combination_of_tokens_has_its_phase(make_steps):
    names = phase(make_steps([0, 3, 0, 3], [0, 0, 4, 4]))
    assert names.tolist() == ["empty", "pure_prefill", "pure_decode", "mixed"]
    assert names.name == "phase"


def test_intensities_follow_the_roofline(h100):
    architecture = load_architecture("llama-2-70b")
    result = study_intensities([0, 256], [64, 0], architecture)
    assert result[0].tolist() == [0, 0, 64, 8]  # two bytes a weight; eight queries share a KV head
    attention_flops = 4 * 64 * 128 * 256 * 128
    attention_bytes = 2 * 256 * 2 * (64 * 128 + 8 * 128)
    assert result[1].tolist() == pytest.approx([256, attention_flops / attention_bytes, 0, 0])
    assert ridge_intensity(h100) == pytest.approx(989.5e12 / 3.35e12)


def test_intensities_of_a_mixed_table_are_those_of_each_model(make_steps):
    steps = make_steps([1, 2, 3], [4, 5, 6], model=["llama-2-7b", "llama-2-70b", "llama-2-7b"])
    for row, name in enumerate(steps["model"]):
        alone = study_intensities([row + 1], [row + 4], load_architecture(name))
        np.testing.assert_array_equal(intensities(steps)[row], alone[0])


@pytest.mark.parametrize("key", PUBLISHED_R, ids="-".join)
def test_published_correlations_are_reproduced_on_the_real_traces(traces, h100, key):
    experiment, component = key
    steps = traces[traces["experiment_id"] == experiment]
    components = decompose(steps, h100)
    series = components.sum(axis=1) if component == "total" else components[f"{component}_us"]
    assert np.corrcoef(series, steps["duration_us"])[0, 1] == pytest.approx(PUBLISHED_R[key], abs=1e-5)


def test_the_shipped_table_agrees_with_every_component_of_the_real_traces(traces, h100):
    published = published_h1_per_experiment().set_index(["experiment_id", "component"])
    compared = 0
    for experiment, steps in traces.groupby("experiment_id"):
        components = decompose(steps, h100)
        ours = {c: components[f"{c}_us"] for c in STUDY_COMPONENTS} | {"total": components.sum(axis=1)}
        for component, series in ours.items():
            if (experiment, component) not in published.index or series.nunique() < 2:
                continue
            row = published.loc[(experiment, component)]
            assert np.corrcoef(series, steps["duration_us"])[0, 1] == pytest.approx(row["pearson_r"], abs=1e-5)
            assert len(steps) == row["n_steps"]
            compared += 1
    assert compared >= 12
