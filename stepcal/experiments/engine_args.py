"""What an ``exp-config.yaml`` says of a server, under the names that people use, and what stands in for what it leaves out.

What is assumed is noted: a limit that is absent is vLLM's own default, KV blocks are estimated from the GPU's memory, and a
GPU or a tensor-parallel degree that the file does not name may stand in the run's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepcal.documents import read_yaml
from stepcal.errors import InputError, NotModelledError, shown
from stepcal.experiments.vllm_flags import flags_of, human_number
from stepcal.simulator import ServerConfig
from stepcal.simulator.config import NOT_MODELLED, check_block_size
from stepcal.simulator.versions import OLDEST, VllmRelease, release_of, version_note
from stepcal.specs.architecture import ModelArchitecture
from stepcal.specs.hardware import FILE_ENDINGS, Accelerator, load_accelerator, named_in_text, resolve_accelerator
from stepcal.specs.kv_cache import AUTO, KvCache, block_size_of, kv_precision_of
from stepcal.specs.kv_offloading import offload_blocks, offloading_notes
from stepcal.specs.weight_formats import online_widths
from stepcal.units import BYTES_PER_GIB

DEFAULT_ACCELERATOR = "h100-sxm"
CONFIG_NAMES = ("exp-config.yaml", "exp-config.yml")
MODEL_KEYS = ("model", "model_name")
GPU_KEYS = ("gpu", "accelerator", "gpu_name", "gpu_type", "hardware")
TENSOR_PARALLEL_KEYS = ("tensor_parallelism", "tensor_parallel", "tensor_parallel_size", "tp")
KV_BLOCK_KEYS = ("kv_blocks_total_gpu", "num_gpu_blocks", "kv_blocks", "kv_blocks_total", "num_gpu_blocks_override")
HYBRID_KEY = "disable_hybrid_kv_cache_manager"
CHUNKED_KEY = "enable_chunked_prefill"
SWITCHES = ("enable_prefix_caching", "async_scheduling", CHUNKED_KEY, HYBRID_KEY)
POLICY_KEY, THRESHOLD_KEY = "scheduling_policy", "long_prefill_token_threshold"
VERSION_KEY = "vllm_version"
OPTIONS = Path("the options")
"""Stands for a file where all settings are options of a command."""
KV_BYTES_KEY = "kv_cache_memory_bytes"
DTYPES = ("auto", "half", "float16", "bfloat16", "fp16", "bf16")
QUANTISATIONS = {
    "awq": ("int4",), "awq_marlin": ("int4",), "gptq": ("int4", "int8"), "gptq_marlin": ("int4", "int8"), "fp8": ("fp8",),
    "modelopt": ("fp8",), "modelopt_fp4": ("fp4",), "mxfp4": ("mxfp4",), "bitsandbytes": ("int4", "int8"),
}  # fmt: skip
"""Widths that a checkpoint can have for each of vLLM's methods."""
OFFLOAD_KEY = "kv_offloading_size"
MEMORY_MIB = {
    "h100-sxm": 81_559,
    "h100-nvl": 95_830,
    "h200-sxm": 143_771,
    "a100-80gb": 81_920,
    "l40s": 46_068,
    "b200": 183_359,
    "b300-sxm": 275_040,
    "gb200": 189_471,
    "gb300": 284_208,
    "rtx-pro-6000": 97_887,
}
"""Memory as nvidia-smi reports it; datasheets round."""
OVERHEAD_GIB = 0.8
OVERHEAD_OF_RANKS_GIB = 0.5
"""Activations, CUDA graphs and, with several ranks, collectives: what the logged KV blocks of four H100 servers leave."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run by name, and the file they were read from.

    Attributes
    ----------
    path : Path
    values : dict
        By vLLM's names (`stepcal.experiments.vllm_flags`).
    notes : tuple of str
        On settings that may matter and do not act.
    """

    path: Path
    values: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> str:
        """Name of the run's folder."""
        return self.path.resolve().parent.name

    def find(self, names: Iterable[str]) -> tuple[str, Any] | None:
        """Return the first of several names for one setting that is given, and its value.

        Raises
        ------
        InputError
            If two of them are given and disagree.
        """
        given = [(name, self.values[name]) for name in names if self.values.get(name) is not None]
        if any(value != given[0][1] for _, value in given):
            both = " and ".join(f"`{name}: {shown(value)}`" for name, value in given)
            raise InputError(f"{self.path} has {both}, which are names for one setting. Keep the one that holds.")
        return given[0] if given else None

    def whole(self, *names: str) -> int | None:
        """Return a whole number by any of its names, None where it is absent.

        Raises
        ------
        InputError
            If the value is not a whole number.
        """
        found = self.find(names)
        if found is None:
            return None
        name, value = found[0], human_number(found[1])
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or number != value or isinstance(value, bool):
            raise InputError(f"{self.path}: `{name}` is {shown(value)}; it must be a whole number.")
        return number


