"""Model types whose ``config.json`` stepcal understands.

A type is listed if vLLM computes it as softmax attention in equal layers, with dense or mixture MLPs. Names and defaults are
those of its configuration class in transformers; a key that no entry knows is refused, because what is not understood may
change what a step costs.
"""

from __future__ import annotations

from stepcal.specs.dense_types import DENSE_TYPES
from stepcal.specs.mixture_types import MIXTURE_TYPES
from stepcal.specs.model_type import ModelType

MODEL_TYPES: dict[str, ModelType] = {**DENSE_TYPES, **MIXTURE_TYPES}
"""Types of language models, by `model_type`."""

MULTIMODAL_TYPES: dict[str, tuple[str, str]] = {
    "llama4": ("Llama 4", "llama4_text"),
    "gemma3": ("Gemma 3 with vision", "gemma3_text"),
    "mistral3": ("Mistral Small 3.1 and later", "mistral"),
    "llava": ("LLaVA", "llama"),
    "llava_next": ("LLaVA-NeXT", "llama"),
    "pixtral": ("Pixtral", "mistral"),
    "paligemma": ("PaliGemma", "gemma"),
    "qwen2_vl": ("Qwen2-VL", "qwen2_vl_text"),
    "qwen2_5_vl": ("Qwen2.5-VL", "qwen2_5_vl_text"),
    "qwen3_vl": ("Qwen3-VL", "qwen3_vl_text"),
    "qwen3_vl_moe": ("Qwen3-VL-MoE", "qwen3_vl_moe_text"),
    "internvl_chat": ("InternVL", "qwen2"),
    "internvl": ("InternVL", "qwen2"),
}
"""Types with a vision tower: family, and the type of the language model if the file does not say."""
