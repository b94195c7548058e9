"""Record which defaults a release of vLLM chooses, by running its own code on a CPU with a stub for the GPU.

``EngineArgs.create_engine_config`` runs unchanged, as ``vllm serve`` and the class ``LLM`` call it; the stub is vLLM's CUDA
platform with a name, a memory and a compute capability of our choice in place of the driver's answers. The sampler is built
as a worker builds it, and asked for tokens with spies in place of its kernels: what is recorded is which one it calls.

Two things are assumed of the GPU's environment: Triton works, and FlashInfer, which each CUDA wheel requires, is installed
and can compile. Compiled extensions of vLLM are empty modules; no default depends on what is in them.

    vllm-env/bin/python tools/record_vllm_defaults.py --out tests/conformance

writes ``OUT/defaults/VERSION.json``. The environment is that of ``record_vllm.py``.
"""

import argparse
import contextlib
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch


class _Absent(types.ModuleType):
    """A module of kernels that a CPU has not: any name in it is a function that does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "0"
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None})


EXTENSIONS = (
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn",
)
FLASHINFER = (
    "flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.cascade", "flashinfer.utils", "flashinfer.sampling",
    "flashinfer.jit", "flashinfer.jit.core", "flashinfer.comm", "flashinfer.autotuner", "flashinfer.concat_ops",
)  # fmt: skip
sys.modules.update({name: _Absent(name) for name in EXTENSIONS})

import vllm.platforms  # noqa: E402
from vllm.platforms import cuda  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver reports it; `stepcal` is its name in ``data/hardware/accelerators.csv``, if it is there."""

    name: str
    memory_mib: int
    capability: tuple[int, int]
    sms: int
    stepcal: str | None = None


GPUS = (
    Gpu("NVIDIA H100 80GB HBM3", 81_559, (9, 0), 132, "h100-sxm"),
    Gpu("NVIDIA H100 NVL", 95_830, (9, 0), 132, "h100-nvl"),
    Gpu("NVIDIA H200", 143_771, (9, 0), 132, "h200-sxm"),
    Gpu("NVIDIA A100-SXM4-80GB", 81_920, (8, 0), 108, "a100-80gb"),
    Gpu("NVIDIA L40S", 46_068, (8, 9), 142, "l40s"),
    Gpu("NVIDIA B200", 183_359, (10, 0), 148, "b200"),
    Gpu("NVIDIA B300 SXM6 AC", 275_040, (10, 3), 148, "b300-sxm"),
    Gpu("NVIDIA GB200", 189_471, (10, 0), 152, "gb200"),
    Gpu("NVIDIA GB300", 284_208, (10, 3), 152, "gb300"),
    Gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_887, (12, 0), 188, "rtx-pro-6000"),
    Gpu("NVIDIA A100-SXM4-40GB", 40_960, (8, 0), 108),
    Gpu("NVIDIA GB10", 122_570, (12, 1), 48),
    Gpu("NVIDIA A10G", 23_028, (8, 6), 80),
)
"""Memory as nvidia-smi reports it."""
H100, B200 = GPUS[0], GPUS[5]


class StubGpu(cuda.CudaPlatformBase):
    """VLLM's CUDA platform without a driver."""

    gpu = H100

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003
        return DeviceCapability(*cls.gpu.capability)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:  # noqa: ARG003
        return cls.gpu.name

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:  # noqa: ARG003
        return cls.gpu.memory_mib * MIB

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:  # noqa: ARG003
        return "stub"

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
        return cls.gpu.sms

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def is_fully_connected(cls, device_ids: list[int]) -> bool:  # noqa: ARG003
        return True

    @classmethod
    def log_warnings(cls) -> None: ...


vllm.platforms._current_platform = StubGpu()

from vllm import __version__ as vllm_version  # noqa: E402
from vllm.config import vllm as config_module  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.usage.usage_lib import UsageContext  # noqa: E402
from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402

config_module.HAS_TRITON = True  # as on a GPU; kernels are never called
registry._LazyRegisteredModel._save_modelinfo_to_cache = lambda *_, **__: None  # writes no cache, needs no kernels

