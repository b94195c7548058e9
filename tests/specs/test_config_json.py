"""What a config.json may hold: what is known is read right, what is not is refused by what it is."""

import json

import pytest

from stepcal.errors import InputError, NotModelledError
from stepcal.specs.architecture import ModelArchitecture, load_architecture, resolve_architecture
from stepcal.specs.config_keys import REFUSED_TYPES
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.model_types import MODEL_TYPES
from stepcal.specs.step_work import weight_bytes

BASE = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
EMBEDDING = HEAD = 32000 * 1024
LAYERS = 4 * (1024 * 2 * (1024 + 256) + 3 * 1024 * 4096)
NORMS = 4 * 2 * 1024 + 1024


def read(**changes):
    return ModelArchitecture.from_config({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        pytest.param(
            {"model_type": "falcon_h1", "mamba_d_state": 128, "mamba_n_heads": 16}, "state-space", id="falcon-h1"
        ),
        pytest.param({"model_type": "nemotron_h", "hybrid_override_pattern": "M*M-"}, "state-space", id="nemotron-h"),
        pytest.param({"model_type": "recurrent_gemma", "block_types": ["recurrent"]}, "recurrent layers", id="griffin"),
        pytest.param({"cross_attention_layers": [1]}, "cross-attention layers", id="cross-attention"),
        pytest.param(
            {"model_type": "nemotron-nas", "intermediate_size": None, "block_configs": [{}]},
            "layers that differ",
            id="nas",
        ),
        pytest.param(
            {"block_configs": [{"attention": {"no_op": True}}]}, "layers that differ", id="blocks of any type"
        ),
        pytest.param({"model_type": "deepseek_v32", "kv_lora_rank": 512}, "multi-head latent attention", id="mla"),
        pytest.param({"kv_lora_rank": 512}, "multi-head latent attention", id="mla in any type"),
        pytest.param({"model_type": "qwen3_next"}, "linear attention", id="qwen3-next"),
        pytest.param({"model_type": "mllama"}, "cross-attention", id="mllama"),
        pytest.param({"model_type": "t5", "is_encoder_decoder": True}, "encoder", id="t5"),
        pytest.param({"is_encoder_decoder": True}, "encoder", id="encoder in any type"),
        pytest.param(
            {"model_type": "nobody", "mamba_d_conv": 4},
            "`model_type: nobody`.*state-space",
            id="unknown type, known hint",
        ),
        pytest.param({"mamba_d_state": 16}, "`mamba_d_state: 16`.*state-space", id="unknown key, known hint"),
        pytest.param({"fancy_mixer": 3}, "`fancy_mixer: 3`.*does not know", id="unknown key"),
        pytest.param({"num_local_experts": 8}, "`num_local_experts: 8`.*mixture", id="experts in a dense type"),
        pytest.param(
            {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "linear_attention", id="layer type"
        ),
    ],
)
def test_what_is_not_modelled_is_refused_by_what_it_is(changes, what):
    with pytest.raises(NotModelledError, match=what):
        read(**changes)


@pytest.mark.parametrize("value", [None, False, [], {}, 0, ""])
def test_an_unknown_key_without_a_value_is_no_reason_to_refuse(value):
    assert read(fancy_mixer=value).num_layers == 4


@pytest.mark.parametrize("key", ["cross_attention_layers", "kv_lora_rank", "block_configs", "is_encoder_decoder"])
def test_what_is_switched_off_is_accepted(key):
    assert read(**{key: None}) == read()


@pytest.mark.parametrize("name", sorted(REFUSED_TYPES))
def test_a_refused_type_is_not_an_accepted_one(name):
    assert name not in MODEL_TYPES
    with pytest.raises(NotModelledError, match=f"model_type: {name}"):
        read(model_type=name)


def test_a_file_without_a_type_is_refused_unless_its_class_says_it():
    config = {key: value for key, value in BASE.items() if key != "model_type"}
    with pytest.raises(InputError, match="lacks `model_type`"):
        ModelArchitecture.from_config(config)
    assert ModelArchitecture.from_config({**config, "architectures": ["LlamaForCausalLM"]}) == read()


@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [
        ({"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False}, 1),
        ({"model_type": "falcon"}, 1),
        ({"model_type": "falcon", "multi_query": False}, 16),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8}, 8),
        ({"model_type": "falcon", "new_decoder_architecture": True}, 16),
        ({"model_type": "gpt_bigcode", "multi_query": True}, 1),
        ({"model_type": "gpt_bigcode", "multi_query": False}, 16),
        ({"model_type": "mistral", "sliding_window": None}, 8),
        ({"model_type": "starcoder2"}, 2),
        ({"model_type": "glm"}, 2),
        ({"model_type": "llama"}, 16),
    ],
)
def test_kv_heads_are_those_of_the_type_where_the_file_is_silent(changes, kv_heads):
    config = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "intermediate_size")}
    if changes["model_type"] not in ("falcon", "gpt_bigcode"):
        config["intermediate_size"] = 4096
    if changes["model_type"] == "gpt_bigcode":
        config = {"n_embd": 1024, "n_head": 16, "n_layer": 4, "n_positions": 1024, "vocab_size": 32000}
    assert ModelArchitecture.from_config({**config, **changes}).num_kv_heads == kv_heads


