"""Reads the ``config.json`` of a HuggingFace checkpoint into the dimensions of an architecture.

What is known is accepted: the `model_type` must be in the table of `model_types`, and every key must be one that is read or
that changes nothing of what a step costs. All else is refused by what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepcal.errors import InputError, NotModelledError, shown
from stepcal.specs.config_keys import HINTS, MUST_BE_OFF, NEUTRAL_KEYS, REFUSED_TYPES, VISION_KEYS
from stepcal.specs.config_values import ConfigValues
from stepcal.specs.latent_attention import LatentAttention
from stepcal.specs.layer_windows import read_windows
from stepcal.specs.model_type import Mixture, ModelType, words
from stepcal.specs.model_types import MODEL_TYPES, MULTIMODAL_TYPES
from stepcal.specs.weight_formats import read_weight_format

MOST_LAYERS = 1_000
MOST_HEADS = 10_000
MOST_WIDTH = 10_000_000
MOST_VOCABULARY = 100_000_000
"""Bounds far above any model: beyond them a file is corrupt, and its numbers would overflow."""
UNSTATED_POSITIONS = 2_048
"""vLLM's context limit where the file has none (``ModelConfig``, `default_max_len`)."""
ARCHITECTURE_TYPES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "FalconForCausalLM": "falcon",
    "GemmaForCausalLM": "gemma", "Phi3ForCausalLM": "phi3", "OPTForCausalLM": "opt", "BloomForCausalLM": "bloom",
}  # fmt: skip
"""Types of files that name their class but no `model_type`."""
USUAL_KEYS = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings", "word_embed_proj_dim": "hidden_size",
}  # fmt: skip
"""Keys that people write for any type."""
SPARSE_KEYS = words(
    "decoder_sparse_step mlp_only_layers first_k_dense_replace moe_layer_freq moe_layers interleave_moe_layer_step "
    "intermediate_size_mlp num_experts_per_tok moe_intermediate_size n_shared_experts"
)
"""Keys that say which layers are mixtures; which of them counts depends on the others."""
VISION_LEFT_OUT = "Weights and work of the vision tower are left out: only the language model is counted."
MTP_LEFT_OUT = "Layers for multi-token prediction are left out: vLLM loads them for speculative decoding only."


def read_fields(config: Mapping[str, Any], origin: str, max_model_len: int | None = None) -> dict[str, Any]:
    """Return the arguments of `ModelArchitecture`, all but its name.

    Parameters
    ----------
    config : mapping
        The parsed file.
    origin : str
        What errors call the file.
    max_model_len : int, optional
        The server's context limit. A window at least this long never slides, so it does not matter which
        layers have it.

    Raises
    ------
    NotModelledError
        If the type, or a key that has a value, stands for a computation that is not modelled or not known.
    InputError
        If a dimension is missing, of the wrong kind, or out of bounds.
    """
    type_name, kind, values, notes = _language_model(config, origin)
    _refuse_what_is_off(kind, values)
    hidden = values.whole(*kind.hidden_size, most=MOST_WIDTH)
    layers = values.whole(*kind.num_layers, most=MOST_LAYERS)
    heads = values.whole(*kind.num_attention_heads, most=MOST_HEADS)
    latent = _latent(values) if kind.latent else None
    kv_heads = heads if latent is not None else _kv_heads(kind, values, heads)
    head_dim = None if latent is None else latent.query_dim
    head_dim = head_dim or values.optional_whole(*kind.head_dim, most=MOST_WIDTH) or _divided(hidden, heads, values)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "latent": latent,
        "vocab_size": values.whole(*kind.vocab_size, most=MOST_VOCABULARY),
        "mlp_matrices": 3 if kind.gated else 2,
        "attention_bias": values.switch(kind.qkv_bias),
        "tie_word_embeddings": values.flag("tie_word_embeddings", kind.tied),
        "max_position_embeddings": _context_limit(kind, values, type_name),
        **_mlp(kind, values, hidden, layers),
    }
    fields["positions_are_stated"] = values.optional_whole(*kind.positions, most=MOST_VOCABULARY) is not None
    fields["other_parameters"] = _other_parameters(kind, values, fields)
    longest = max_model_len or fields["max_position_embeddings"]
    fields["windows"] = read_windows(kind, type_name, values, layers, longest)
    _check_allowed(kind, values)
    if values.optional_number("num_nextn_predict_layers") or values.optional_number("num_mtp_modules"):
        notes.append(MTP_LEFT_OUT)
    _accept_repeated(values, fields)
    _refuse_unknown(kind, type_name, values)
    fields |= read_weight_format(config, values, origin, layers=layers, is_mixture=fields.get("num_experts", 1) > 1)
    if latent is not None and fields["weight_dtype"] == "fp8" and _is_block_scaled(config):
        fields["weight_dtype"] = "fp8_block"
    return {**fields, "notes": tuple(notes)}