USAGES = {"api_server": UsageContext.OPENAI_API_SERVER, "llm_class": UsageContext.LLM_CLASS}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
SCHEDULER_FIELDS = (
    "async_scheduling", "enable_chunked_prefill", "long_prefill_token_threshold", "max_num_partial_prefills", "policy",
    "scheduler_reserve_full_isl", "watermark", "max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens",
    "prefill_schedule_interval", "disable_hybrid_kv_cache_manager", "stream_interval",
)  # fmt: skip
CACHE_FIELDS = (
    "block_size", "gpu_memory_utilization", "enable_prefix_caching", "cache_dtype", "kv_offloading_size",
    "kv_offloading_backend",
)  # fmt: skip
CAPTURE_SEQS = (1, 3, 4, 20, 100, 128, 129, 256, 1024)
CAPTURE_TOKENS = (2048, 300, 30)  # the last two are no captured sizes, and below twice some sequences
N_SAMPLED = (1, 7, 8, 64)
VOCABULARY = 1000
ABSENT = "absent"


def engine_config(model: str, gpu: Gpu, usage: str = "api_server", **arguments: Any) -> Any:
    """VLLM's configuration for a GPU and a way to use it."""
    StubGpu.gpu = gpu
    return EngineArgs(model=model, skip_tokenizer_init=True, **arguments).create_engine_config(USAGES[usage])


