"""What a KV cache takes, held to the blocks that vLLM 0.33.0's own planner makes on a CPU of the same layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stepcal.errors import InputError, NotModelledError
from stepcal.simulator.config import ServerConfig
from stepcal.specs.architecture import ModelArchitecture, load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.kv_cache import KvCache, block_size_of, kv_bytes_per_token
from stepcal.specs.kv_offloading import offload_blocks

LINES = (Path(__file__).parent / "public_models.jsonl").read_text().splitlines()
PUBLIC = {one["model"]: one["config"] for one in map(json.loads, LINES)}
V2_LITE, V2, V3 = (f"deepseek-ai/DeepSeek-{name}" for name in ("V2-Lite", "V2", "V3"))

# get_kv_cache_configs of 20 GiB and so many layers of MLAAttentionSpec(num_kv_heads=1, head_size=576): tokens of a block,
# what the cache is kept in, blocks.
PLANNED_LATENTS = [
    (V3, 16, "bf16", 19_099),
    (V3, 32, "bf16", 9_549),
    (V3, 64, "bf16", 4_774),
    (V3, 128, "bf16", 2_387),
    (V3, 64, "fp8", 9_549),
    (V2, 64, "bf16", 4_854),
    (V2_LITE, 16, "bf16", 43_151),
    (V2_LITE, 64, "bf16", 10_787),
]
# The same of layers of FullAttentionSpec and SlidingWindowSpec in uint8: ranks, GiB, blocks.
PLANNED_FP8 = [
    ("openai/gpt-oss-120b", 1, 10, 36_408),
    ("openai/gpt-oss-120b", 8, 50, 1_456_355),
    ("openai/gpt-oss-20b", 1, 55, 300_373),
]


def public(name: str) -> ModelArchitecture:
    return ModelArchitecture.from_config(PUBLIC[name], name=name.rpartition("/")[2])


@pytest.mark.parametrize(("name", "block_size", "precision", "blocks"), PLANNED_LATENTS)
@pytest.mark.parametrize("ranks", [1, 8])
def test_latents_take_what_the_real_planner_says_on_every_rank(name, block_size, precision, blocks, ranks) -> None:
    cache = KvCache(public(name), None, ranks, block_size, precision)
    assert int((20 << 30) // cache.block_bytes) == blocks


@pytest.mark.parametrize(("name", "ranks", "gib", "blocks"), PLANNED_FP8)
def test_a_cache_in_fp8_takes_what_the_real_planner_says(name, ranks, gib, blocks) -> None:
    model = public(name)
    assert int((gib << 30) // KvCache(model, model.windows, ranks, kv_precision="fp8").block_bytes) == blocks


def test_latents_are_as_wide_as_the_paper_says() -> None:
    """A token of DeepSeek-V3 takes 70 KB (its report); the keys and values of its 128 heads would take 57 times as much."""
    model = public(V3)
    assert kv_bytes_per_token(model) == 61 * (512 + 64) * 2
    assert kv_bytes_per_token(model) == pytest.approx(70e3, rel=0.01)
    assert kv_bytes_per_token(model, tensor_parallel=8) == kv_bytes_per_token(model)


@pytest.mark.parametrize(
    ("gpu", "version", "precision", "given", "found"),
    [
        ("h100-sxm", "0.15.1", "bf16", None, 64),
        ("h100-sxm", "0.15.1", "bf16", 16, 64),
        ("h100-sxm", "0.15.1", "bf16", 128, 128),
        ("h100-sxm", "0.33.0", "bf16", None, 16),
        ("h100-sxm", "0.33.0", "fp8", None, 64),
        ("h200-sxm", "0.19.0", "fp8", 128, 128),
        ("b200", "0.15.1", "bf16", None, 64),
        ("b200", "0.15.1", "bf16", 32, 32),
        ("b200", "0.24.0", "bf16", None, 32),
        ("b200", "0.33.0", "bf16", 64, 64),
        ("a100-80gb", "0.15.1", "bf16", None, 16),
        ("l40s", "0.33.0", "bf16", 32, 32),
    ],
)
def test_blocks_of_latents_are_what_the_backend_reads(gpu, version, precision, given, found) -> None:
    size, notes = block_size_of(given, public(V3), load_accelerator(gpu), version, precision)
    assert size == found
    assert bool(notes) == (size != (given or 16))
    assert block_size_of(given, load_architecture("llama-2-7b"), load_accelerator(gpu), version, precision) == (
        given or 16,
        [],
    )


def test_a_pool_holds_every_head_once_and_the_latents_of_every_rank() -> None:
    llama, latent = load_architecture("llama-2-70b"), public(V2_LITE)
    assert offload_blocks(llama, 8.0, cache=KvCache(llama, tensor_parallel=4)) == offload_blocks(llama, 8.0)
    assert offload_blocks(latent, 8.0, cache=KvCache(latent, tensor_parallel=4)) == offload_blocks(latent, 8.0) // 4


def test_without_the_hybrid_cache_a_block_holds_all_layers() -> None:
    model, gpu = public("openai/gpt-oss-20b"), load_accelerator("h100-sxm")
    server = ServerConfig(kv_blocks=100, vllm_version="0.15.1")
    halves = Deployment(model, gpu, server=server).kv_cache.block_bytes
    for off in ({"disable_hybrid_kv_cache_manager": True}, {"offload_blocks": 10}):
        assert Deployment(model, gpu, server=replace(server, **off)).kv_cache.block_bytes == 2 * halves
    newer = replace(server, offload_blocks=10, vllm_version="0.33.0")
    assert Deployment(model, gpu, server=newer).kv_cache.block_bytes == halves


def test_a_deployment_keeps_its_cache_as_it_is_told_or_as_the_checkpoint_asks() -> None:
    model, gpu = load_architecture("llama-2-7b"), load_accelerator("h100-sxm")
    server = ServerConfig(kv_blocks=100)
    plain, narrow = Deployment(model, gpu, server=server), Deployment(model, gpu, server=server, kv_cache_dtype="fp8")
    assert narrow.kv_bytes_per_token == plain.kv_bytes_per_token / 2
    assert narrow.kv_cache.block_bytes == plain.kv_cache.block_bytes / 2
    quantised = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
    }
    asked = ModelArchitecture.from_config({**PUBLIC["llama-2-13b"], "quantization_config": quantised})
    assert Deployment(asked, gpu).kv_precision == "fp8"
    assert Deployment(asked, gpu, kv_cache_dtype="bfloat16").kv_precision == "bf16"


def test_other_caches_are_refused() -> None:
    model, gpu = load_architecture("llama-2-7b"), load_accelerator("h100-sxm")
    with pytest.raises(NotModelledError, match=r"kv_cache_dtype.*nvfp4"):
        Deployment(model, gpu, kv_cache_dtype="nvfp4")
    for scheme in ({"kv_cache_quant_algo": "NVFP4"}, {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}):
        quantised = {"quant_method": "modelopt", "quant_algo": "FP8", **scheme}
        with pytest.raises(NotModelledError, match="quantised KV cache"):
            ModelArchitecture.from_config({**PUBLIC["llama-2-13b"], "quantization_config": quantised})


@pytest.mark.parametrize("width", ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"])
def test_widths_of_latents_must_be_there(width) -> None:
    config = {key: value for key, value in PUBLIC[V3].items() if key != width}
    with pytest.raises(InputError, match=width):
        ModelArchitecture.from_config(config)


def test_latents_of_a_type_that_is_not_known_for_them_are_refused() -> None:
    with pytest.raises(NotModelledError, match="latent attention"):
        ModelArchitecture.from_config({**PUBLIC["llama-2-13b"], "kv_lora_rank": 512})
    with pytest.raises(NotModelledError, match="indexer"):
        ModelArchitecture.from_config({**PUBLIC[V3], "model_type": "deepseek_v32"})


def test_any_number_of_ranks_that_divides_heads_and_experts_shares_latents() -> None:
    assert public(V3).tensor_parallel_degrees() == [1, 2, 4, 8, 16, 32, 64, 128]
    whole, eighth = (public(V3).weights_bytes_of_a_rank(ranks) for ranks in (1, 8))
    assert whole / 8 < eighth < whole / 7
