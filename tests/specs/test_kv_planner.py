"""Groups and number of KV blocks are those of each release's own planner, from the real models' own layers.

``tests/conformance/planner`` was recorded by ``tools/record_vllm_planner.py``: each release made the models of
``models.json`` by its own classes, without weights, asked their layers what they keep, and grouped them.
"""

import json
from pathlib import Path

import pytest

from stepcal.errors import InputError
from stepcal.simulator.config import KvGroup, ServerConfig
from stepcal.simulator.versions import RELEASES
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.specs.layer_windows import LayerKind, group_layers, layers_per_block

PLANNER = Path(__file__).parents[1] / "conformance" / "planner"
MODELS = json.loads((PLANNER / "models.json").read_text())
PLANS = {release.version: json.loads((PLANNER / f"{release.version}.json").read_text()) for release in RELEASES}
KNOWN_WIDER = {("0.33.0", "command-r7b"): 1}
"""Tokens that a release reads beyond the window of the file; stepcal does not follow."""
OFF = "disable_hybrid_kv_cache_manager"


def rows(kind: str) -> list:
    return [
        pytest.param(version, row, id=f"{version}-{row[kind]}-{i}")
        for version, recorded in PLANS.items()
        for i, row in enumerate(recorded["plans"])
        if kind in row
    ]


def server_of(version: str, row: dict, **changes: object) -> ServerConfig:
    """The server of a row; that the hybrid cache is off with offloading is the release's own choice."""
    given = {OFF: row[OFF]} if OFF in row else {}
    return ServerConfig(
        kv_blocks=100,
        vllm_version=version,
        block_size=row.get("block_size", 16),
        offload_blocks=50 if "kv_offloading_size" in row or "kv_transfer_config" in row else 0,
        **given,
        **changes,
    )


def as_recorded(groups: tuple[KvGroup, ...]) -> list[list]:
    return [[group.kind, group.window, group.layers] for group in groups]


@pytest.mark.parametrize(("version", "row"), rows("model"))
def test_a_model_is_grouped_as_the_release_does(version: str, row: dict) -> None:
    config = MODELS[row["model"]]
    longest = row.get("max_model_len", config["max_position_embeddings"])
    if "refused" in row:
        if "kv_offloading_size" in row:  # vLLM leaves the hybrid cache on, and then refuses its own connector
            with pytest.raises(InputError, match="refuses to start"):
                server_of(version, {**row, OFF: False})
            return
        with pytest.raises(InputError):
            ModelArchitecture.from_config(config, max_model_len=longest)
        return
    model = ModelArchitecture.from_config(config, max_model_len=longest)
    server = server_of(version, row, max_model_len=longest)
    served = Deployment(model, load_accelerator("h100-sxm"), row.get("ranks", 1), server)
    assert served.limits.is_hybrid_cache_off == row["hybrid_cache_is_off"]
    wider = KNOWN_WIDER.get((version, row["model"]), 0)
    groups = [[kind, window + wider * (window > 0), n] for kind, window, n in as_recorded(served.limits.kv_groups)]
    if groups != row["groups"]:
        assert row["groups"] == [["full", 0, model.num_layers]]
        assert [group.kind for group in served.limits.groups] == ["full"]
    assert int(PLANS[version]["memory_bytes"] // served.kv_cache.block_bytes) == row["num_blocks"]


@pytest.mark.parametrize(("version", "row"), rows("layers"))
def test_layers_are_grouped_as_the_release_does(version: str, row: dict) -> None:
    recorded = PLANS[version]
    written = recorded["written_layers"]
    layers = [tuple(layer) for layer in written[row["layers"]]]
    kinds = [LayerKind(*kind, layers.count(kind)) for kind in dict.fromkeys(layers)]
    groups = group_layers(kinds, version)
    if "refused" in row:
        with pytest.raises(InputError, match="vLLM refuses"):
            server_of(version, row, kv_groups=groups)
        return
    server = server_of(version, row, kv_groups=groups)
    assert as_recorded(server.groups) == row["groups"]
    in_block = len(layers) if server.groups != groups else layers_per_block(kinds, version)
    block_bytes = 16 * in_block * 2 * written["kv_heads"] * written["head_dim"] * 2
    assert recorded["memory_bytes"] // block_bytes == row["num_blocks"]
