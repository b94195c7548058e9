"""Keys of a ``config.json`` of any type: those that cost nothing, those that must be off, types that are refused."""

from __future__ import annotations

from stepcal.specs.model_type import words

NEUTRAL_KEYS = words(
    # Identity, tokens, training and generation: nothing that a step computes.
    "architectures model_type _name_or_path name_or_path transformers_version auto_map torch_dtype dtype "
    "tokenizer_class "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id eod_token_id bos_token "
    "eos_token pad_token use_cache initializer_range initializer_factor init_std init_method _commit_hash "
    "_attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled use_flash_attn "
    "use_flash_attn_2 "
    "use_flash_attention pretraining_tp use_bfloat16 bf16 fp16 fp32 gradient_checkpointing return_dict "
    "output_hidden_states output_attentions torchscript id2label label2id num_labels problem_type "
    "task_specific_params "
    "prefix max_length min_length do_sample temperature top_k top_p repetition_penalty num_beams early_stopping "
    "length_penalty no_repeat_ngram_size chunk_size_feed_forward tokenizer_model unsloth_version unsloth_fixed "
    "unsloth_tiled_mlp model_name language languages license onnx transformers.js_config quantization_config "
    "compression_config is_decoder seed use_reentrant is_llama_config output_past pad_key_length tokenizer_name "
    "onnx_safe "
    "model_max_length attention_probs_dropout_prob attn_dropout_prob emb_dropout_prob verbose "
    # Activations and norms: work of the order of the hidden size.
    "hidden_act hidden_activation activation_function activation rms_norm_eps layer_norm_eps layer_norm_epsilon "
    "norm_eps norm_epsilon epsilon layernorm_epsilon attention_dropout attn_dropout attn_pdrop hidden_dropout "
    "hidden_dropout_prob residual_dropout resid_pdrop embd_pdrop emb_pdrop embedding_dropout dropout "
    "classifier_dropout activation_dropout ffn_dropout attn_logit_softcapping final_logit_softcapping "
    "attention_softmax_in_fp32 "
    "scale_attention_softmax_in_fp32 scale_attn_weights softmax_scale logit_scale "
    # Rotary positions: element-wise; what they say of the context limit is read.
    "rope_theta rope_scaling rope_parameters rotary_pct rotary_emb_base rotary_dim partial_rotary_factor rope_ratio "
    "rope_local_base_freq rope_type rope original_max_position_embeddings rope_interleave rope_interleaved rotary "
    "rotary_percent rope_pct rotary_percentage rotary_scaling_factor position_embedding_type"
)
"""Keys that change nothing of what a step costs, in any type."""

MUST_BE_OFF = {
    "is_encoder_decoder": "an encoder beside the decoder",
    "add_cross_attention": "cross-attention layers",
    "cross_attention_layers": "cross-attention layers",
    "cross_attention_hidden_size": "cross-attention layers",
    "tie_encoder_decoder": "an encoder beside the decoder",
    "block_configs": "layers that differ from each other",
    "block_types": "recurrent layers",
    "_block_types": "recurrent layers",
    "hybrid_override_pattern": "layers of state-space models beside attention",
    "layers_block_type": "layers of state-space models beside attention",
    "attn_layer_period": "layers of state-space models beside attention",
    "attn_layer_indices": "layers of state-space models beside attention",
    "full_attn_idxs": "convolution layers beside attention",
    "attn_type_list": "linear attention",
    "full_attention_interval": "linear attention",
    "kv_lora_rank": "multi-head latent attention in a type that is not known for it",
    "q_lora_rank": "multi-head latent attention in a type that is not known for it",
    "index_topk": "sparse attention with an indexer",
    "index_n_heads": "sparse attention with an indexer",
    "num_kv_shared_layers": "layers that share keys and values",
    "cla_share_factor": "layers that share keys and values",
    "use_cla": "layers that share keys and values",
    "sparse_attention_config": "block-sparse attention",
    "blocksparse_block_size": "block-sparse attention",
    "moa_config": "a mixture of attentions",
    "pruned_heads": "pruned heads",
}
"""Keys of computations that stepcal does not model, by what they are."""