def _language_model(config: Mapping[str, Any], origin: str) -> tuple[str, ModelType, ConfigValues, list[str]]:
    """The type's name and entry, the values of the language model, and what was left out."""
    type_name = _type_name(config, origin)
    if type_name in REFUSED_TYPES:
        raise NotModelledError(
            f"{origin} is of `model_type: {type_name}`: {REFUSED_TYPES[type_name]}, which stepcal does not model. Use a "
            "model with softmax attention in equal layers."
        )
    nested = next((config[k] for k in ("text_config", "llm_config") if isinstance(config.get(k), Mapping)), None)
    if type_name in MULTIMODAL_TYPES or (nested is not None and type_name in MODEL_TYPES):
        default = MULTIMODAL_TYPES[type_name][1] if type_name in MULTIMODAL_TYPES else type_name
        return _nested_model(config, nested, default, origin)
    if type_name not in MODEL_TYPES:
        hint = _hint_of(config)
        raise NotModelledError(
            f"{origin} is of `model_type: {type_name[:80]}`, which stepcal does not know{hint}. Types it knows: "
            f"{', '.join(sorted(MODEL_TYPES))}."
        )
    kind = MODEL_TYPES[type_name]
    return type_name, kind, ConfigValues(config, origin, kind.defaults), []


def _nested_model(
    config: Mapping[str, Any], nested: Mapping[str, Any] | None, default: str, origin: str
) -> tuple[str, ModelType, ConfigValues, list[str]]:
    """The language model of a multimodal checkpoint, which lies in a section of its own or beside the tower's."""
    own = default if nested is None else str(nested.get("model_type") or default)
    own = default if own not in MODEL_TYPES and own not in REFUSED_TYPES and nested is None else own
    if own in REFUSED_TYPES or own not in MODEL_TYPES:
        what = REFUSED_TYPES.get(own, "a type that stepcal does not know")
        raise NotModelledError(f"{origin}: its language model is of `model_type: {own[:80]}`: {what}.")
    kind = MODEL_TYPES[own]
    outer = {k: v for k, v in config.items() if k not in ("text_config", "llm_config")}
    if nested is None:
        return own, kind, ConfigValues(outer, origin, kind.defaults, silent=VISION_KEYS), [VISION_LEFT_OUT]
    # Only what belongs to the whole checkpoint is taken from outside; the rest of it describes the tower.
    shared = {k: outer[k] for k in ("tie_word_embeddings",) if k in outer and k not in nested}
    defaults = {**kind.nested_defaults, **kind.defaults}
    stray = sorted(k for k in outer if k not in NEUTRAL_KEYS and k not in VISION_KEYS and k in MUST_BE_OFF and outer[k])
    if stray:
        raise NotModelledError(f"{origin} has {MUST_BE_OFF[stray[0]]} (`{stray[0]}`), which stepcal does not model.")
    notes = [VISION_LEFT_OUT] if any("vision" in k or "visual" in k for k in outer) else []
    return own, kind, ConfigValues({**shared, **nested}, origin, defaults, silent=VISION_KEYS), notes


