"""Which layers of a model read a window only, and the groups in which vLLM keeps their KV.

vLLM's hybrid KV cache puts as many layers into each group as the kind of attention with the fewest layers has, or the most
where that is not many more (``get_kv_cache_groups``; how many depends on the release): a block holds the tokens of one
group's layers, so blocks of all groups have one size. A window that is longer than any context has groups all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stepcal.errors import InputError, NotModelledError, shown
from stepcal.simulator.versions import NEWEST, RELEASES, release_of
from stepcal.specs.config_values import ConfigValues
from stepcal.specs.model_type import ModelType

if TYPE_CHECKING:
    from stepcal.simulator.config import KvGroup

MOST_WINDOW = 100_000_000
"""Bound far above any model."""
FULL_ATTENTION = frozenset({"full_attention", "global", "attention"})
WINDOWED_ATTENTION = frozenset({"sliding_attention", "chunked_attention", "local", "sliding_window"})
WINDOW_KEYS = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
"""Key of the tokens of a window, by kind."""
FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4, "olmo3": 4}
"""Every so-manieth layer has full attention where the file does not say (transformers' classes)."""
GIVES_NO_WINDOW_TO_ALL = "0.33.0"
"""First recorded release in which no layer has a window where `max_window_layers` says so; those before
give it to all (``is_interleaved``)."""
NO_CHUNK_EVERY = 4
"""The same for Llama 4, whose layers without rotary positions are those without chunks."""


class LayerKind(NamedTuple):
    """Layers of a model that are alike: `kind` and tokens of the `window` as in `KvGroup`, and how many `layers`."""

    kind: str
    window: int
    layers: int


def layers_per_block(kinds: Sequence[LayerKind], vllm_version: str = NEWEST) -> int:
    """Return how many layers' keys and values one block holds, padding included.

    Parameters
    ----------
    kinds : sequence of LayerKind
        In the order in which the model's layers first are of each.
    vllm_version : str
        Release that serves the model.
    """
    fewest, most = min(kind.layers for kind in kinds), max(kind.layers for kind in kinds)
    return most if most < release_of(vllm_version).most_uneven_layers * fewest else fewest


def group_layers(kinds: Sequence[LayerKind], vllm_version: str = NEWEST) -> tuple[KvGroup, ...]:
    """Return the groups that vLLM makes of a model's layers, in its order; windows can be of several kinds and sizes.

    Parameters
    ----------
    kinds : sequence of LayerKind
        In the order in which the model's layers first are of each.
    vllm_version : str
        Release that serves the model.

    Examples
    --------
    >>> layers = [LayerKind("sliding", 1024, 5), LayerKind("full", 0, 4)]
    >>> [[group.layers for group in group_layers(layers, version)] for version in ("0.15.1", "0.33.0")]
    [[3, 2, 4], [5, 4]]
    """
    from stepcal.simulator.config import KvGroup

    size = layers_per_block(kinds, vllm_version)
    groups: list[KvGroup] = []
    for kind, window, layers in kinds:
        n = -(-layers // size)
        groups += (KvGroup(kind, window, layers=len(range(i, layers, n))) for i in range(n))
    return tuple(groups)


@dataclass(frozen=True)
class LayerWindows:
    """The layers of a model that read a window, beside those that read everything.

    Parameters
    ----------
    kind : {"sliding", "chunked"}
    window : int
        Tokens.
    n_windowed, n_full : int
        Layers with and without.
    is_windowed_first : bool
        Whether the model begins with a layer that has one; groups come in this order.
    gone_from : str, optional
        Release of vLLM from which on none of these layers has one.
    """

    kind: str
    window: int
    n_windowed: int
    n_full: int
    is_windowed_first: bool = True
    gone_from: str | None = None

    def served_by(self, vllm_version: str) -> LayerWindows | None:
        """What a release of vLLM makes of them."""
        gone = self.gone_from is not None and RELEASES.index(release_of(vllm_version)) >= RELEASES.index(
            release_of(self.gone_from)
        )
        return None if gone else self

    @property
    def share(self) -> float:
        """Share of the layers that have one."""
        return self.n_windowed / (self.n_windowed + self.n_full)

    def in_cache(self, *, is_hybrid_cache_off: bool) -> LayerWindows | None:
        """What the KV cache knows of the windows: nothing, where all layers are kept as those with full attention."""
        return None if is_hybrid_cache_off and self.n_full else self

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The layers of each kind, in the model's order."""
        windowed, full = LayerKind(self.kind, self.window, self.n_windowed), LayerKind("full", 0, self.n_full)
        if self.n_full == 0:
            return (windowed,)
        return (windowed, full) if self.is_windowed_first else (full, windowed)

    def layers_per_block(self, vllm_version: str = NEWEST) -> int:
        """Layers whose keys and values one block holds, padding included."""
        return layers_per_block(self.kinds, vllm_version)

    def kv_groups(self, vllm_version: str = NEWEST) -> tuple[KvGroup, ...]:
        """The groups of vLLM's KV cache, in its order.

        Examples
        --------
        >>> [group.kind for group in LayerWindows("sliding", 1024, n_windowed=52, n_full=10).kv_groups()].count("sliding")
        6
        """
        return group_layers(self.kinds, vllm_version)


def read_windows(
    kind: ModelType, type_name: str, values: ConfigValues, layers: int, longest: int
) -> LayerWindows | None:
    """Read which layers of a ``config.json`` have a window; None where none has.

    Parameters
    ----------
    kind : ModelType
    type_name : str
    values : ConfigValues
    layers : int
    longest : int
        The server's context limit, or else the model's: a window at least this long never slides, so it does not matter
        if the file does not say which layers have it.

    Raises
    ------
    NotModelledError
        If some layers have a window and it is not said which, or windows are of two kinds.
    InputError
        If `layer_types` does not name every layer.
    """
    types = values.text_list("layer_types")
    other = sorted(set(types) - FULL_ATTENTION - WINDOWED_ATTENTION)
    if other:
        raise NotModelledError(
            f"{values.origin} has layers of type {shown(other[0])} (`layer_types`), which stepcal does not model."
        )
    if types and len(types) != layers:
        raise InputError(f"{values.origin}: `layer_types` names {len(types)} layers, but the model has {layers}.")
    slides = bool(WINDOWED_ATTENTION & set(types)) if types else values.flag("use_sliding_window", True)
    depth = values.optional_whole("max_window_layers", least=0, most=layers * MOST_WINDOW)
    begins_at = depth if not types and "use_sliding_window" in kind.defaults else None  # as Qwen's windows do
    is_switched_off = bool(types) and not values.flag("use_sliding_window", True)
    found = {}
    for name, key in WINDOW_KEYS.items():
        window = values.optional_whole(key, least=-1, most=MOST_WINDOW)
        if window is not None and window > 0 and slides:
            found[name] = window
    placed = {name: _layers_with(name, kind, type_name, values, layers, types) for name in found}
    in_none = begins_at is not None and begins_at >= layers
    if (begins_at == 0 or in_none) and "sliding" in found:
        placed["sliding"] = [True] * layers  # from another layer on, vLLM refuses it
    placed = {name: None if is_switched_off else which for name, which in placed.items() if which != [False] * layers}
    placed = {name: which for name, which in placed.items() if which is not None or found[name] < longest}
    if not placed:
        return None
    name, which = next(iter(placed.items()))
    if found[name] < 2:
        raise NotModelledError(
            f"{values.origin} attends to {found[name]} token at a time (`{WINDOW_KEYS[name]}`): a window has at least 2."
        )
    if which is None or len(placed) > 1:
        raise NotModelledError(
            f"{values.origin} attends to {found[name]} tokens at a time (`{WINDOW_KEYS[name]}`), below the context limit of "
            f"{longest}, in layers that it does not name (`layer_types`), or in two ways: stepcal does not model that. "
            f"A server limited to `max_model_len` <= {found[name]} never slides: pass that."
        )
    gone_from = GIVES_NO_WINDOW_TO_ALL if in_none else None
    return LayerWindows(name, found[name], sum(which), layers - sum(which), which[0], gone_from)


def _layers_with(
    name: str, kind: ModelType, type_name: str, values: ConfigValues, layers: int, types: list[str]
) -> list[bool] | None:
    """Which layers have a window of a kind; None where the file does not say."""
    if types:
        return [t not in FULL_ATTENTION and (t == "chunked_attention") == (name == "chunked") for t in types]
    if name == "chunked":
        rotary = values.whole_list("no_rope_layers") if kind.window else []
        step = values.optional_whole("no_rope_layer_interval", most=MOST_WINDOW) or NO_CHUNK_EVERY
        own = [bool(one) for one in rotary] or [(i + 1) % step > 0 for i in range(layers)]
        return own if kind.window and len(own) == layers else None
    if kind.window == "all":
        return [True] * layers
    pattern = values.raw("sliding_window_pattern") or values.raw("_sliding_window_pattern") or FULL_EVERY.get(type_name)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 1:
        return [(i + 1) % pattern > 0 for i in range(layers)]
    return None
