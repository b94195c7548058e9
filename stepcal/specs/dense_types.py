"""Types with dense MLPs: names and defaults as in their configuration classes in transformers."""

from __future__ import annotations

from dataclasses import replace

from stepcal.specs.model_type import ModelType, words

LLAMA = ModelType(
    family="Llama, Yi, DeepSeek LLM, SmolLM2 and others of their architecture",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    nested_defaults={
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 2048,
    },
)  # fmt: skip
MISTRAL = replace(
    LLAMA,
    family="Mistral, Ministral",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    nested_defaults={
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 131072,
    },
    window="all",
)  # fmt: skip
_GPT2 = ModelType(
    family="GPT-2",
    hidden_size=("n_embd", "hidden_size"),
    num_layers=("n_layer", "num_hidden_layers"),
    num_attention_heads=("n_head", "num_attention_heads"),
    num_kv_heads=(),
    intermediate_size=("n_inner", "intermediate_size"),
    positions=("n_positions", "max_position_embeddings"),
    hidden_multiple=4,
    gated=False,
    tied=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm_bias=True,
    learned_positions=0,
    neutral=words(
        "n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
        "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn inference_runner validate_runner_input "
        "pre_allocate_kv_cache "
        "max_sequence_length max_batch_size"
    ),
)
QWEN2 = replace(
    LLAMA,
    family="Qwen1.5, Qwen2, Qwen2.5, QwQ",
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    defaults={"use_sliding_window": False, "sliding_window": 4096},
    nested_defaults={
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
    window="layers",
)  # fmt: skip
QWEN3 = replace(
    QWEN2,
    family="Qwen3",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    defaults={**QWEN2.defaults, "head_dim": 128},
    qk_norm="head",
)
_GEMMA = replace(
    LLAMA,
    family="Gemma",
    mlp_bias=False,
    tied=True,
    defaults={"head_dim": 256},
    neutral=words("query_pre_attn_scalar use_bidirectional_attention"),
)
_GEMMA2 = replace(
    _GEMMA, family="Gemma 2", norms_per_layer=4, defaults={"head_dim": 256, "sliding_window": 4096}, window="layers",
    neutral=_GEMMA.neutral | words("cache_implementation sliding_window_size"),
)  # fmt: skip
_GEMMA3_TEXT = replace(
    _GEMMA2,
    family="Gemma 3",
    qk_norm="head",
    nested_defaults={
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 262208, "max_position_embeddings": 131072,
    },
    neutral=_GEMMA2.neutral | words("sliding_window_pattern _sliding_window_pattern"),
)  # fmt: skip
_COHERE = replace(
    LLAMA,
    family="Command R",
    mlp_bias=False,
    tied=True,
    norms_per_layer=1,
    qk_norm="use_qk_norm:full",
)
_GLM = replace(
    LLAMA, family="GLM-4 (transformers layout)", output_bias=False, mlp_bias=False,
    defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
)  # fmt: skip
OLMO = replace(
    LLAMA,
    family="OLMo",
    mlp_bias=False,
    norms_per_layer=0,
    end_norms=0,
    neutral=words("clip_qkv layer_norm_with_affine"),
)
OLMO2 = replace(OLMO, family="OLMo 2", norms_per_layer=2, end_norms=1, qk_norm="full")
GRANITE_KEYS = words("embedding_multiplier logits_scaling residual_multiplier attention_multiplier")
_FALCON = ModelType(
    family="Falcon",
    num_layers=("num_hidden_layers", "n_layer"),
    num_attention_heads=("num_attention_heads", "n_head"),
    num_kv_heads=("num_kv_heads", "n_head_kv"),
    kv_rule="falcon",
    intermediate_size=("ffn_hidden_size",),
    hidden_multiple=4,
    gated=False,
    tied=True,
    qkv_bias="bias",
    output_bias="bias",
    mlp_bias="bias",
    norm_bias=True,
    defaults={
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "max_position_embeddings": 2048,
    },
    neutral=words("alibi apply_residual_connection_post_layernorm multi_query parallel_attn ff_factor"),
    only={"num_ln_in_parallel_attn": (None, 1, 2)},
)

DENSE_TYPES: dict[str, ModelType] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": replace(MISTRAL, family="Ministral 3", defaults={"num_key_value_heads": 8, "head_dim": 128,
        "sliding_window": None}),
    "qwen": replace(
        LLAMA, family="Qwen (first generation)", num_kv_heads=(), head_dim=("kv_channels",),
            intermediate_size=("intermediate_size",),
        width_factor=0.5, qkv_bias=True, output_bias=False, mlp_bias="!no_bias",
            positions=("max_position_embeddings", "seq_length"),
        defaults={"no_bias": True},
        neutral=words("seq_length use_dynamic_ntk use_logn_attn use_cache_quantization use_cache_kernel "
            "softmax_in_fp32"),
    ),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3_TEXT,
    "phi": replace(
        LLAMA, family="Phi-1, Phi-1.5, Phi-2", gated=False, qkv_bias=True, output_bias=True, mlp_bias=True,
            head_bias=True,
        norm_bias=True, norms_per_layer=1, only={"qk_layernorm": (False, None)},
    ),
    "phi3": replace(
        LLAMA, family="Phi-3, Phi-3.5, Phi-4", qkv_bias=False, output_bias=False, mlp_bias=False,
        defaults={"sliding_window": None}, window="all", neutral=words("interpolate_factor"),
        only={"full_attn_mod": (1, None)},
    ),
    "falcon": _FALCON,
    "RefinedWeb": replace(_FALCON, family="Falcon 40B (first layout)", defaults={**_FALCON.defaults,
        "new_decoder_architecture": True}),
    "RefinedWebModel": replace(_FALCON, family="Falcon 7B (first layout)"),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(
        _GPT2, family="StarCoder, SantaCoder", kv_rule="multi_query", defaults={"multi_query": True},
        neutral=_GPT2.neutral | words("attention_softmax_in_fp32"),
    ),
    "starcoder2": replace(
        LLAMA, family="StarCoder2", gated=False, tied=True, qkv_bias="use_bias", output_bias="use_bias",
            mlp_bias="use_bias",
        norm_bias=True, defaults={"use_bias": True, "num_key_value_heads": 2, "sliding_window": None}, window="all",
        neutral=words("mlp_type norm_type"),
    ),
    "gpt_neox": replace(
        LLAMA, family="GPT-NeoX, Pythia", num_kv_heads=(), gated=False, qkv_bias="attention_bias",
            output_bias="attention_bias",
        mlp_bias=True, norm_bias=True, defaults={"attention_bias": True}, neutral=words("use_parallel_residual"),
    ),
    "gptj": replace(
        _GPT2, family="GPT-J", tied=False, qkv_bias=False, output_bias=False, norms_per_layer=1, head_bias=True,
        learned_positions=None,
    ),
    "opt": ModelType(
        family="OPT", num_kv_heads=(), intermediate_size=("ffn_dim",), gated=False, tied=True, qkv_bias="enable_bias",
        output_bias="enable_bias", mlp_bias="enable_bias", norm_bias="layer_norm_elementwise_affine",
            learned_positions=2,
        defaults={"enable_bias": True, "layer_norm_elementwise_affine": True},
        neutral=words("layerdrop _remove_final_layer_norm"),
        only={"do_layer_norm_before": (True, None)},
    ),
    "bloom": ModelType(
        family="BLOOM", hidden_size=("hidden_size", "n_embed"), num_layers=("n_layer", "num_hidden_layers"),
        num_attention_heads=("n_head", "num_attention_heads"), num_kv_heads=(), intermediate_size=(),
            hidden_multiple=4,
        positions=("seq_length", "max_position_embeddings"), defaults={"seq_length": 2048}, gated=False, tied=True,
            qkv_bias=True,
            output_bias=True,
        mlp_bias=True, norm_bias=True, end_norms=2,
        neutral=words("apply_residual_connection_post_layernorm slow_but_exact skip_bias_add skip_bias_add_qkv "
            "attention_dropout "
                      "masked_softmax_fusion bias_dropout_fusion unk_token_id offset_alibi"),
    ),
    "mpt": ModelType(
        family="MPT", hidden_size=("d_model",), num_layers=("n_layers",), num_attention_heads=("n_heads",),
        num_kv_heads=("attn_config.kv_n_heads",), kv_rule="mpt", intermediate_size=(), hidden_multiple=4,
            positions=("max_seq_len",),
        gated=False, tied=True, qkv_bias="!no_bias", output_bias="!no_bias", mlp_bias="!no_bias",
            norm_bias="!no_bias",
        defaults={"no_bias": True, "expansion_ratio": 4, "max_seq_len": 2048},
        neutral=words("attn_config ffn_config fc_type init_config init_device norm_type verbose embedding_fraction "
            "learned_pos_emb "
                      "use_pad_tok_in_ffn attn_config.attn_type attn_config.attn_pdrop attn_config.attn_impl "
                          "attn_config.softmax_scale "
                      "attn_config.clip_qkv attn_config.alibi attn_config.alibi_bias_max "
                          "attn_config.attn_uses_sequence_id "
                      "attn_config.rope attn_config.rope_theta attn_config.model_type ffn_config.ffn_type "
                          "ffn_config.fc_type"),
        only={"attn_config.prefix_lm": (False, None), "attn_config.qk_ln": (False, None),
            "attn_config.alibi": (True,)},
    ),
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, family="OLMo 3", defaults={"sliding_window": 4096}, window="layers"),
    "granite": replace(LLAMA, family="Granite", neutral=GRANITE_KEYS),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE, family="Command R7B, Command A", qk_norm="", defaults={"sliding_window": 4096}, window="layers",
        neutral=words("sliding_window_pattern layer_switch order_of_interleaved_layers rotary_pct "
            "cache_implementation "
            "use_embedding_sharing "
                      "use_gated_activation use_parallel_block use_parallel_embedding use_qk_norm"),
    ),
    "glm": _GLM,
    "glm4": replace(_GLM, family="GLM-4-0414", norms_per_layer=4),
    "chatglm": ModelType(
        family="ChatGLM2, ChatGLM3, GLM-4 (first layout)", num_layers=("num_layers", "num_hidden_layers"),
        num_kv_heads=("multi_query_group_num",), kv_rule="chatglm", head_dim=("kv_channels",),
            intermediate_size=("ffn_hidden_size",),
        vocab_size=("padded_vocab_size",), positions=("seq_length",), qkv_bias="add_qkv_bias",
            output_bias="add_bias_linear",
        mlp_bias="add_bias_linear", defaults={"multi_query_attention": False, "add_qkv_bias": False,
            "add_bias_linear": False},
        neutral=words("vocab_size apply_query_key_layer_scaling apply_residual_connection_post_layernorm "
            "attention_softmax_in_fp32 "
                      "bias_dropout_fusion fp32_residual_connection original_rope interleaved_qkv quantization_bit "
                          "pre_seq_len "
                      "prefix_projection"),
        only={"rmsnorm": (True, None), "post_layer_norm": (True, None)},
    ),
    "internlm2": replace(
        LLAMA, family="InternLM2, InternLM2.5", qkv_bias="bias", output_bias="bias", mlp_bias=False,
            defaults={"bias": False},
    ),
    "internlm3": replace(
        LLAMA, family="InternLM3", qkv_bias="qkv_bias", output_bias="bias", mlp_bias="bias",
        defaults={"num_key_value_heads": 2, "head_dim": 128, "qkv_bias": False, "bias": False},
    ),
    "baichuan": replace(
        LLAMA, family="Baichuan, Baichuan2", num_kv_heads=(), qkv_bias=False, output_bias=False, mlp_bias=False,
        positions=("max_position_embeddings", "model_max_length"), neutral=words("model_max_length z_loss_weight"),
    ),
    "stablelm": replace(
        LLAMA, family="StableLM", qkv_bias="use_qkv_bias", output_bias=False, mlp_bias=False, norm_bias=True,
        only={"qk_layernorm": (False, None), "use_parallel_residual": (False, None)}, neutral=words("norm_bias"),
    ),
    "minicpm": replace(
        LLAMA, family="MiniCPM", tied=True,
        neutral=words("scale_emb scale_depth dim_model_base scale_width rope_max_length mup_denominator"),
    ),
    "exaone": replace(
        LLAMA, family="EXAONE 3, 3.5", num_layers=("num_layers", "num_hidden_layers"), qkv_bias=False,
            output_bias=False, mlp_bias=False,
        tied=True, neutral=words("embed_dropout"),
    ),
    "exaone4": replace(
        LLAMA, family="EXAONE 4", qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="head",
            defaults={"sliding_window": None},
        window="layers", neutral=words("sliding_window_pattern"),
    ),
    "nemotron": replace(
        LLAMA, family="Nemotron, Minitron", gated=False, norm_bias=True,
    ),
    "smollm3": replace(
        LLAMA, family="SmolLM3", tied=True,
        defaults={"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": None}, window="layers",
        neutral=words("no_rope_layers no_rope_layer_interval"),
    ),
    "seed_oss": replace(
        LLAMA, family="Seed-OSS", output_bias="attention_out_bias", mlp_bias="mlp_bias",
        defaults={"attention_bias": True, "attention_out_bias": False, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "ernie4_5": replace(
        LLAMA, family="ERNIE 4.5", qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", tied=True,
        defaults={"num_key_value_heads": 2, "head_dim": 128}, neutral=words("compression_ratio"),
    ),
    "hunyuan_v1_dense": replace(
        LLAMA, family="Hunyuan (dense)", mlp_bias=False, qk_norm="use_qk_norm:head",
        neutral=words("org_vocab_size attention_head_dim norm_type rope_dynamic mlp_bias im_start_id im_end_id "
            "text_start_id text_end_id "
                      "im_newline_id image_token_id add_classification_head class_num pool_type eod_token_id "
                          "dense_list num_media_embeds "
                      "mask_init_id max_seqlen position_embedding_xdrope"),
        only={"use_cla": (False, None)},
    ),
    "apertus": replace(
        LLAMA, family="Apertus", gated=False, mlp_bias=False, qk_norm="head", neutral=words("qk_norm post_norm "
            "mlp_bias"),
        only={"qk_norm": (True, None), "post_norm": (False, None)},
    ),
    "arcee": replace(LLAMA, family="Arcee AFM", gated=False),
    "qwen2_vl_text": replace(QWEN2, family="Qwen2-VL (text)"),
    "qwen2_5_vl_text": replace(QWEN2, family="Qwen2.5-VL (text)"),
    "qwen3_vl_text": replace(QWEN3, family="Qwen3-VL (text)"),
}  # fmt: skip