def _type_name(config: Mapping[str, Any], origin: str) -> str:
    name = config.get("model_type")
    classes = config.get("architectures")
    if name is None and isinstance(classes, list) and classes and isinstance(classes[0], str):
        name = ARCHITECTURE_TYPES.get(classes[0])
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{origin} lacks `model_type` (found {shown(config.get('model_type'))}): it does not look like a transformer's "
            "config.json. Names and defaults of its keys depend on it; add it, as in the model's own file."
        )
    return name


def _hint_of(config: Mapping[str, Any]) -> str:
    """What the keys of an unknown type let expect."""
    for key, value in config.items():
        if value and key in MUST_BE_OFF:
            return f" (`{key}` says: {MUST_BE_OFF[key]})"
    return next((f" (`{k[:80]}` hints at {w})" for k in config if (w := _meaning(k)) and k not in NEUTRAL_KEYS), "")


def _meaning(key: str) -> str:
    return next((what for words, what in HINTS if any(word in key for word in words)), "")


def _refuse_what_is_off(kind: ModelType, values: ConfigValues) -> None:
    for key, what in MUST_BE_OFF.items():
        if not values.is_neutral(key) and key not in kind.neutral:
            raise NotModelledError(
                f"{values.origin} declares {what} (`{key}: {shown(values.raw(key))}`), which stepcal does not model. Use a "
                "model with softmax attention in equal layers."
            )


def _refuse_unknown(kind: ModelType, type_name: str, values: ConfigValues) -> None:
    sparse_keys = SPARSE_KEYS if kind.mixture is not None else frozenset()
    for key in values.unread(NEUTRAL_KEYS | kind.neutral | sparse_keys):
        meaning = _meaning(key)
        raise NotModelledError(
            f"{values.origin} has `{key[:80]}: {shown(values.raw(key))}`, which stepcal does not know of `{type_name}`"
            f"{f' and which looks like {meaning}' if meaning else ''}. It may change what a step costs; remove it if it "
            "does not."
        )


def _accept_repeated(values: ConfigValues, fields: Mapping[str, Any]) -> None:
    """Accept a dimension under its usual key beside the type's own, if both say the same."""
    for key, ours in USUAL_KEYS.items():
        if values.is_unread(key) and values.raw(key) is not None and values.raw(key) != fields[ours]:
            raise InputError(
                f"{values.origin}: `{key}` is {shown(values.raw(key))}, but {fields[ours]} by the other keys of its type. "
                "Keep the one that holds."
            )


def _check_allowed(kind: ModelType, values: ConfigValues) -> None:
    for key, allowed in kind.only.items():
        value = values.raw(key)
        if value not in allowed or (isinstance(value, int) and isinstance(value, bool) != isinstance(allowed[0], bool)):
            if value is None and None in allowed:
                continue
            raise NotModelledError(
                f"{values.origin} has `{key}: {shown(value)}`; stepcal models "
                f"{' or '.join(f'`{a}`' for a in allowed if a is not None)} only."
            )


def _divided(hidden: int, heads: int, values: ConfigValues) -> int:
    if hidden % heads:
        raise InputError(
            f"{values.origin}: the hidden size {hidden} is no multiple of the {heads} attention heads, and there is no "
            "`head_dim`. One of the two is wrong."
        )
    return hidden // heads


def _kv_heads(kind: ModelType, values: ConfigValues, heads: int) -> int:
    """Heads of keys and values, by the type's own rule where no key says."""
    given = values.optional_whole(*kind.num_kv_heads, most=MOST_WIDTH)
    if kind.kv_rule == "falcon":
        if values.flag("new_decoder_architecture", False):
            return given or heads
        return 1 if values.flag("multi_query", True) else (given or heads)
    if kind.kv_rule == "multi_query":
        return 1 if values.flag("multi_query", True) else heads
    if kind.kv_rule == "chatglm":
        return (given or heads) if values.flag("multi_query_attention", False) else heads
    if kind.kv_rule == "mpt" and values.raw("attn_config.attn_type") == "multiquery_attention":
        return 1
    return given or heads


