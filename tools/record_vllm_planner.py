"""Record how a release of vLLM groups the KV of a model's layers, and how many blocks a memory holds, on a CPU.

Each model is made by the release's own classes from its ``config.json``, without weights (on PyTorch's meta device), for
a GPU that is stubbed as in ``record_vllm_defaults.py``; its layers then say what they keep, and the planner
(``get_kv_cache_groups``, ``get_kv_cache_configs``) groups them. Ranks of tensor parallelism are not started: the KV heads of
each layer are divided instead. Layouts that no public model has are written down as layers.

    vllm-env/bin/python tools/record_vllm_planner.py --out tests/conformance

writes ``OUT/planner/VERSION.json``. The models are those of ``OUT/planner/models.json``: some as in
``tests/specs/public_models.jsonl``, the others (Gemma 3 from 4B on, Llama 4, Mistral, Ministral) written from memory of the
public files, whose dimensions nobody checked. The environment is that of ``record_vllm.py``, with a transformers that the
release accepts: below 5 up to 0.19.0.
"""

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import record_vllm_defaults as defaults
import torch


class _Operators:
    """Compiled operators that a CPU has not: each answers no."""

    def __call__(self, *_: Any, **__: Any) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _stub_operators() -> None:
    """Let vLLM ask its compiled operators what the GPU can do."""
    real = torch._ops._OpNamespace.__getattr__

    def get(namespace: Any, name: str) -> Any:
        try:
            return real(namespace, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return _Operators()

    torch._ops._OpNamespace.__getattr__ = get
    register = torch.library.register_fake

    def register_fake(operator: Any, *arguments: Any, **options: Any) -> Any:
        is_ours = str(operator).split("::")[0].endswith("_C")
        return (lambda function: function) if is_ours else register(operator, *arguments, **options)

    torch.library.register_fake = register_fake


_stub_operators()

from vllm.config import KVTransferConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    from vllm.v1.core import kv_cache_utils as planning

for _name in ("Stream", "Event"):  # shared experts have their own
    setattr(torch.cuda, _name, type(_name, (), {"__init__": lambda *_, **__: None}))

MEMORY_BYTES = (40 << 30) + 12_345_678
OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "extra_gib": 8}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt-oss-20b", {}),
    ("gpt-oss-20b", {"kv_offloading_size": 8.0, "kv_offloading_backend": "native"}),
    ("gpt-oss-20b", {"kv_transfer_config": OFFLOADING}),
    ("gpt-oss-120b", {}),
    ("gpt-oss-120b", {"ranks": 8}),
    ("gpt-oss-120b", {"disable_hybrid_kv_cache_manager": True}),
    ("gemma-2-2b", {}),
    ("gemma-2-9b", {}),
    ("gemma-2-9b", {"max_model_len": 4096}),
    ("gemma-2-27b", {"ranks": 2}),
    ("gemma-3-1b", {}),
    ("gemma-3-4b", {}),
    ("gemma-3-4b", {"block_size": 32}),
    ("gemma-3-12b", {}),
    ("gemma-3-27b", {}),
    ("gemma-3-27b", {"ranks": 2, "kv_transfer_config": OFFLOADING}),
    ("llama-4-scout", {"ranks": 8}),
    ("llama-4-scout", {"ranks": 8, "disable_hybrid_kv_cache_manager": True}),
    ("llama-4-maverick", {"ranks": 8}),
    ("mistral-7b-v0.1", {}),
    ("mistral-7b-v0.1", {"max_model_len": 4096}),
    ("mistral-7b-v0.1", {"disable_hybrid_kv_cache_manager": True}),
    ("ministral-8b", {}),
    ("ministral-8b-interleaved", {}),
    ("qwen2.5-7b", {}),
    ("qwen2.5-7b-windows-from-28", {}),
    ("qwen2.5-7b-windows-from-0", {}),
    ("qwen2.5-7b-windows-from-14", {}),
    ("command-r7b", {}),
]
"""Models, and how they are served; `ranks` divides the KV heads."""
F, S, L, C = ("full", 0), ("sliding", 1024), ("sliding", 128), ("chunked", 512)
LAYERS: list[tuple[str, list[tuple[str, int]], dict[str, Any]]] = [
    ("two sizes and full", [S, L, F] * 8, {}),
    ("two sizes, few of one", [S, S, L, F] * 6, {}),
    ("two sizes, no full", [S, L, L] * 8, {}),
    ("sliding and chunked and full", [L, C, F, C] * 5, {}),
    ("sliding and chunked, no full", [C, L] * 6, {}),
    ("five to four", [S] * 5 + [F] * 4, {}),
    ("four to three", [S] * 4 + [F] * 3, {}),
    ("three to two", [F, F, F, S, S], {}),
    ("thirteen to twelve", [F] * 13 + [S] * 12, {}),
    ("mostly full", [F] * 20 + [S] * 4, {}),
    ("full first", [F, S, S, S, S] * 3, {}),
    ("one sliding", [S], {}),
    ("two sizes and full, no hybrid cache", [S, L, F] * 8, {"disable_hybrid_kv_cache_manager": True}),
    ("two sizes, no full, no hybrid cache", [S, L, L] * 8, {"disable_hybrid_kv_cache_manager": True}),
    ("sliding and chunked and full, no hybrid cache", [L, C, F, C] * 5, {"disable_hybrid_kv_cache_manager": True}),
    ("sliding and chunked, no full, no hybrid cache", [C, L] * 6, {"disable_hybrid_kv_cache_manager": True}),
    ("one size and full, no hybrid cache", [S, F] * 5, {"disable_hybrid_kv_cache_manager": True}),
]
KV_HEADS, HEAD_DIM = 4, 128


