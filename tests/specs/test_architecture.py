import dataclasses
import json

import pytest

from stepcal.errors import InputError, NotModelledError
from stepcal.specs.architecture import ModelArchitecture, load_architecture, resolve_architecture

LLAMA_31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
QWEN_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_MOE = {
    "model_type": "deepseek",
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "vocab_size": 102400,
    "torch_dtype": "bfloat16",
}
LLAMA_4_SCOUT = {
    "model_type": "llama4",
    "architectures": ["Llama4ForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16},
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "vocab_size": 202048,
        "max_position_embeddings": 10485760,
    },
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("codellama-34b", 33_743_970_304),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_shipped_models_have_their_published_parameter_counts(name, count):
    assert load_architecture(name).num_parameters() == count


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(LLAMA_31_8B, 8_030_261_248, id="llama-3.1-8b"),
        pytest.param(QWEN_25_7B, 7_615_616_512, id="qwen2.5-7b, undeclared qkv biases"),
        pytest.param(DEEPSEEK_MOE, 16_375_728_128, id="deepseek-moe-16b"),
    ],
)
def test_configs_give_the_published_parameter_counts(config, count):
    assert ModelArchitecture.from_config(config).num_parameters() == count


def test_aliases_name_the_same_model():
    assert load_architecture("llama-2-70b-hf") == load_architecture("llama-2-70b")
    assert load_architecture("mistralai/Mixtral-8x7B-v0.1").name == "mixtral-8x7b"


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"Unknown model `gpt-9`.*llama-2-7b.*config\.json"):
        load_architecture("gpt-9")


def test_an_explicit_head_dim_wins_over_the_quotient():
    config = {**LLAMA_31_8B, "head_dim": 256}
    architecture = ModelArchitecture.from_config(config)
    assert architecture.head_dim == 256
    assert (architecture.query_width, architecture.kv_width) == (32 * 256, 8 * 256)
    wider = 4096 * 128 * (32 + 8 + 8 + 32)  # query, key, value and output projections, 128 more a head
    assert architecture.num_parameters() - 8_030_261_248 == 32 * wider


def test_without_kv_heads_every_attention_head_has_its_own():
    config = {key: value for key, value in LLAMA_31_8B.items() if key != "num_key_value_heads"}
    assert ModelArchitecture.from_config(config).num_kv_heads == 32


def test_tied_embeddings_are_counted_once():
    untied = ModelArchitecture.from_config(LLAMA_31_8B)
    tied = ModelArchitecture.from_config({**LLAMA_31_8B, "tie_word_embeddings": True})
    assert untied.num_parameters() - tied.num_parameters() == 128256 * 4096


def test_a_dense_model_visits_all_of_its_one_expert():
    architecture = load_architecture("llama-2-7b")
    assert not architecture.is_mixture
    assert architecture.active_expert_fraction == 1
    assert architecture.num_moe_layers == 0


def test_mixtral_visits_two_of_eight():
    architecture = load_architecture("mixtral-8x7b")
    assert architecture.is_mixture
    assert architecture.active_expert_fraction == 0.25
    assert architecture.num_moe_layers == 32


def test_llama_4_nests_its_text_model_and_has_a_shared_expert():
    scout = ModelArchitecture.from_config(LLAMA_4_SCOUT, name="scout", max_model_len=8192)
    assert (scout.hidden_size, scout.num_layers, scout.num_attention_heads) == (5120, 48, 40)
    assert (scout.num_experts, scout.experts_per_token, scout.num_moe_layers) == (16, 1, 48)
    assert (scout.expert_intermediate_size, scout.shared_expert_intermediate_size) == (8192, 8192)
    assert scout.intermediate_size == 16384
    attention = 5120 * (40 + 8 + 8) * 128 + 40 * 128 * 5120
    layer = attention + 2 * 5120 + 3 * 5120 * 8192 * (16 + 1) + 5120 * 16
    assert scout.num_parameters() == 48 * layer + 2 * 202048 * 5120 + 5120