def _latent(values: ConfigValues) -> LatentAttention:
    """Widths of latent attention. A key of the usual attention beside them says nothing more."""
    for key in ("head_dim", "qk_head_dim", "num_key_value_heads"):
        values.raw(key)
    return LatentAttention(
        q_rank=values.optional_whole("q_lora_rank", least=0, most=MOST_WIDTH) or 0,
        kv_rank=values.whole("kv_lora_rank", most=MOST_WIDTH),
        nope_dim=values.whole("qk_nope_head_dim", most=MOST_WIDTH),
        rope_dim=values.whole("qk_rope_head_dim", most=MOST_WIDTH),
        value_dim=values.whole("v_head_dim", most=MOST_WIDTH),
    )


def _is_block_scaled(config: Mapping[str, Any]) -> bool:
    section = config.get("quantization_config")
    return isinstance(section, Mapping) and bool(section.get("weight_block_size"))


def _mlp(kind: ModelType, values: ConfigValues, hidden: int, layers: int) -> dict[str, int]:
    """Dense and expert widths, and how many layers are mixtures."""
    given = values.optional_whole(*kind.intermediate_size, most=MOST_WIDTH)
    multiple = values.optional_whole("expansion_ratio", most=MOST_WIDTH) or kind.hidden_multiple
    if given is None and multiple is None:
        raise values.missing(kind.intermediate_size[0])
    width = int(kind.width_factor * given) if given is not None else hidden * int(multiple or 0)
    mixture = kind.mixture
    experts = None if mixture is None else values.optional_whole(*mixture.num_experts, most=MOST_WIDTH)
    if mixture is not None and experts is None and mixture.sparse_rule != "deepseek":
        raise values.missing(mixture.num_experts[0])
    if mixture is None or experts is None or experts == 1:
        return {"intermediate_size": width, "expert_intermediate_size": width}
    visited = values.whole(*mixture.experts_per_token, most=MOST_WIDTH)
    expert_width = values.optional_whole(*mixture.expert_width, most=MOST_WIDTH) or width
    shared = values.optional_whole(*mixture.shared_width, least=0, most=MOST_WIDTH) or 0
    shared += (values.optional_whole(*mixture.num_shared, least=0, most=MOST_WIDTH) or 0) * expert_width
    if mixture.sparse_rule == "llama4":
        # Llama 4 always has one shared expert, and keeps the dense layers' width under a name of its own.
        shared, expert_width = width, width
        width = values.optional_whole("intermediate_size_mlp", most=MOST_WIDTH) or width
    return {
        "intermediate_size": width,
        "num_experts": experts,
        "experts_per_token": visited,
        "expert_intermediate_size": expert_width,
        "shared_expert_intermediate_size": shared,
        "num_moe_layers": len(_sparse_layers(mixture, values, layers)),
    }


def _sparse_layers(mixture: Mixture, values: ConfigValues, layers: int) -> set[int]:
    """Which layers are mixtures."""
    if mixture.sparse_rule == "qwen":
        step = values.optional_whole("decoder_sparse_step", most=MOST_LAYERS) or 1
        dense = set(values.whole_list("mlp_only_layers"))
        return {layer for layer in range(layers) if (layer + 1) % step == 0} - dense
    if mixture.sparse_rule == "deepseek":
        first = values.optional_whole("first_k_dense_replace", least=0, most=layers) or 0
        return {layer for layer in range(first, layers) if _has_frequency(values, layer)}
    if mixture.sparse_rule == "llama4":
        if values.raw("moe_layers") is not None:
            return set(values.whole_list("moe_layers")) & set(range(layers))
        step = values.optional_whole("interleave_moe_layer_step", most=MOST_LAYERS) or 1
        return set(range(step - 1, layers, step))
    if mixture.sparse_rule == "ernie":
        first = values.optional_whole("moe_layer_start_index", least=0, most=MOST_LAYERS) or 0
        last = values.optional_whole("moe_layer_end_index", least=-1, most=MOST_LAYERS)
        step = values.optional_whole("moe_layer_interval", most=MOST_LAYERS) or 1
        end = layers if last in (None, -1) else min(int(last) + 1, layers)
        return {layer for layer in range(first, end) if (layer + 1) % step == 0}
    return set(range(layers))


