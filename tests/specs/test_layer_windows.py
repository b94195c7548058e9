"""Groups of vLLM's hybrid KV cache: as its own planner made them, on a CPU, of the same layers (0.33.0)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stepcal.errors import InputError
from stepcal.simulator.config import KvGroup, ServerConfig
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.kv_cache import KvCache
from stepcal.specs.layer_windows import LayerWindows

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

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
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
    assert (1 << 30) // (512 * windows.layers_per_block()) == blocks


# Blocks that the same planner makes of memory in GiB and each model's real layers: head dimension, KV heads of a rank.
PLANNED_BLOCKS = [
    ("gpt-oss-120b", 1, 10, 18_204),
    ("gpt-oss-120b", 8, 50, 728_177),
    ("gpt-oss-20b", 1, 55, 150_186),
    ("gemma-3-27b", 2, 30, 49_152),
    ("gemma-3-12b", 1, 40, 40_960),
]
GEMMA_3_12B = {
    **GEMMA_3_1B,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "sliding_window": 1024,
    "layer_types": None,
}
GEMMA_3_27B = {
    **GEMMA_3_12B,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
}


def public_model(name: str) -> ModelArchitecture:
    own = {"gemma-3-12b": GEMMA_3_12B, "gemma-3-27b": GEMMA_3_27B}
    lines = (Path(__file__).parent / "public_models.jsonl").read_text().splitlines()
    public = {one["model"]: one["config"] for one in map(json.loads, lines)}
    return ModelArchitecture.from_config(own.get(name) or public[f"openai/{name}"])


@pytest.mark.parametrize(("name", "ranks", "gib", "blocks"), PLANNED_BLOCKS)
def test_memory_holds_as_many_blocks_as_the_real_planner_makes(name: str, ranks: int, gib: int, blocks: int) -> None:
    model = public_model(name)
    assert int((gib << 30) // KvCache(model, model.windows, ranks).block_bytes) == blocks


def test_layers_that_all_have_a_window_are_one_group() -> None:
    """The planner makes 5,120 blocks of 10 GiB and 32 layers of SlidingWindowSpec(num_kv_heads=8, head_size=128)."""
    model = ModelArchitecture.from_config({**LLAMA, "model_type": "mistral", "sliding_window": 4096})
    assert model.windows is not None
    assert model.windows.kv_groups() == (KvGroup("sliding", 4096, 32),)
    assert int((10 << 30) // KvCache(model, model.windows).block_bytes) == 5_120


def windows_of(config, max_model_len=None):
    return ModelArchitecture.from_config(config, max_model_len=max_model_len).windows


def test_windows_are_read_where_the_file_names_the_layers(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA_3_1B))
    expected = LayerWindows("sliding", 512, 22, 4)
    assert windows_of(path, 4096) == windows_of(path) == expected
    by_pattern = {k: v for k, v in GEMMA_3_1B.items() if k != "layer_types"}
    assert windows_of({"model_type": "gemma3", "text_config": by_pattern}) == expected
    assert windows_of(path, 512) == expected  # its groups are there all the same
    assert ModelArchitecture.from_config(path).windows_within(512) is None
    assert windows_of({**GEMMA_3_1B, "layer_types": ["full_attention"] * 26}) is None


def test_windows_of_models_whose_type_says_where_they_are() -> None:
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 4096}
    assert windows_of(mistral) == LayerWindows("sliding", 4096, 32, 0)
    llama4 = {**LLAMA, "model_type": "llama4_text", "num_hidden_layers": 48, "attention_chunk_size": 8192}
    assert windows_of(llama4) == LayerWindows("chunked", 8192, 36, 12)
    rotary = [1, 0] * 24
    assert windows_of({**llama4, "no_rope_layers": rotary}) == LayerWindows("chunked", 8192, 24, 24)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 4096}, "in layers that it does not name"),
        (
            {
                "sliding_window": 4096,
                "attention_chunk_size": 8192,
                "layer_types": ["sliding_attention"] * 16 + ["chunked_attention"] * 16,
            },
            "in two ways",
        ),
        ({"sliding_window": 4096, "layer_types": ["mamba"] * 32}, "layers of type"),
        ({"sliding_window": 4096, "layer_types": ["sliding_attention"] * 3}, "names 3 layers"),
    ],
)
def test_windows_that_cannot_be_placed_are_refused(changes, named) -> None:
    with pytest.raises(InputError, match=named):
        windows_of({**LLAMA, **changes})


def test_a_block_holds_the_layers_of_one_group() -> None:
    model = ModelArchitecture.from_config(GEMMA_3_1B)
    assert KvCache(model, model.windows).block_bytes == 16 * 4 * 2 * 1 * 256 * 2
    assert KvCache(model).block_bytes == 16 * 26 * 2 * 1 * 256 * 2


def test_a_deployment_knows_its_groups() -> None:
    model, gpu = ModelArchitecture.from_config(GEMMA_3_1B), load_accelerator("h100-sxm")
    server = ServerConfig(kv_blocks=1000, max_model_len=4096, vllm_version="0.33.0")
    served = Deployment(model, gpu, server=server)
    assert served.limits.kv_groups == LayerWindows("sliding", 512, 22, 4).kv_groups()
    assert served.sliding == (KvGroup("sliding", 512, layers=22),)
    short = served.with_server(max_model_len=512)
    assert short.windows is None
    assert short.limits.kv_groups == served.limits.kv_groups
    own = (KvGroup("sliding", 512, 3), KvGroup())
    assert Deployment(model, gpu, server=replace(server, kv_groups=own)).limits.kv_groups == own
    assert Deployment(model, gpu).sliding == (KvGroup("sliding", 512, layers=22),)