HINTS = (
    (("mamba", "ssm", "state_size", "d_state", "d_conv", "conv_"), "state-space layers"),
    (("recurrent", "lru_width", "rwkv", "attention_window_size"), "recurrent layers"),
    (("linear_", "lightning", "delta", "retention", "full_attn"), "linear attention"),
    (("cross_attention", "cross_attn", "encoder"), "cross-attention or an encoder"),
    (
        ("block_config", "per_layer", "layer_pattern", "layers_pattern", "layer_config"),
        "layers that differ from each other",
    ),
    (("lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), "multi-head latent attention"),
    (("sparse", "index_"), "sparse attention"),
    (("window", "chunk"), "attention within a window"),
    (("expert", "moe", "router"), "a mixture of experts"),
    (("vision", "visual", "image", "audio", "video", "projector"), "inputs other than text"),
    (("mtp", "nextn", "medusa", "eagle"), "layers for speculative decoding"),
)
"""Words in a key that stepcal does not know, and what they are likely to mean."""

VISION_KEYS = words(
    "vision_config visual vision_tower mm_vision_tower audio_config image_token_id image_token_index image_token "
    "video_token_id "
    "video_token_index vision_token_id vision_start_token_id vision_end_token_id vision_feature_layer "
    "vision_feature_select_strategy "
    "boi_token_index eoi_token_index boi_token_id eoi_token_id boi_token eoi_token image_seq_length "
    "mm_tokens_per_image projector_hidden_act "
    "multimodal_projector_bias spatial_merge_size projector_config image_grid_pinpoints use_image_newline_parameter "
    "tie_word_embeddings ignore_index text_config vision_soft_tokens_per_image"
)
"""Keys of a multimodal checkpoint that speak of its tower."""

REFUSED_TYPES: dict[str, str] = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "state-space layers instead of attention"),
    **dict.fromkeys(
        ("jamba", "bamba", "falcon_h1", "nemotron_h", "zamba", "zamba2", "granitemoehybrid", "plamo2", "hymba"),
        "state-space layers beside attention",
    ),
    **dict.fromkeys(("rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm", "retnet"), "recurrent layers instead of attention"),
    **dict.fromkeys(("recurrent_gemma", "griffin"), "recurrent layers beside attention"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "minimax", "minimax_text_01", "minimax_m1",
            "kimi_linear",
         "bailing_hybrid", "olmo_hybrid", "ring_linear"),
        "linear attention beside full attention",
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), "convolution layers beside attention"),
    **dict.fromkeys(
        ("minicpm3", "glm4_moe_lite", "mistral4", "kimi_k25", "deepseek_vl_v2"),
        "multi-head latent attention in a model whose parameters were not checked",
    ),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"), "multi-head latent attention with an indexer that reads a part of the context",
    ),
    **dict.fromkeys(
        ("longcat_flash",), "two latent attentions a layer, and experts that do nothing",
    ),
    **dict.fromkeys(("nemotron-nas", "deci"), "layers that differ from each other (a searched architecture)"),
    **dict.fromkeys(("openelm",), "layers of different widths"),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), "layers that share keys and values"),
    **dict.fromkeys(("phi3small",), "block-sparse attention"),
    **dict.fromkeys(("mllama", "mllama_text_model", "idefics"), "cross-attention layers"),
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "t5gemma", "bart", "mbart", "pegasus", "m2m_100", "whisper", "switch_transformers",
            "nllb_moe"),
        "an encoder beside the decoder",
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "modernbert", "deberta-v2", "electra"), "an encoder, which "
        "does not generate"),
    **dict.fromkeys(("jetmoe",), "a mixture of attention heads"),
}  # fmt: skip
"""Types that stepcal knows and does not model, by what they are."""