def engine_config(model: dict[str, Any], options: dict[str, Any], folder: str) -> Any:
    """VLLM's configuration of a server for a model, as on an H100."""
    (Path(folder) / "config.json").write_text(json.dumps(model))
    arguments = {key: value for key, value in options.items() if key != "ranks"}
    if "kv_transfer_config" in arguments:
        connector = dict(arguments["kv_transfer_config"])
        extra = {"cpu_bytes_to_use": connector.pop("extra_gib") << 30}
        arguments["kv_transfer_config"] = KVTransferConfig(**connector, kv_connector_extra_config=extra)
    config = defaults.engine_config(folder, defaults.H100, enforce_eager=True, load_format="dummy", **arguments)
    config.cache_config.num_gpu_blocks_override = None
    if hasattr(type(config.cache_config), "get_resolved_kv_cache_layout"):
        config.cache_config.kv_cache_layout = "LBNHC"
    return config


def layer_specs(config: Any) -> dict[str, Any]:
    """What each layer of the model keeps, as its own class says."""
    with set_current_vllm_config(config):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                initialize_model(config)
        finally:
            torch.set_default_dtype(torch.float32)
        layers = config.compilation_config.static_forward_context
        specs = {
            name: layer.get_kv_cache_spec(config)
            for name, layer in layers.items()
            if hasattr(layer, "get_kv_cache_spec")
        }
    return {name: spec for name, spec in specs.items() if spec is not None}


def described(spec: Any) -> list:
    """``[kind, window]`` of a group."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    if isinstance(spec, SlidingWindowSpec):
        return ["sliding", spec.sliding_window]
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return ["chunked", spec.attention_chunk_size]
    assert isinstance(spec, FullAttentionSpec)
    return ["full", 0]


def planned(config: Any, specs: dict[str, Any]) -> dict[str, Any]:
    """Groups as ``[kind, window, layers]``, and blocks of `MEMORY_BYTES`."""
    if hasattr(planning, "get_global_kv_cache_groups"):
        groups = planning.get_global_kv_cache_groups(config, [specs])
        kv = planning.get_kv_cache_configs(config, [specs], [MEMORY_BYTES], groups)[0]
    else:
        kv = planning.get_kv_cache_configs(config, [specs], [MEMORY_BYTES])[0]
    groups = [[*described(group.kv_cache_spec), len(group.layer_names)] for group in kv.kv_cache_groups]
    return {"groups": groups, "num_blocks": kv.num_blocks}


def check_connector(config: Any) -> None:
    """Raise what a KV connector that needs the hybrid cache to be off raises when the server starts."""
    if config.kv_transfer_config is None:
        return
    try:
        KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER)
    except Exception as error:  # past its check, it wants a whole server
        if "HMA" in str(error):
            raise


def plan(
    model: dict[str, Any], options: dict[str, Any], layers: list[tuple[str, int]] | None, folder: str
) -> dict[str, Any]:
    """What the planner makes of a model, or the reason why vLLM refuses it."""
    try:
        config = engine_config(model, options, folder)
        specs = layer_specs(config) if layers is None else written_layers(layers)
        ranks = options.get("ranks", 1)
        specs = {n: dataclasses.replace(s, num_kv_heads=max(1, s.num_kv_heads // ranks)) for n, s in specs.items()}
        is_off = config.scheduler_config.disable_hybrid_kv_cache_manager
        check_connector(config)
        return {**planned(config, specs), "hybrid_cache_is_off": bool(is_off)}
    except (AssertionError, ValueError, NotImplementedError) as error:
        if "CUDA" in str(error):
            raise  # ours, not vLLM's refusal
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def written_layers(layers: list[tuple[str, int]]) -> dict[str, Any]:
    """Specs of layers that are given as kind and window."""
    sizes = {"block_size": 16, "num_kv_heads": KV_HEADS, "head_size": HEAD_DIM, "dtype": torch.bfloat16}
    specs: dict[str, Any] = {}
    for i, (kind, window) in enumerate(layers):
        if kind == "full":
            specs[f"layer.{i}"] = FullAttentionSpec(**sizes)
        elif kind == "sliding":
            specs[f"layer.{i}"] = SlidingWindowSpec(**sizes, sliding_window=window)
        else:
            specs[f"layer.{i}"] = ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=window)
    return specs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the recordings; writes OUT/planner/VERSION.json"
    )
    parser.add_argument("--only", help="one model")
    arguments = parser.parse_args()
    for name in ("_check_enough_kv_cache_memory", "check_enough_kv_cache_memory"):
        if hasattr(planning, name):
            setattr(planning, name, lambda *_, **__: None)
    models = json.loads((arguments.out / "planner" / "models.json").read_text())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CASES:
            if arguments.only in (None, name):
                row = plan(models[name], options, None, folder)
                rows.append({"model": name, **options, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for name, layers, options in LAYERS:
            if arguments.only is None:
                row = plan(copy.deepcopy(models["mistral-7b-v0.1"]), options, layers, folder)
                rows.append({"layers": name, **options, **row})
    if arguments.only:
        return 0
    written = {name: layers for name, layers, _ in LAYERS}
    head = {
        "vllm_version": defaults.vllm_version, "memory_bytes": MEMORY_BYTES,
        "written_layers": {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, **written},
    }  # fmt: skip
    text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path = arguments.out / "planner" / f"{defaults.vllm_version}.json"
    path.write_text(f'{{\n{text},\n "plans": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
