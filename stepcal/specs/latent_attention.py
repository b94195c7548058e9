"""Multi-head latent attention: keys and values of all heads as one narrow vector a token (DeepSeek-V2, arXiv:2405.04434).

Decode multiplies with the latents themselves (the widening matrices are absorbed into queries and outputs); prefill widens
them to keys and values of each head. Both do the same products a token, and read or compute very different attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepcal.errors import InputError

FLOPS_PER_MAC = 2.0


@dataclass(frozen=True)
class LatentProduct:
    """A matrix of the attention: inputs and outputs that every rank has, or that each head has.

    Attributes
    ----------
    columns, depth : float
        Outputs and inputs.
    by : {"none", "columns", "depth"}
        Which of the two counts once a head. A matrix of which neither does lies on every rank.
    """

    columns: float
    depth: float
    by: str = "none"

    def of_heads(self, heads: float) -> tuple[float, float]:
        """Outputs and inputs for some heads."""
        return self.columns * (heads if self.by == "columns" else 1.0), self.depth * (
            heads if self.by == "depth" else 1.0
        )


@dataclass(frozen=True)
class LatentAttention:
    """The widths of latent attention, by their names in ``config.json``.

    Parameters
    ----------
    q_rank : int
        `q_lora_rank`; 0 where queries are projected at once.
    kv_rank : int
        `kv_lora_rank`.
    nope_dim, rope_dim : int
        `qk_nope_head_dim`, `qk_rope_head_dim`: parts of a head's query without and with positions.
    value_dim : int
        `v_head_dim`.

    Raises
    ------
    InputError
        If a width is below 1 (`q_rank`: below 0).
    """

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name, least in (("q_rank", 0), ("kv_rank", 1), ("nope_dim", 1), ("rope_dim", 1), ("value_dim", 1)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` of latent attention is {getattr(self, name)}; it must be at least {least}.")

    @property
    def query_dim(self) -> int:
        """Width of a head's query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def latent_width(self) -> int:
        """Elements of a token in the KV cache of a layer, on every rank: the latent, and the key with positions."""
        return self.kv_rank + self.rope_dim

    @property
    def decode_flops_per_head(self) -> float:
        """FLOPs of a head and token of context in decode: scores against the latent, and its weighted sum."""
        return FLOPS_PER_MAC * (self.latent_width + self.kv_rank)

    @property
    def prefill_flops_per_head(self) -> float:
        """FLOPs of a head and query-context pair in prefill, on widened keys and values."""
        return FLOPS_PER_MAC * (self.query_dim + self.value_dim)

    @property
    def prefill_width(self) -> int:
        """Elements of a head that prefill moves for a token: query, key, value and output."""
        return 2 * (self.query_dim + self.value_dim)

    def products(self, hidden: int, *, absorbed: bool) -> tuple[LatentProduct, ...]:
        """The matrix products of a layer's attention.

        Parameters
        ----------
        hidden : int
        absorbed : bool
            Whether the widening matrices are multiplied with queries and outputs (decode) or with latents (prefill).

        Examples
        --------
        >>> v3 = LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
        >>> sum(c * d for c, d in (p.of_heads(128) for p in v3.products(7168, absorbed=True)))
        187105280.0
        """
        down = LatentProduct(self.q_rank + self.latent_width, hidden)
        queries = LatentProduct(self.query_dim, self.q_rank or hidden, by="columns")
        out = LatentProduct(hidden, self.value_dim, by="depth")
        if absorbed:
            keys = LatentProduct(self.kv_rank, self.nope_dim, by="columns")
            values = LatentProduct(self.value_dim, self.kv_rank, by="columns")
            return down, queries, keys, values, out
        return down, queries, LatentProduct(self.nope_dim + self.value_dim, self.kv_rank, by="columns"), out

    def elements(self, hidden: int, heads: float) -> float:
        """Weights of a layer's attention for some heads, without norms."""
        return sum(c * d for c, d in (p.of_heads(heads) for p in self.products(hidden, absorbed=False)))