@pytest.mark.parametrize(
    ("name", "tied"), [("llama", False), ("gemma", True), ("cohere", True), ("qwen2", False), ("starcoder2", True)]
)
def test_whether_embeddings_are_tied_depends_on_the_type(name, tied):
    assert read(model_type=name).tie_word_embeddings is tied
    assert read(model_type=name, tie_word_embeddings=not tied).tie_word_embeddings is not tied


def test_a_window_of_layers_that_are_not_named_is_accepted_up_to_its_length():
    config = {**BASE, "model_type": "mistral", "sliding_window": 4096}
    windows = ModelArchitecture.from_config(config).windows
    assert windows is not None
    assert (windows.window, windows.n_full) == (4096, 0)
    assert ModelArchitecture.from_config(config).windows_within(4096) is None
    silent = {**BASE, "model_type": "mistral"}
    assert ModelArchitecture.from_config(silent).windows == windows  # the default of the type
    with pytest.raises(NotModelledError, match="`max_model_len` <= 4096 never slides"):
        ModelArchitecture.from_config({**config, "model_type": "llama"})
    assert ModelArchitecture.from_config({**config, "model_type": "llama"}, max_model_len=4096).windows is None


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", None])
def test_vllm_runs_a_float32_checkpoint_in_sixteen_bits(dtype):
    architecture = read(torch_dtype=dtype)
    assert architecture.weight_dtype == "bfloat16"
    assert architecture.weights_bytes() == 2 * architecture.num_parameters()


def quantised(**config):
    return read(quantization_config=config)


