"""Types with mixtures of experts: names and defaults as in their configuration classes in transformers."""

from __future__ import annotations

from dataclasses import replace

from stepcal.specs.dense_types import GRANITE_KEYS, LLAMA, OLMO2, QWEN2, QWEN3
from stepcal.specs.model_type import Mixture, ModelType, words

_ROUTING_KEYS = words(
    "norm_topk_prob output_router_logits router_aux_loss_coef router_jitter_noise input_jitter_noise n_group "
    "topk_group "
    "topk_method scoring_func routed_scaling_factor aux_loss_alpha seq_aux router_z_loss_coef moe_norm_min "
    "route_scale ep_size "
    "use_qk_rope num_experts_per_group moe_router_enable_expert_bias"
)
_QWEN2_MOE = replace(
    QWEN2,
    family="Qwen1.5-MoE, Qwen2-MoE",
    qkv_bias="qkv_bias",
    defaults={**QWEN2.defaults, "qkv_bias": True},
    mixture=Mixture(
        num_experts=("num_experts",),
        shared_width=("shared_expert_intermediate_size",),
        shared_gate=True,
        sparse_rule="qwen",
    ),
    neutral=_ROUTING_KEYS,
)
_QWEN3_MOE = replace(
    QWEN3,
    family="Qwen3-MoE",
    defaults=QWEN2.defaults,
    nested_defaults={
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 151936, "max_position_embeddings": 32768, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    mixture=Mixture(num_experts=("num_experts", "num_local_experts"), sparse_rule="qwen"),
    neutral=_ROUTING_KEYS | words("shared_expert_intermediate_size qkv_bias"),
    only={"use_qk_norm": (True, None)},
)  # fmt: skip
_DEEPSEEK = replace(
    LLAMA,
    family="DeepSeek MoE",
    mixture=Mixture(num_experts=("n_routed_experts",), num_shared=("n_shared_experts",), sparse_rule="deepseek"),
    neutral=_ROUTING_KEYS,
)
_DEEPSEEK_V2 = replace(
    _DEEPSEEK,
    family="DeepSeek-V2, DeepSeek-Coder-V2",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    latent=True,
    only={"attention_bias": (False, None)},
    neutral=_ROUTING_KEYS | words("kv_lora_rank q_lora_rank num_nextn_predict_layers"),
)
_DEEPSEEK_V3 = replace(
    _DEEPSEEK_V2,
    family="DeepSeek-V3, DeepSeek-R1",
    mixture=replace(_DEEPSEEK.mixture, router_bias=True) if _DEEPSEEK.mixture else None,
)
_MIXTRAL = replace(
    LLAMA,
    family="Mixtral",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    window="all",
    mixture=Mixture(num_experts=("num_local_experts",), expert_width=("intermediate_size",)),
    neutral=_ROUTING_KEYS,
)
_GRANITE_MOE = replace(
    LLAMA,
    family="Granite MoE",
    mlp_bias=False,
    defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    mixture=Mixture(num_experts=("num_local_experts",), expert_width=("intermediate_size",)),
    neutral=_ROUTING_KEYS | GRANITE_KEYS,
)
_LLAMA4_TEXT = replace(
    LLAMA,
    family="Llama 4",
    mlp_bias=False,
    defaults={
        "head_dim": 128, "attention_chunk_size": 8192, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1,
        "num_local_experts": 16, "intermediate_size_mlp": 16384, "num_key_value_heads": 8,
    },
    nested_defaults={
        "hidden_size": 5120, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 40,
        "vocab_size": 202048, "max_position_embeddings": 131072,
    },
    window="layers",
    mixture=Mixture(num_experts=("num_local_experts",), expert_width=("intermediate_size",), sparse_rule="llama4"),
    neutral=_ROUTING_KEYS
    | words("use_qk_norm no_rope_layers no_rope_layer_interval attn_temperature_tuning floor_scale attn_scale "
        "for_llm_compressor"),
)  # fmt: skip

MIXTURE_TYPES: dict[str, ModelType] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "phimoe": replace(
        _MIXTRAL, family="Phi-3.5-MoE", qkv_bias="attention_bias", output_bias="attention_bias",
            head_bias="lm_head_bias",
        norm_bias=True, defaults={"num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
            "sliding_window": None},
    ),
    "olmoe": replace(
        OLMO2, family="OLMoE", defaults={"num_experts": 64, "num_experts_per_tok": 8},
        mixture=Mixture(num_experts=("num_experts",), expert_width=("intermediate_size",)),
            neutral=OLMO2.neutral | _ROUTING_KEYS,
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": replace(
        _GRANITE_MOE, family="Granite MoE with a shared expert",
        mixture=Mixture(num_experts=("num_local_experts",), expert_width=("intermediate_size",),
            shared_width=("shared_intermediate_size",)),
    ),
    "glm4_moe": replace(
        _DEEPSEEK, family="GLM-4.5, GLM-4.6", output_bias=False, mlp_bias=False, qk_norm="use_qk_norm:head",
        mixture=Mixture(num_experts=("n_routed_experts",), num_shared=("n_shared_experts",), router_bias=True,
            sparse_rule="deepseek"),
        neutral=_ROUTING_KEYS | words("num_nextn_predict_layers num_mtp_layers"),
    ),
    "deepseek": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": replace(_DEEPSEEK_V3, family="Kimi-K2"),
    "dbrx": ModelType(
        family="DBRX", hidden_size=("d_model",), num_layers=("n_layers",), num_attention_heads=("n_heads",),
        num_kv_heads=("attn_config.kv_n_heads",), intermediate_size=("ffn_config.ffn_hidden_size",),
            positions=("max_seq_len",),
        mixture=Mixture(num_experts=("ffn_config.moe_num_experts",), experts_per_token=("ffn_config.moe_top_k",),
                        expert_width=("ffn_config.ffn_hidden_size",)),
        neutral=_ROUTING_KEYS | words("attn_config ffn_config attn_config.clip_qkv attn_config.rope_theta "
            "attn_config.attn_pdrop "
                      "attn_config.model_type ffn_config.model_type ffn_config.ffn_act_fn ffn_config.moe_loss_weight "
                      "ffn_config.moe_jitter_eps ffn_config.moe_normalize_expert_weights "
                          "ffn_config.uniform_expert_assignment "
                      "ffn_config.hidden_size"),
    ),
    "llama4_text": _LLAMA4_TEXT,
    "ernie4_5_moe": replace(
        LLAMA, family="ERNIE 4.5 MoE", qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", tied=True,
        defaults={"num_key_value_heads": 4, "moe_k": 6, "moe_num_experts": 64, "moe_num_shared_experts": 2,
                  "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        mixture=Mixture(num_experts=("moe_num_experts",), experts_per_token=("moe_k",),
            num_shared=("moe_num_shared_experts",),
                        router_bias=True, sparse_rule="ernie"),
        neutral=_ROUTING_KEYS | words("compression_ratio num_nextn_predict_layers moe_use_aux_free moe_gate "
            "moe_capacity "
                                      "moe_use_hard_gate moe_group moe_aux_loss_lambda"),
    ),
    "dots1": replace(
        _DEEPSEEK, family="dots.llm1", mlp_bias=False, qk_norm="head", window="layers",
            defaults={"sliding_window": None},
        mixture=Mixture(num_experts=("n_routed_experts",), num_shared=("n_shared_experts",), router_bias=True,
            sparse_rule="deepseek"),
    ),
    "minimax_m2": replace(
        LLAMA, family="MiniMax-M2", qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="full",
        defaults={"head_dim": 128, "num_key_value_heads": 8, "num_experts_per_tok": 8, "num_local_experts": 256},
        mixture=Mixture(num_experts=("num_local_experts",), expert_width=("intermediate_size",), router_bias=True),
        neutral=_ROUTING_KEYS | words("use_qk_norm qk_norm_type use_routing_bias attn_type_list "
            "shared_intermediate_size mtp_transformer_layers "
                                      "num_mtp_modules use_mtp"),
        only={"shared_intermediate_size": (0, None)},
    ),
    "gpt_oss": replace(
        LLAMA, family="gpt-oss", qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias=False,
        attention_sinks=True,
        defaults={"attention_bias": True, "head_dim": 64, "num_key_value_heads": 8, "num_local_experts": 128,
                  "num_experts_per_tok": 4, "sliding_window": 128}, window="layers",
        mixture=Mixture(num_experts=("num_local_experts",), expert_width=("intermediate_size",), router_bias=True,
                        expert_bias=True),
        neutral=_ROUTING_KEYS | words("experts_per_token initial_context_length swiglu_limit"),
    ),
    "qwen3_vl_moe_text": replace(_QWEN3_MOE, family="Qwen3-VL-MoE (text)"),
}  # fmt: skip