def read_settings(run: Path) -> Settings:
    """Read the ``exp-config.yaml`` of a run's folder.

    Raises
    ------
    InputError
        If it is absent, no YAML, or no mapping.
    """
    as_written = settings_as_written(run)
    values, notes = flags_of(as_written.values, as_written.path)
    return Settings(as_written.path, values, tuple(notes))


def settings_as_written(run: Path) -> Settings:
    """Read the same file without asking whether its flags are modelled, as `read_settings` does.

    Raises
    ------
    InputError
        If it is absent, no YAML, or no mapping.
    """
    path = next((run / name for name in CONFIG_NAMES if (run / name).is_file()), run / CONFIG_NAMES[0])
    return Settings(path, read_yaml(path, what="file of settings"), ())


def accelerator_of(settings: Settings, default: str | None) -> tuple[Accelerator, list[str]]:
    """Return the GPU of a run, and notes where the file does not name it.

    The file's word goes first, then `default`, then a GPU in the run's name, and last H100 SXM.

    Parameters
    ----------
    settings : Settings
    default : str or None

    Raises
    ------
    InputError
        If the name is of no GPU that ships.
    """
    found = settings.find(GPU_KEYS)
    if found is not None:
        return resolve_accelerator(_beside(str(found[1]), settings.path)), []
    if default is not None:
        return resolve_accelerator(default), []
    way_out = f"Name it as `{GPU_KEYS[0]}` in {settings.path.name}, or give --accelerator."
    in_name = named_in_text(settings.run)
    if in_name is not None:
        return load_accelerator(in_name), [f"the GPU is `{in_name}` by the run's name. {way_out}"]
    return load_accelerator(DEFAULT_ACCELERATOR), [f"no GPU is named; `{DEFAULT_ACCELERATOR}` was assumed. {way_out}"]


def _beside(gpu: str, config: Path) -> str:
    """The path of a GPU's own file, which a setting names relative to the file that it stands in; else the name."""
    own = config.parent / gpu
    return str(own) if gpu.lower().endswith(FILE_ENDINGS) and own.is_file() else gpu


def tensor_parallel_of(settings: Settings) -> tuple[int, list[str]]:
    """Return the tensor-parallel degree, and notes where the file does not name it.

    Raises
    ------
    InputError
        If it is not a whole number.
    """
    given = settings.whole(*TENSOR_PARALLEL_KEYS)
    if given is not None:
        return given, []
    in_name = re.search(r"(?:^|[^a-z])tp(\d+)(?:[^a-z0-9]|$)", settings.run.lower())
    degree, source = (int(in_name.group(1)), "the run's name") if in_name else (1, "vLLM's default")
    return degree, [f"`{TENSOR_PARALLEL_KEYS[0]}` is absent; {degree} by {source}."]