@pytest.mark.parametrize(
    ("config", "layer_width"),
    [
        pytest.param({"quant_method": "awq", "bits": 4}, 0.5, id="awq without groups"),
        pytest.param({"quant_method": "awq", "bits": 4, "group_size": 128}, (4 + 16 / 128) / 8, id="awq"),
        pytest.param(
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, (4 + 20 / 128) / 8, id="awq, zeros"
        ),
        pytest.param({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0, id="gptq a scale a channel"),
        pytest.param({"quant_method": "fp8", "activation_scheme": "dynamic"}, 1.0, id="fp8"),
        pytest.param({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, 1.0, id="modelopt, no method"),
        pytest.param({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, (4 + 8 / 16) / 8, id="modelopt nvfp4"),
        pytest.param(
            {"quant_method": "compressed-tensors", "format": "pack-quantized",
             "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}, "ignore": ["lm_head"]},
            0.5, id="compressed-tensors w4a16",
        ),
        pytest.param(
            {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}},
            1.0, id="compressed-tensors fp8",
        ),
        pytest.param({"quant_method": "bitsandbytes", "load_in_4bit": True}, (4 + 32 / 64) / 8, id="bitsandbytes"),
    ],
)  # fmt: skip
def test_layers_have_the_declared_width_and_embedding_and_head_sixteen_bits(config, layer_width):
    architecture = quantised(**config)
    assert architecture.num_parameters() == LAYERS + EMBEDDING + HEAD + NORMS
    assert architecture.weights_bytes() == pytest.approx(layer_width * LAYERS + 2 * (EMBEDDING + HEAD + NORMS))
    deployment = Deployment(architecture, load_accelerator("h100-sxm"))
    assert weight_bytes(1, deployment)[0] == pytest.approx(layer_width * LAYERS + 2 * HEAD)


def test_qwen3_8b_in_awq_has_the_size_of_its_files():
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "modules_to_not_convert": None}
    read_4_bit = ModelArchitecture.from_config({**QWEN3_8B, "quantization_config": awq})
    assert read_4_bit.weights_bytes() / 1e9 == pytest.approx(6.07, abs=0.005)
    full = ModelArchitecture.from_config(QWEN3_8B)
    assert full.weights_bytes() == 2 * full.num_parameters()


@pytest.mark.parametrize(
    ("ignored", "share"),
    [
        (["lm_head"], 1.0),
        (["re:.*self_attn.*"], 12_582_912 / (12_582_912 + 2_621_440)),
        (["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"], None),
        (["model.layers.*.mlp*"], 2_621_440 / (12_582_912 + 2_621_440)),
    ],
)
def test_what_is_ignored_keeps_sixteen_bits(ignored, share):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
    architecture = quantised(quant_method="compressed-tensors", config_groups=groups, ignore=["lm_head", *ignored])
    if share is None:
        share = 1 - 12_582_912 / LAYERS
    expected = LAYERS * (share * 1 + (1 - share) * 2) + 2 * (EMBEDDING + HEAD + NORMS)
    assert architecture.weights_bytes() == pytest.approx(expected)


def test_a_quantised_output_matrix_is_narrow_where_the_file_says_so():
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
    assert quantised(quant_method="compressed-tensors", config_groups=groups).widths.head == 1.0
    assert quantised(quant_method="gptq", bits=4, group_size=128, lm_head=True).widths.head < 1.0


def test_experts_alone_are_narrow_in_mxfp4():
    config = {**BASE, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    widths = ModelArchitecture.from_config({**config, "quantization_config": {"quant_method": "mxfp4"}}).widths
    assert (widths.attention, widths.mlp, widths.experts) == (2.0, 2.0, (4 + 8 / 32) / 8)


def test_the_quantisation_file_of_modelopt_beside_the_config_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert resolve_architecture(str(tmp_path / "config.json")).weight_dtype == "fp8"


@pytest.mark.parametrize(
    "config",
    [
        {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": {"num_bits": 8}},
    ],
)
def test_a_kv_cache_in_other_than_fp8_is_refused(config):
    with pytest.raises(NotModelledError, match="quantised KV cache"):
        quantised(**config)


@pytest.mark.parametrize("method", ["hqq", "gguf", "aqlm", "torchao", ""])
def test_an_unknown_quantisation_is_refused_by_its_name(method):
    with pytest.raises(NotModelledError, match="whose width stepcal does not know"):
        quantised(quant_method=method)


def test_a_pattern_that_would_match_forever_is_refused():
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
    with pytest.raises(InputError, match="too complex"):
        quantised(quant_method="compressed-tensors", config_groups=groups, ignore=["re:(.+)+x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": float("inf")}, "`num_hidden_layers` is inf; it must be a whole number, at least 1"),
        ({"num_hidden_layers": 1e30}, "`num_hidden_layers` is 1e\\+30; it must be at least 1 and at most"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` is True; it must be a whole number"),
        ({"hidden_size": 4096.5}, "`hidden_size` is 4096.5; it must be a whole number"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` is 0; it must be at least 1"),
        ({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 0}, "`num_experts_per_tok` is 0"),
        ({"layer_types": "full_attention"}, "`layer_types` is 'full_attention'; it must be a list"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, but the model has 4"),
        ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` is 'false'; it must be true or false"),
        ({"vocab_size": 10**401}, r"`vocab_size` is 10+\.\.\. \(402 digits\)"),
        ({"quantization_config": "awq"}, "`quantization_config` is 'awq'; it must be an object"),
        ({"head_dim": None, "hidden_size": 1025}, "1025 is no multiple of the 16 attention heads"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_bound(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read(**changes)
    assert len(str(caught.value)) < 400


def test_a_vision_tower_is_said_to_be_left_out():
    text = {k: v for k, v in BASE.items() if k != "torch_dtype"}
    config = {
        "model_type": "llava",
        "text_config": text,
        "vision_config": {"hidden_size": 1024},
        "image_token_index": 1,
    }
    read_text = ModelArchitecture.from_config(config)
    assert read_text.num_parameters() == read().num_parameters()
    assert any("vision tower" in note for note in read_text.notes)
    assert read().notes == ()


def test_a_nested_text_model_takes_the_defaults_of_its_class():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024}  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    four_b = ModelArchitecture.from_config(config, max_model_len=1024)
    assert (four_b.num_attention_heads, four_b.num_kv_heads, four_b.head_dim) == (8, 4, 256)
    assert four_b.num_parameters() == 3_880_263_168  # google/gemma-3-4b-pt, without its tower of 419,816,304


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}, 32768),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 16384),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 8192),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_the_context_limit_is_derived_as_vllm_does(changes, limit):
    assert read(**changes).max_position_embeddings == limit


@pytest.mark.parametrize(
    ("changes", "fits", "does_not"),
    [
        ({"num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120, "intermediate_size": 17408}, 8, 5),
        ({"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "intermediate_size": 18944}, 4, 7),
        ({"num_key_value_heads": 2}, 8, 3),
        ({"intermediate_size": 4100}, 4, 8),
    ],
)
def test_tensor_parallel_degrees_are_those_that_vllm_takes(changes, fits, does_not):
    architecture = read(**changes)
    assert architecture.check_tensor_parallel(fits) == fits
    with pytest.raises(InputError, match=rf"`tensor_parallel={does_not}`.*Degrees that fit: "):
        architecture.check_tensor_parallel(does_not)


def test_more_ranks_than_kv_heads_replicate_them():
    assert load_architecture("llama-2-70b").tensor_parallel_degrees() == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 5472, "max_window_layers": 28,
             "mlp_only_layers": [], "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128,
             "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "qkv_bias": False,
             "shared_expert_intermediate_size": 0, "use_qk_norm": True, "use_sliding_window": False, "vocab_size": 151936,
             "head_dim": 128, "max_position_embeddings": 262144}, id="qwen3-coder"),
        pytest.param(
            {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
             "num_hidden_layers": 32, "num_key_value_heads": 8, "full_attn_mod": 1, "interpolate_factor": 1,
             "lm_head_bias": False, "mlp_bias": False, "sliding_window": 262144, "tie_word_embeddings": True,
             "vocab_size": 200064, "max_position_embeddings": 131072, "partial_rotary_factor": 0.75}, id="phi-4-mini"),
        pytest.param(
            {"model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536, "num_attention_heads": 48,
             "num_hidden_layers": 62, "num_key_value_heads": 8, "attn_type_list": [1] * 62, "num_local_experts": 256,
             "num_experts_per_tok": 8, "vocab_size": 200064, "use_qk_norm": True, "qk_norm_type": "per_layer",
             "use_mtp": True, "num_mtp_modules": 3, "use_routing_bias": True, "scoring_func": "sigmoid"}, id="minimax-m2"),
        pytest.param(
            {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064,
             "max_position_embeddings": 4096}, "vision_config": {"hidden_size": 1024}, "image_token_index": 32000,
             "ignore_index": -100, "vision_feature_layer": -2}, id="llava-1.5"),
        pytest.param(
            {"model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
             "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "vision_config": {"depth": 32},
             "vision_start_token_id": 151652, "use_sliding_window": False,
             "rope_scaling": {"type": "mrope"}}, id="qwen2-vl"),
    ],
)  # fmt: skip
def test_files_as_people_have_them_are_accepted(config):
    assert ModelArchitecture.from_config(config).num_parameters() > 10**9


def test_sparse_weights_and_projected_embeddings_are_refused():
    with pytest.raises(NotModelledError, match="sparse layout"):
        quantised(quant_method="compressed-tensors", sparsity_config={"sparsity_structure": "2:4"}, config_groups={})
    opt = {"model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
           "vocab_size": 50272, "word_embed_proj_dim": 512}  # fmt: skip
    with pytest.raises(InputError, match="`word_embed_proj_dim` is 512, but 1024"):
        ModelArchitecture.from_config(opt)
