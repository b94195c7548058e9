"""What a `model_type` says that its ``config.json`` does not: names of keys, defaults, and which matrices a layer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a type names its experts.

    Attributes
    ----------
    num_experts, experts_per_token, expert_width : tuple of str
    shared_width : tuple of str
        Summed width of the experts that every token visits.
    num_shared : tuple of str
        Number of such experts, each as wide as a routed one.
    shared_gate : bool
        Whether a gate scales the shared expert.
    router_bias : bool
        Whether the router has a bias or a correction for each expert.
    expert_bias : bool
        Whether each matrix of an expert has a bias.
    sparse_rule : str
        Which layers are mixtures: ``all``, ``qwen``, ``deepseek``, ``llama4`` or ``ernie``.
    """

    num_experts: Names
    experts_per_token: Names = ("num_experts_per_tok",)
    expert_width: Names = ("moe_intermediate_size",)
    shared_width: Names = ()
    num_shared: Names = ()
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    sparse_rule: str = "all"


@dataclass(frozen=True, kw_only=True)
class ModelType:
    """One `model_type`.

    Attributes
    ----------
    family : str
        What people call the models.
    hidden_size, num_layers, num_attention_heads, num_kv_heads, intermediate_size, vocab_size, positions : tuple of str
        Keys of a dimension, the first that is there counts. A dot leads into a section (``attn_config.kv_n_heads``).
    kv_rule : str
        How heads share keys and values where no key says: ``all`` (none share), ``multi_query``, ``falcon``, ``chatglm``.
    defaults : mapping of str to Any
        What the type's configuration class takes for a key that is absent.
    nested_defaults : mapping of str to Any
        The same inside ``text_config``, where transformers leaves out what equals the class's default.
    width_factor : float
        `intermediate_size` as multiple of the key's value (Qwen writes twice the width).
    gated : bool
        Whether the MLP has three matrices (gate, up, down) or two.
    tied : bool
        Whether the output matrix is the embedding where the file does not say.
    qkv_bias, output_bias, mlp_bias, head_bias, norm_bias : bool or str
        Whether there are biases; a string is the key that says (negated with a leading ``!``).
    norms_per_layer, end_norms : int
        Vectors of the hidden size.
    qk_norm : str
        Norms of queries and keys: none, ``head`` (one head wide) or ``full``; ``KEY:kind`` where a key switches it.
    latent : bool
        Whether attention is latent (MLA).
    attention_sinks : bool
        Whether each head has a learned logit beside those of its context.
    learned_positions : int or None
        Rows of the position table beyond the context limit; None without a table.
    window : str
        ``all``, or ``layers`` where only some layers have a window; empty if the type has none.
    mixture : Mixture or None
    neutral : frozenset of str
        Further keys that change nothing of what a step costs.
    only : mapping of str to tuple
        Keys that may only have these values, as others change the computation.
    text_model_type : str
        Of a multimodal type, the type of its language model if the file does not say.
    """

    family: str
    hidden_size: Names = ("hidden_size",)
    num_layers: Names = ("num_hidden_layers",)
    num_attention_heads: Names = ("num_attention_heads",)
    num_kv_heads: Names = ("num_key_value_heads",)
    head_dim: Names = ("head_dim",)
    intermediate_size: Names = ("intermediate_size",)
    vocab_size: Names = ("vocab_size",)
    positions: Names = ("max_position_embeddings",)
    kv_rule: str = "all"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    nested_defaults: Mapping[str, Any] = field(default_factory=dict)
    width_factor: float = 1.0
    hidden_multiple: int | None = None
    gated: bool = True
    tied: bool = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    norm_bias: bool | str = False
    norms_per_layer: int = 2
    end_norms: int = 1
    qk_norm: str = ""
    latent: bool = False
    attention_sinks: bool = False
    learned_positions: int | None = None
    window: str = ""
    mixture: Mixture | None = None
    neutral: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    text_model_type: str = ""


def words(text: str) -> frozenset[str]:
    """Return the words of a text, as a set of keys."""
    return frozenset(text.split())