def test_interleaved_mixtures_are_every_other_layer():
    text = {**LLAMA_4_SCOUT["text_config"], "interleave_moe_layer_step": 2, "num_local_experts": 128}
    maverick = ModelArchitecture.from_config({**LLAMA_4_SCOUT, "text_config": text}, max_model_len=8192)
    assert maverick.num_moe_layers == 24
    dense = {**LLAMA_4_SCOUT, "text_config": {**text, "moe_layers": []}}
    dense_layers = ModelArchitecture.from_config(dense, max_model_len=8192)
    per_mixture = 3 * 5120 * 8192 * (128 + 1) + 5120 * 128
    per_dense = 3 * 5120 * 16384
    assert maverick.num_parameters() - dense_layers.num_parameters() == 24 * (per_mixture - per_dense)


@pytest.mark.parametrize(
    ("changes", "sparse_layers"),
    [
        ({}, 24),
        ({"decoder_sparse_step": 2}, 12),
        ({"mlp_only_layers": [0, 5]}, 22),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [0, 1]}, 11),
    ],
)
def test_qwen_moe_says_which_layers_are_sparse(changes, sparse_layers):
    architecture = ModelArchitecture.from_config({**QWEN_MOE, **changes})
    assert architecture.num_moe_layers == sparse_layers
    assert architecture.expert_intermediate_size == 1408
    assert architecture.shared_expert_intermediate_size == 5632
    assert architecture.intermediate_size == 5632
    assert architecture.attention_bias


def test_deepseek_moe_starts_dense_and_shares_two_experts():
    architecture = ModelArchitecture.from_config(DEEPSEEK_MOE)
    assert architecture.num_moe_layers == 27
    assert architecture.shared_expert_intermediate_size == 2 * 1408
    assert (architecture.num_experts, architecture.experts_per_token) == (64, 6)
    assert architecture.intermediate_size == 10944


@pytest.mark.parametrize(
    ("quantization", "dtype", "width"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8", 1.0),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8", 1.0),
        ({"quant_method": "awq", "bits": 4}, "int4", 0.5),
        ({"quant_method": "gptq", "bits": 8}, "int8", 1.0),
    ],
)
def test_a_declared_quantisation_sets_the_width_of_a_weight(quantization, dtype, width):
    architecture = ModelArchitecture.from_config({**LLAMA_31_8B, "quantization_config": quantization})
    assert architecture.weight_dtype == dtype
    assert architecture.bytes_per_weight == width


def test_the_top_level_quantisation_holds_for_a_nested_text_model():
    quantized = {**LLAMA_4_SCOUT, "quantization_config": {"quant_method": "fp8"}}
    assert ModelArchitecture.from_config(quantized, max_model_len=8192).weight_dtype == "fp8"