def _has_frequency(values: ConfigValues, layer: int) -> bool:
    """Whether DeepSeek's `moe_layer_freq`, a number or a list with a switch a layer, makes a layer a mixture."""
    frequency = values.raw("moe_layer_freq")
    if isinstance(frequency, list):
        switches = values.whole_list("moe_layer_freq")
        return layer < len(switches) and bool(switches[layer])
    return layer % (values.optional_whole("moe_layer_freq", most=MOST_LAYERS) or 1) == 0


def _other_parameters(kind: ModelType, values: ConfigValues, sizes: Mapping[str, Any]) -> int:
    """Weights outside the matrices of `ModelArchitecture.num_parameters`: norms, biases, position tables, gates."""
    hidden, layers, head_dim = sizes["hidden_size"], sizes["num_layers"], sizes["head_dim"]
    query, kv = sizes["num_attention_heads"] * head_dim, sizes["num_kv_heads"] * head_dim
    vectors = 2 if values.switch(kind.norm_bias) else 1
    norms = kind.norms_per_layer
    if kind.kv_rule == "falcon" and not values.flag("new_decoder_architecture", False):
        norms = 1 if values.flag("parallel_attn", True) else 2
    elif kind.kv_rule == "falcon":
        norms = values.optional_whole("num_ln_in_parallel_attn", most=2) or 2
    layer = norms * vectors * hidden
    layer += (query + 2 * kv) * values.switch(kind.qkv_bias) + hidden * values.switch(kind.output_bias)
    if sizes["latent"] is not None:
        layer = norms * vectors * hidden + sizes["latent"].q_rank + sizes["latent"].kv_rank
    key, _, qk_norm = kind.qk_norm.rpartition(":")
    if qk_norm and (not key or values.flag(key, False)):
        layer += 2 * head_dim if qk_norm == "head" else query + kv
    dense = sizes["intermediate_size"] * (sizes["mlp_matrices"] - 1) + hidden
    sparse_layers = sizes.get("num_moe_layers", 0)
    total = layers * layer + (layers - sparse_layers) * dense * values.switch(kind.mlp_bias)
    if kind.mixture is not None and sparse_layers:
        gate = hidden if kind.mixture.shared_gate and sizes["shared_expert_intermediate_size"] else 0
        own = (sizes["mlp_matrices"] - 1) * sizes["expert_intermediate_size"] + hidden
        biases = sizes["num_experts"] * (kind.mixture.router_bias + own * kind.mixture.expert_bias)
        total += sparse_layers * (gate + biases)
    total += layers * sizes["num_attention_heads"] * kind.attention_sinks
    total += kind.end_norms * vectors * hidden
    if kind.learned_positions is not None:
        total += (sizes["max_position_embeddings"] + kind.learned_positions) * hidden
    return int(total + sizes["vocab_size"] * values.switch(kind.head_bias))


def _context_limit(kind: ModelType, values: ConfigValues, type_name: str) -> int:
    """Context limit, as vLLM derives it: positions by the scaling of rotary embeddings."""
    stated = values.optional_whole(*kind.positions, most=MOST_VOCABULARY) or UNSTATED_POSITIONS
    scaling = values.raw("rope_scaling") or values.raw("rope_parameters")
    if not isinstance(scaling, Mapping) or "gemma3" in type_name:
        return stated
    rope = str(scaling.get("rope_type") or scaling.get("type") or "default")
    original = scaling.get("original_max_position_embeddings")
    if rope in ("longrope", "su"):
        return values.optional_whole("original_max_position_embeddings", most=MOST_VOCABULARY) or stated
    factor = scaling.get("factor")
    if rope in ("default", "llama3", "mrope") or isinstance(factor, bool) or not isinstance(factor, int | float):
        return stated
    base = original if rope == "yarn" and isinstance(original, int) and not isinstance(original, bool) else stated
    scaled = base * float(factor)
    return int(scaled) if 1 <= scaled <= MOST_VOCABULARY else stated
