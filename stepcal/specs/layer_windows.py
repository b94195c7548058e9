"""Which layers of a model read a window only, and the groups in which vLLM keeps their KV.

vLLM's hybrid KV cache puts as many layers into each group as the kind of attention with the fewest layers has, or the
other kind where that has less than half as many more (``get_kv_cache_groups``, 0.33.0): a block holds the tokens of one
group's layers, so blocks of all groups have one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcal.documents import read_json
from stepcal.simulator.config import KvGroup
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.step_work import kv_bytes_per_token

MOST_UNEVEN = 1.5
"""Below this quotient of layers, groups take the larger number and the smaller kind is padded (vLLM's heuristic)."""
GEMMA_PATTERNS = {"gemma2": 2, "gemma3_text": 6}
"""Every so-manieth layer has full attention where the file does not say (transformers' classes)."""


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
    """

    kind: str
    window: int
    n_windowed: int
    n_full: int
    is_windowed_first: bool = True

    @property
    def layers_per_block(self) -> int:
        """Layers whose keys and values one block holds, padding included."""
        if self.n_full == 0:
            return self.n_windowed
        fewest, most = sorted((self.n_windowed, self.n_full))
        return most if most < MOST_UNEVEN * fewest else fewest

    def kv_groups(self) -> tuple[KvGroup, ...]:
        """The groups of vLLM's KV cache, in its order.

        Examples
        --------
        >>> [group.kind for group in LayerWindows("sliding", 1024, n_windowed=52, n_full=10).kv_groups()].count("sliding")
        6
        """
        windowed = _groups(self.kind, self.window, self.n_windowed, self.layers_per_block)
        full = _groups("full", 0, self.n_full, self.layers_per_block)
        return windowed + full if self.is_windowed_first else full + windowed

    def kv_block_bytes(
        self, architecture: ModelArchitecture, *, tensor_parallel: int = 1, block_size: int = 16
    ) -> float:
        """Bytes of a KV block on a rank: what vLLM divides the memory for KV by."""
        of_a_layer = kv_bytes_per_token(architecture, tensor_parallel=tensor_parallel) / architecture.num_layers
        return block_size * self.layers_per_block * of_a_layer


def _groups(kind: str, window: int, n_layers: int, size: int) -> tuple[KvGroup, ...]:
    n = -(-n_layers // size)
    return tuple(KvGroup(kind, window, layers=len(range(i, n_layers, n))) for i in range(n))


def read_layer_windows(config: Mapping[str, Any] | str | Path, max_model_len: int) -> LayerWindows | None:
    """The windows of a model whose ``config.json`` says which layers have one; None where none slides.

    Read from `layer_types`, or from the pattern of Gemma 2 and 3. Whatever else has a window is left to
    `ModelArchitecture.from_config`, which refuses it.

    Parameters
    ----------
    config : mapping, str or Path
        The parsed file, or its path; the name of a model that ships has no windows.
    max_model_len : int
        The server's context limit; a window at least this long never slides.
    """
    if not isinstance(config, Mapping):
        if not Path(config).is_file():
            return None
        config = read_json(Path(config))
        if not isinstance(config, Mapping):
            return None
    nested = config.get("text_config")
    values = nested if isinstance(nested, Mapping) else config
    types, layers = values.get("layer_types"), values.get("num_hidden_layers")
    pattern = values.get("sliding_window_pattern") or GEMMA_PATTERNS.get(str(values.get("model_type")))
    if not isinstance(types, list) and isinstance(layers, int) and isinstance(pattern, int) and pattern > 1:
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        return None
    kinds = {
        "sliding_attention": ("sliding", "sliding_window"),
        "chunked_attention": ("chunked", "attention_chunk_size"),
    }
    found = {name for name in types if name in kinds}
    if len(found) != 1 or set(types) - found - {"full_attention"}:
        return None
    name = found.pop()
    kind, key = kinds[name]
    window = values.get(key)
    if not isinstance(window, int) or isinstance(window, bool) or not 1 < window < max_model_len:
        return None
    n = types.count(name)
    return LayerWindows(kind, window, n, len(types) - n, is_windowed_first=types[0] == name)