def server_of(
    settings: Settings,
    architecture: ModelArchitecture,
    accelerator: Accelerator,
    *,
    tensor_parallel: int,
    kv_blocks: int | None = None,
    kv_offloading_gib: float | None = None,
) -> tuple[ServerConfig, list[str]]:
    """Return the scheduler's limits, and notes on those that the file leaves out.

    Parameters
    ----------
    settings : Settings
    architecture : ModelArchitecture
    accelerator : Accelerator
    tensor_parallel : int
    kv_blocks : int, optional
        From elsewhere, where the file does not say; estimated from the GPU's memory if neither does.
    kv_offloading_gib : float, optional
        Size of the pool in CPU memory where the file does not say; without one KV offloading is off, as by vLLM's default.

    Raises
    ------
    NotModelledError
        If a setting asks for what the simulator does not model.
    InputError
        If a setting is of the wrong kind or out of bounds.
    """
    version, of_version = _version(settings)
    release = release_of(version)
    limits, notes = _limits(settings, architecture, accelerator, release)
    kv_precision = kv_precision_of(kv_cache_dtype_of(settings), architecture)
    asked = settings.whole("block_size")
    asked = None if asked is None else check_block_size(asked)
    block_size, of_blocks = block_size_of(asked, architecture, accelerator, version, kv_precision)
    limits |= {"block_size": block_size}
    notes += of_blocks
    offloads = bool(settings.values.get(OFFLOAD_KEY, kv_offloading_gib))
    is_off = bool(settings.values.get(HYBRID_KEY, offloads and release.drops_groups_with_connector))
    windows = architecture.windows_of(version)
    windows = None if windows is None else windows.in_cache(is_hybrid_cache_off=is_off)
    cache = KvCache(architecture, windows, tensor_parallel, block_size, kv_precision, version)
    offload, more = _offload_blocks(settings, cache, kv_offloading_gib)
    notes += more
    limits |= {THRESHOLD_KEY: settings.whole(THRESHOLD_KEY) or 0}
    arguments = (n for n in (*SWITCHES, POLICY_KEY, *NOT_MODELLED) if n != OFFLOAD_KEY)
    others = {n: settings.values[n] for n in arguments if settings.values.get(n) is not None}
    for name in SWITCHES:
        if not isinstance(others.get(name, True), bool):
            raise InputError(f"{settings.path}: `{name}` is {others[name]!r}; it must be true or false.")
    given = settings.whole(*KV_BLOCK_KEYS)
    blocks = kv_blocks if given is None else given
    if blocks is None and settings.values.get(KV_BYTES_KEY) is not None:
        blocks, note = _blocks_in(settings, cache)
        notes.append(note)
    if blocks is None:
        share = settings.values.get("gpu_memory_utilization", release.gpu_memory_utilization)
        blocks, note = _estimated_blocks(settings, cache, accelerator, share)
        notes.append(note)
    limits |= {"offload_blocks": offload}
    arguments_given = {"kv_blocks": blocks, **limits, **others, "vllm_version": version}
    server = ServerConfig.from_vllm_arguments(arguments_given)
    if settings.values.get(OFFLOAD_KEY) is not None:
        notes += offloading_notes(server)
    return server, notes + of_version


def kv_cache_dtype_of(settings: Settings) -> str:
    """Return `kv_cache_dtype` of a run, vLLM's default where it is not given."""
    return str(settings.values.get("kv_cache_dtype") or AUTO)