def fields(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Fields by name, `ABSENT` where this release has none of that name."""
    return {name: getattr(config, name, ABSENT) for name in names}


def limits(model: str) -> list[dict[str, Any]]:
    """Token budget and sequences on each GPU, for each way to use vLLM."""
    rows = []
    for gpu in GPUS:
        for usage in USAGES:
            config = engine_config(model, gpu, usage)
            scheduler = config.scheduler_config
            rows.append(
                {
                    "gpu": gpu.name,
                    "stepcal": gpu.stepcal,
                    "memory_mib": gpu.memory_mib,
                    "capability": list(gpu.capability),
                    "usage": usage,
                    "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                    "max_num_seqs": scheduler.max_num_seqs,
                    "block_size": config.cache_config.block_size,
                    "largest_graph": config.compilation_config.cudagraph_capture_sizes[-1],
                }
            )
    return rows


def short_limits(model: str) -> list[dict[str, Any]]:
    """What is chosen where a model is short, or one of the two limits is given."""
    rows = []
    cases = [
        {"max_model_len": 16}, {"max_model_len": 4}, {"max_num_seqs": 64}, {"max_num_seqs": 3000},
        {"max_num_batched_tokens": 512}, {"max_num_batched_tokens": 100}, {"max_num_seqs": 4, "max_model_len": 256},
    ]  # fmt: skip
    for given in cases:
        chosen = engine_config(model, H100, **given).scheduler_config
        rows.append(
            {
                "given": given,
                "max_num_batched_tokens": chosen.max_num_batched_tokens,
                "max_num_seqs": chosen.max_num_seqs,
            }
        )
    return rows


def performance_modes(model: str) -> list[dict[str, Any]] | str:
    """Limits and CUDA graphs by performance mode, where the release has them."""
    if "performance_mode" not in EngineArgs.__dataclass_fields__:
        return ABSENT
    rows = []
    for mode in ("balanced", "interactivity", "throughput"):
        config = engine_config(model, H100, performance_mode=mode)
        scheduler = config.scheduler_config
        rows.append(
            {
                "performance_mode": mode,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "max_num_seqs": scheduler.max_num_seqs,
                "graphs": config.compilation_config.cudagraph_capture_sizes,
            }
        )
    return rows


def capture_sizes(model: str) -> list[dict[str, Any]]:
    """Sizes of the captured CUDA graphs by limits and generation of GPU."""
    rows = []
    for gpu in (H100, B200):
        for tokens in CAPTURE_TOKENS:
            for seqs in (s for s in CAPTURE_SEQS if s <= tokens):
                config = engine_config(model, gpu, max_num_seqs=seqs, max_num_batched_tokens=tokens)
                sizes = config.compilation_config.cudagraph_capture_sizes
                rows.append({"gpu": gpu.name, "max_num_batched_tokens": tokens, "max_num_seqs": seqs, "graphs": sizes})
    return rows


@contextlib.contextmanager
def spied_kernels() -> Iterator[list[str]]:
    """Replace the kernels of the sampler by spies that name themselves."""
    called: list[str] = []

    def spy(name: str, result: Any) -> Any:
        def kernel(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            called.append(name)
            return result(first, *arguments, **options)

        return kernel

    sort, topk = torch.Tensor.sort, torch.Tensor.topk
    absent = {name: _Absent(name) for name in FLASHINFER}
    absent["flashinfer.jit.core"].check_cuda_arch = lambda: None
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, absent))
        patches = {"flashinfer_sample": spy("FlashInfer", lambda logits, *_, **__: logits.argmax(dim=-1))}
        if hasattr(topk_topp_sampler, "HAS_TRITON"):
            patches["apply_top_k_top_p_triton"] = spy("Triton", lambda logits, *_, **__: logits)
            patches["HAS_TRITON"] = True
        if hasattr(topk_topp_sampler, "register_top_k_top_p_warmups"):
            patches["register_top_k_top_p_warmups"] = lambda: None
        for name, patch in patches.items():
            stack.enter_context(mock.patch.object(topk_topp_sampler, name, patch, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "sort", spy("PyTorch sort", sort)))
        stack.enter_context(mock.patch.object(torch.Tensor, "topk", spy("PyTorch top-k", topk)))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_device_index", return_value=0))
        yield called


def sampler_paths() -> list[dict[str, Any]]:
    """Which kernels sample, by number of requests and what cuts tokens off, and on which GPUs."""
    rows = []
    for restriction in ("none", "top-k", "top-p", "top-k and top-p"):
        for n in N_SAMPLED:
            gpus_by_kernels: dict[tuple[str, ...], list[str]] = {}
            for gpu in GPUS:
                StubGpu.gpu = gpu
                k = torch.full((n,), 20, dtype=torch.int32) if "top-k" in restriction else None
                p = torch.full((n,), 0.9) if "top-p" in restriction else None
                with spied_kernels() as called:
                    topk_topp_sampler.TopKTopPSampler().forward(torch.rand(n, VOCABULARY), {}, k, p)
                gpus_by_kernels.setdefault(tuple(called), []).append(gpu.name)
            rows += [
                {"cut": restriction, "requests": n, "kernels": list(kernels), "gpus": gpus}
                for kernels, gpus in gpus_by_kernels.items()
            ]
    return rows


def offloading(model: str) -> dict[str, Any]:
    """What ``--kv-offloading-size 8`` switches on."""
    given = {"kv_offloading_size": 8.0, "kv_offloading_backend": "native"}
    config = engine_config(model, H100, **given)
    transfer = config.kv_transfer_config
    return {
        "given": given,
        "kv_connector": transfer.kv_connector,
        "kv_connector_extra_config": transfer.kv_connector_extra_config,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "disable_hybrid_kv_cache_manager": config.scheduler_config.disable_hybrid_kv_cache_manager,
    }


def recorded_defaults(model: str) -> dict[str, Any]:
    """All of it."""
    config = engine_config(model, H100)
    return {
        "vllm_version": vllm_version,
        "scheduler": fields(config.scheduler_config, SCHEDULER_FIELDS),
        "cache": fields(config.cache_config, CACHE_FIELDS),
        "performance_mode": getattr(config, "performance_mode", ABSENT),
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "generation_config": config.model_config.generation_config,
        "runner_v2": getattr(config, "use_v2_model_runner", ABSENT),
        "limits": limits(model),
        "short_limits": short_limits(model),
        "performance_modes": performance_modes(model),
        "capture_sizes": capture_sizes(model),
        "sampler": sampler_paths(),
        "kv_offloading": offloading(model),
    }


def as_text(record: dict[str, Any]) -> str:
    """JSON with one row of a table a line."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the recordings; writes OUT/defaults/VERSION.json"
    )
    out = parser.parse_args().out / "defaults" / f"{vllm_version}.json"
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(MODEL))
        record = recorded_defaults(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_text(record), encoding="utf-8")
    print(f"{out}: {out.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
