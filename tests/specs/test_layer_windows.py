"""Groups of vLLM's hybrid KV cache: as its own planner made them, on a CPU, of the same layers (0.33.0)."""

import json

import pytest

from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.layer_windows import LayerWindows, read_layer_windows

GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(26)],
}

# What vllm.v1.core.kv_cache_planning.get_kv_cache_configs makes of 1 GiB and layers of 512 bytes a block: layers of each
# group in its order, and blocks.
PLANNED = {
    "gpt-oss-120b": (("sliding", 128, 18, 18), [18, 18], 116_508),
    "gemma-3-27b": (("sliding", 1024, 52, 10), [9, 9, 9, 9, 8, 8, 10], 209_715),
    "gemma-3-12b": (("sliding", 1024, 40, 8), [8, 8, 8, 8, 8, 8], 262_144),
    "gemma-3-4b": (("sliding", 1024, 29, 5), [5, 5, 5, 5, 5, 4, 5], 419_430),
    "gemma-3-1b": (("sliding", 512, 22, 4), [4, 4, 4, 4, 3, 3, 4], 524_288),
    "gemma-2-9b": (("sliding", 4096, 21, 21), [21, 21], 99_864),
    "llama-4": (("chunked", 8192, 36, 12), [12, 12, 12, 12], 174_762),
}


@pytest.mark.parametrize("name", PLANNED)
def test_groups_and_blocks_are_those_of_the_real_planner(name: str) -> None:
    arguments, layers, blocks = PLANNED[name]
    windows = LayerWindows(*arguments)
    assert [group.layers for group in windows.kv_groups()] == layers
    assert [group.kind for group in windows.kv_groups()] == [arguments[0]] * (len(layers) - 1) + ["full"]
    assert (1 << 30) // (512 * windows.layers_per_block) == blocks


def test_windows_are_read_where_the_file_names_the_layers(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA_3_1B))
    expected = LayerWindows("sliding", 512, 22, 4)
    assert read_layer_windows(path, 4096) == expected
    by_pattern = {k: v for k, v in GEMMA_3_1B.items() if k != "layer_types"}
    assert read_layer_windows({"text_config": by_pattern}, 4096) == expected
    assert read_layer_windows(path, 512) is None
    assert read_layer_windows({**GEMMA_3_1B, "layer_types": None, "model_type": "llama"}, 4096) is None
    assert read_layer_windows("llama-2-7b", 4096) is None
    assert read_layer_windows({**GEMMA_3_1B, "layer_types": ["mamba"] * 26}, 4096) is None


def test_a_block_holds_the_layers_of_one_group() -> None:
    model = ModelArchitecture.from_config(GEMMA_3_1B, max_model_len=512)
    windows = LayerWindows("sliding", 512, 22, 4)
    assert windows.kv_block_bytes(model) == 16 * 4 * 2 * 1 * 256 * 2