def _blocks_in(settings: Settings, cache: KvCache) -> tuple[int, str]:
    """KV blocks that fit into the memory of `kv_cache_memory_bytes`, which vLLM takes for each GPU, and a note."""
    size = settings.whole(KV_BYTES_KEY) or 0
    blocks = int(size // cache.block_bytes)
    if blocks < 2:
        raise InputError(
            f"{settings.path}: `{KV_BYTES_KEY}` is {size:,}, which holds no two KV blocks of {cache.architecture.name}."
        )
    return blocks, f"{blocks:,} KV blocks fit into `{KV_BYTES_KEY}: {size:,}` of each GPU."


def served_architecture(settings: Settings, architecture: ModelArchitecture) -> tuple[ModelArchitecture, list[str]]:
    """Return the model as the server runs it (`quantization`, `dtype`), and notes.

    Raises
    ------
    NotModelledError
        If it runs in 32 bits, or is quantised while it loads in a way that stepcal does not know.
    InputError
        If `quantization` contradicts the checkpoint, or `max_model_len` exceeds what the model can.
    """
    dtype = str(settings.values.get("dtype") or "auto").removeprefix("torch.").lower()
    if dtype not in DTYPES:
        raise NotModelledError(
            f"`dtype: {dtype[:40]}` asks for what is not modelled: models that run in other than 16 bits. It models "
            f"{', '.join(DTYPES)}."
        )
    longest = settings.whole("max_model_len")
    if longest is not None:
        architecture.check_max_model_len(longest, f"{settings.path}: ")
    method = str(settings.values.get("quantization") or "").lower()
    if not method or method == "none":
        return architecture, []
    is_quantised = architecture.weight_dtype not in ("float16", "bfloat16")
    if is_quantised:
        expected = QUANTISATIONS.get(method)
        if expected is not None and architecture.weight_dtype not in expected:
            raise InputError(
                f"{settings.path}: `quantization: {method[:40]}` does not fit the checkpoint of `{architecture.name}`, "
                f"whose weights are {architecture.weight_dtype} (config.json)."
            )
        return architecture, []
    online = online_widths(method)
    if online is None:
        raise NotModelledError(
            f"`quantization: {method[:40]}` needs a checkpoint that says so, and that of `{architecture.name}` does not "
            "(`quantization_config` in config.json). Put the config.json of the quantised model into the run's folder."
        )
    narrow = replace(architecture, weight_dtype=online[0], weight_widths=online[1])
    return narrow, [f"`quantization: {method}`: the weights of the layers are taken to be {online[0]} from loading on."]


def _version(settings: Settings) -> tuple[str, list[str]]:
    """Release of vLLM, and a note where it was not recorded or is not given: then it is the one of the study's servers."""
    given = settings.values.get(VERSION_KEY)
    if given is None:
        return OLDEST, [f"`{VERSION_KEY}` is absent; {OLDEST}, on which the coefficients were calibrated, was assumed."]
    note = version_note(str(given))
    return str(given), [] if note is None else [note]


def _offload_blocks(settings: Settings, cache: KvCache, assumed_gib: float | None) -> tuple[int, list[str]]:
    """KV blocks of the pool in CPU memory, and a note where its size was assumed."""
    given = settings.values.get(OFFLOAD_KEY)
    backend = str(settings.values.get("kv_offloading_backend") or "native")
    if backend != "native" and given:
        raise NotModelledError(
            f"`kv_offloading_backend: {backend}` asks for what the simulator does not model: KV offloading other than "
            "vLLM's own (`native`)."
        )
    gib = assumed_gib if given is None else given
    if isinstance(gib, bool) or not isinstance(gib, int | float | None):
        raise InputError(f"{settings.path}: `{OFFLOAD_KEY}` is {gib!r}; it must be a number of GiB, 0 for none.")
    blocks = offload_blocks(cache.architecture, gib or 0.0, block_size=cache.block_size, cache=cache)
    is_assumed = given is None and assumed_gib is not None
    note = f"`{OFFLOAD_KEY}` is absent; {assumed_gib:g} GiB was assumed." if is_assumed else ""
    return blocks, [note] if note else []


def _limits(
    settings: Settings, architecture: ModelArchitecture, accelerator: Accelerator, release: VllmRelease
) -> tuple[dict[str, int], list[str]]:
    """Limits of a step and of a request; where absent, as vLLM's API server chooses them."""
    notes = []
    defaults = release.limits_on(accelerator.name, _memory_gib(accelerator))
    longest = settings.whole("max_model_len")
    if longest is None:
        longest = architecture.max_position_embeddings
        notes.append(f"`max_model_len` is absent; {longest:,}, the model's own, was assumed.")
    tokens, seqs = settings.whole("max_num_batched_tokens"), settings.whole("max_num_seqs")
    budget = defaults.max_num_batched_tokens if tokens is None else tokens
    most = defaults.max_num_seqs if seqs is None else seqs
    if tokens is None and settings.values.get(CHUNKED_KEY) is False:
        budget = max(budget, longest)
    budget = min(budget, most * longest) if tokens is None else budget
    most = min(most, budget) if seqs is None else most
    for name, given, value in (("max_num_batched_tokens", tokens, budget), ("max_num_seqs", seqs, most)):
        if given is None:
            notes.append(f"`{name}` is absent; {value:,}, vLLM's default on {accelerator.name}, was assumed.")
    return {"max_model_len": longest, "max_num_batched_tokens": budget, "max_num_seqs": most}, notes


def _estimated_blocks(settings: Settings, cache: KvCache, accelerator: Accelerator, share: Any) -> tuple[int, str]:
    """KV blocks that fit beside the weights, and a note that says so."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"{settings.path}: `gpu_memory_utilization` is {share!r}; it must be above 0 and at most 1.")
    architecture, tensor_parallel = cache.architecture, cache.tensor_parallel
    weights_gib = architecture.weights_bytes_of_a_rank(tensor_parallel) / BYTES_PER_GIB
    overhead_gib = OVERHEAD_GIB + (OVERHEAD_OF_RANKS_GIB if tensor_parallel > 1 else 0.0)
    left_gib = share * _memory_gib(accelerator) - weights_gib - overhead_gib
    blocks = int(left_gib / (cache.block_bytes / BYTES_PER_GIB))
    where = "as `--kv-blocks`" if settings.path == OPTIONS else f"as `{KV_BLOCK_KEYS[0]}` in {settings.path}"
    way_out = f"vLLM logs the number at start-up; give it {where}."
    if blocks < 2:
        raise InputError(
            f"{settings.path}: how many KV blocks the server had is not said, and the weights of {architecture.name} "
            f"({weights_gib:.1f} GiB a rank) leave no room for any on {accelerator.name}. Take more ranks, a larger GPU or "
            f"narrower weights. If the server ran: {way_out}"
        )
    return blocks, f"KV blocks are not given; {blocks:,} were estimated from the GPU's memory. {way_out}"


def _memory_gib(accelerator: Accelerator) -> float:
    reported = MEMORY_MIB.get(accelerator.name)
    return accelerator.hbm_capacity_bytes / BYTES_PER_GIB if reported is None else reported / 1024
