"""A deployment by name: its server is the one that vLLM would start, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepcal import Deployment
from stepcal.errors import InputError

PUBLIC = {
    row["model"]: row["config"]
    for row in map(json.loads, (Path(__file__).parent / "public_models.jsonl").read_text().splitlines())
}


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"vllm_version": "0.15.1"}, 64),
        ({"vllm_version": "0.33.0"}, 16),
        ({"vllm_version": "0.33.0", "kv_cache_dtype": "fp8"}, 64),
        ({"vllm_version": "0.33.0", "block_size": 32}, 32),
    ],
)
def test_blocks_are_as_long_as_the_backend_reads(limits: dict, tokens: int, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLIC["deepseek-ai/DeepSeek-V2-Lite"]), encoding="utf-8")
    assert Deployment.of(str(path), "h100-sxm", kv_blocks=100, **limits).block_size == tokens
    assert Deployment.of("llama-2-7b", "h100-sxm", kv_blocks=100).block_size == 16


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"kv_blocks": 100, "tensor_parallel_size": 2}, "is called `tensor_parallel`"),
        ({"kv_blocks": 100, "max_model_len": 5_000}, "above the 4,096 positions"),
        ({"kv_blocks": 100, "block_size": 17}, "vLLM takes"),
        ({"max_num_seqs": 8}, "`kv_blocks` is missing"),
        ({"kv_blocks": "100"}, "`kv_blocks` is '100'; it must be a whole number"),
        ({"kv_blocks": float("nan")}, "`kv_blocks` is nan; it must be a whole number"),
        ({"kv_blocks": 100, "max_num_seqs": 4.9}, "`max_num_seqs` is 4.9"),
        ({"kv_blocks": 100, "max_num_seqs": True}, "`max_num_seqs` is True"),
        ({"kv_blocks": 100, "long_prefill_token_threshold": None}, "`long_prefill_token_threshold` is None"),
        (
            {"kv_blocks": 100, "enable_prefix_caching": "false"},
            "`enable_prefix_caching` is 'false'; it must be True or",
        ),
        ({"kv_blocks": 100, "vllm_version": 0.24}, "`vllm_version` is 0.24; it must be text"),
        ({"kv_blocks": 100, "vllm_version": "0.24"}, "a release of three numbers"),
        ({"kv_blocks": 100, "kv_groups": None}, "`kv_groups` is None"),
    ],
)
def test_what_is_no_server_is_refused(limits: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Deployment.of("llama-2-7b", "h100-sxm", **limits)