def test_unknown_widths_are_refused():
    with pytest.raises(NotModelledError, match=r"quantisation `hqq`.*quantization_config"):
        ModelArchitecture.from_config({**LLAMA_31_8B, "quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(InputError, match=r"`torch_dtype` 'float128'"):
        ModelArchitecture.from_config({**LLAMA_31_8B, "torch_dtype": "float128"})


def test_torch_prefix_of_the_dtype_is_dropped():
    assert ModelArchitecture.from_config({**LLAMA_31_8B, "torch_dtype": "torch.float16"}).weight_dtype == "float16"


def test_a_sliding_window_that_is_switched_off_is_ignored():
    config = {**QWEN_25_7B, "sliding_window": 4096}
    assert ModelArchitecture.from_config(config).num_layers == 28


def test_a_sliding_window_of_a_type_without_one_is_refused_unless_the_server_never_reaches_it():
    config = {**LLAMA_31_8B, "sliding_window": 4096, "max_position_embeddings": 32768}
    with pytest.raises(InputError, match=r"4096 tokens at a time .`sliding_window`.*32768.*max_model_len"):
        ModelArchitecture.from_config(config)
    with pytest.raises(InputError, match="sliding_window"):
        ModelArchitecture.from_config(config, max_model_len=4097)
    assert ModelArchitecture.from_config(config, max_model_len=4096).num_layers == 32


def test_sliding_layers_are_refused_where_the_switch_says_otherwise():
    types = ["full_attention", "sliding_attention"] * 14
    with pytest.raises(InputError, match="sliding_window"):
        ModelArchitecture.from_config({**QWEN_25_7B, "sliding_window": 4096, "layer_types": types})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"state_size": 16}, "state-space"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_other_kinds_of_attention_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        ModelArchitecture.from_config({**LLAMA_31_8B, **changes})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_dimension_is_named(key):
    config = {k: v for k, v in LLAMA_31_8B.items() if k != key}
    with pytest.raises(InputError, match=f"lacks `{key}`"):
        ModelArchitecture.from_config(config)


def test_a_mixture_must_say_how_many_experts_a_token_visits():
    config = {k: v for k, v in QWEN_MOE.items() if k != "num_experts_per_tok"}
    with pytest.raises(InputError, match="lacks `num_experts_per_tok`"):
        ModelArchitecture.from_config(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 5}, "do not share its 5 KV heads evenly"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "to 5 experts"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; it must be at least 1"),
    ],
)
def test_dimensions_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        ModelArchitecture.from_config({**LLAMA_31_8B, **changes})


def test_tensor_parallel_degrees_divide_the_heads():
    architecture = load_architecture("llama-2-7b")
    assert architecture.tensor_parallel_degrees() == [1, 2, 4, 8, 16, 32]
    assert architecture.check_tensor_parallel(4) == 4


@pytest.mark.parametrize("degree", [0, -1, 3, 64])
def test_another_degree_is_refused_with_those_that_fit(degree):
    with pytest.raises(InputError, match=rf"`tensor_parallel={degree}`.*32 attention heads.*1, 2, 4, 8, 16, 32\."):
        load_architecture("llama-2-7b").check_tensor_parallel(degree)


def test_a_file_reads_like_its_content_and_is_named_by_its_folder(tmp_path):
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_31_8B), encoding="utf-8")
    from_file = resolve_architecture(str(path))
    assert from_file.name == "my-model"
    assert dataclasses.replace(from_file, name="x") == ModelArchitecture.from_config(LLAMA_31_8B, name="x")


def test_a_shipped_name_resolves_without_a_file():
    assert resolve_architecture("llama-2-7b") == load_architecture("llama-2-7b")


@pytest.mark.parametrize(("content", "said"), [("{not json", "line 1: not JSON"), ("[1, 2]", "holds a JSON list")])
def test_a_file_that_is_no_config_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        ModelArchitecture.from_config(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="No architecture file at"):
        resolve_architecture(str(tmp_path / "nowhere.json"))


def test_chunked_attention_is_refused_unless_the_context_fits_a_chunk():
    config = {**LLAMA_31_8B, "attention_chunk_size": 8192}
    with pytest.raises(InputError, match="attention_chunk_size"):
        ModelArchitecture.from_config(config)
    assert ModelArchitecture.from_config(config, max_model_len=8192).num_layers == 32


def test_layers_that_all_attend_fully_do_not_slide():
    config = {**LLAMA_31_8B, "sliding_window": 4096, "layer_types": ["full_attention"] * 32}
    assert ModelArchitecture.from_config(config).num_layers == 32


@pytest.mark.parametrize(("frequency", "n_sparse"), [(1, 27), (2, 13), ([0] * 14 + [1] * 14, 14)])
def test_moe_layer_freq_says_which_layers_are_mixtures(frequency, n_sparse):
    config = {
        **LLAMA_31_8B,
        "model_type": "deepseek",
        "num_hidden_layers": 28,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "moe_layer_freq": frequency,
    }
    assert ModelArchitecture.from_config(config).num_moe_layers == n_sparse
