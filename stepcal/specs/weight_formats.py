"""How many bytes a stored weight takes, read where a checkpoint says it: by group of weights, scales included.

Formats: AWQ, GPTQ, FP8, compressed-tensors, modelopt, bitsandbytes and MXFP4. The embedding is never quantised, the output
matrix only where the file says so, and what is listed as ignored keeps 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepcal.errors import InputError, NotModelledError, shown
from stepcal.specs.config_values import ConfigValues

BYTES_PER_ELEMENT = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "fp4": 0.5,
    "mxfp4": 0.5,
}
"""Storage of one weight without its scales, bytes. IEEE 754, OCP FP8 and OCP MX widths."""
BITS_PER_BYTE = 8
SCALE_BITS = 16
"""A scale is a 16-bit number in AWQ, GPTQ and compressed-tensors."""
FULL_WIDTH = 2.0
"""vLLM runs models in 16 bits: also those whose checkpoint is float32 (``--dtype auto``)."""
FLOAT32_NAMES = ("float32", "float", "fp32")
_DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16"}
_FP4_GROUP = {"nvfp4": (16, 8), "mxfp4": (32, 8)}
"""Weights that share a scale, and the scale's bits."""
_LONGEST_PATTERN = 500
_NESTED_REPEAT = re.compile(r"\([^)]*[*+{][^)]*\)[*+{]")
"""Repetitions of repetitions, whose matching may take forever."""

LAYER_MODULES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj"),
}
"""Names by which lists of ignored modules speak of the matrices of a layer."""
_OTHER_NAMES = {
    "mlp.experts.0.gate_proj": ("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts", "mlp.experts"),
    "mlp.experts.0.up_proj": ("block_sparse_moe.experts.0.w3", "block_sparse_moe.experts", "mlp.experts"),
    "mlp.experts.0.down_proj": ("block_sparse_moe.experts.0.w2", "block_sparse_moe.experts", "mlp.experts"),
    "self_attn.q_proj": ("self_attn.qkv_proj", "self_attn"),
    "self_attn.k_proj": ("self_attn.qkv_proj", "self_attn"),
    "self_attn.v_proj": ("self_attn.qkv_proj", "self_attn"),
    "self_attn.o_proj": ("self_attn.out_proj", "self_attn"),
    "mlp.gate_proj": ("mlp.gate_up_proj", "mlp", "mlp.shared_experts.gate_proj"),
    "mlp.up_proj": ("mlp.gate_up_proj", "mlp", "mlp.shared_experts.up_proj"),
    "mlp.down_proj": ("mlp", "mlp.shared_experts.down_proj"),
}


@dataclass(frozen=True)
class WeightWidths:
    """Bytes of one stored weight, scales included, by group of weights.

    Parameters
    ----------
    attention, mlp, experts : float
        Projections of attention, dense and shared MLPs, and routed experts.
    embedding, head : float
        Input embedding and output matrix. Norms, biases and routers have 16 bits.
    """

    attention: float = FULL_WIDTH
    mlp: float = FULL_WIDTH
    experts: float = FULL_WIDTH
    embedding: float = FULL_WIDTH
    head: float = FULL_WIDTH


@dataclass(frozen=True)
class _Format:
    """A width, and which modules have it."""

    dtype: str
    bytes_per_weight: float
    is_quantised: Callable[[str], float | None]
    """Bytes of a module that differs, by its name; None where it has `bytes_per_weight`."""
    quantises_head: bool = False


def read_weight_format(
    config: Mapping[str, Any], values: ConfigValues, origin: str, *, layers: int, is_mixture: bool
) -> dict[str, Any]:
    """Return `weight_dtype`, `weight_widths` and `kv_precision` of an architecture.

    Parameters
    ----------
    config : mapping
        The whole file; the quantisation of a multimodal checkpoint stands at the top level.
    values : ConfigValues
        Of the language model.
    origin : str
    layers : int
    is_mixture : bool

    Raises
    ------
    NotModelledError
        If the quantisation is not known, or the checkpoint asks for a KV cache in other than FP8 or 16 bits.
    """
    section = config.get("quantization_config") or values.raw("quantization_config") or config.get("compression_config")
    dtype = _full_dtype(config, values, origin)
    if not section:
        return {"weight_dtype": dtype, "weight_widths": WeightWidths()}
    if not isinstance(section, Mapping):
        raise InputError(f"{origin}: `quantization_config` is {shown(section)}; it must be an object.")
    kv_precision = _kv_precision(section, origin)
    kind = _format(section, origin)
    groups = {group: _mean_width(kind, modules, layers) for group, modules in LAYER_MODULES.items()}
    head = kind.is_quantised("lm_head")
    head_width = (kind.bytes_per_weight if head is None else head) if kind.quantises_head else FULL_WIDTH
    if not is_mixture:
        groups["experts"] = groups["mlp"]
    widths = WeightWidths(**groups, head=head_width)
    return {"weight_dtype": kind.dtype, "weight_widths": widths, "kv_precision": kv_precision}


def online_widths(method: str) -> tuple[str, WeightWidths] | None:
    """Return dtype and widths of a 16-bit checkpoint that vLLM quantises while it loads; None if it does not do that."""
    if method == "fp8":
        return "fp8", WeightWidths(attention=1.0, mlp=1.0, experts=1.0)
    return None


def _full_dtype(config: Mapping[str, Any], values: ConfigValues, origin: str) -> str:
    """Type that vLLM runs the model in, where nothing is quantised."""
    stated = values.raw("torch_dtype") or values.raw("dtype") or config.get("torch_dtype") or config.get("dtype")
    name = "bfloat16" if stated is None else str(stated).removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if name in FLOAT32_NAMES:
        return "bfloat16"
    if name not in ("float16", "bfloat16"):
        raise InputError(
            f"{origin} has `torch_dtype` {shown(name)}; stepcal knows float32 (which vLLM runs in 16 bits), float16 and "
            "bfloat16."
        )
    return name


def _kv_precision(section: Mapping[str, Any], origin: str) -> str:
    """What vLLM keeps the KV cache in with ``--kv-cache-dtype auto``: FP8 where the checkpoint brings scales for it."""
    inner = section.get("quantization") if isinstance(section.get("quantization"), Mapping) else section
    for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
        asked = inner.get(key) if isinstance(inner, Mapping) else None
        if not asked:
            continue
        is_fp8 = str(asked).upper() == "FP8"
        if isinstance(asked, Mapping):
            is_fp8 = (asked.get("num_bits"), asked.get("type")) == (8, "float") and not asked.get("dynamic")
        if not is_fp8:
            raise NotModelledError(
                f"{origin} asks for a quantised KV cache (`{key}: {shown(asked)}`), which stepcal does not model: it "
                "models KV caches of 16 bits and, with static scales, FP8. Set it to null if the server runs with "
                "another `--kv-cache-dtype`."
            )
        return "fp8"
    return "bf16"


def _format(section: Mapping[str, Any], origin: str) -> _Format:
    method = str(section.get("quant_method") or "").lower()
    if not method and (section.get("quant_algo") or isinstance(section.get("quantization"), Mapping)):
        method = "modelopt"
    if not method and section.get("config_groups"):
        method = "compressed-tensors"
    reader = next((read for name, read in _READERS.items() if method == name or method.startswith(f"{name}_")), None)
    found = None if reader is None else reader(section, origin)
    if found is None:
        raise NotModelledError(
            f"{origin} declares the quantisation {_named(method)} (`quantization_config`), whose width stepcal does "
            f"not know. Quantisations it knows: {', '.join(_READERS)}."
        )
    return found


def _named(method: str) -> str:
    return f"`{method[:40]}`" if method else "of no name"


def _bits(section: Mapping[str, Any], origin: str, *names: str) -> int | None:
    value = next((section[name] for name in names if section.get(name) is not None), None)
    if value is None:
        return None
    try:
        bits = int(value) if not isinstance(value, bool) else 0
    except (TypeError, ValueError, OverflowError):
        bits = 0
    if bits not in (2, 3, 4, 8):
        raise InputError(f"{origin}: `{names[0]}` of `quantization_config` is {shown(value)}; it must be 2, 3, 4 or 8.")
    return bits


def _grouped(section: Mapping[str, Any], bits: int, *, has_zeros: bool) -> float:
    """Bytes of a weight, its share of the group's scale and zero point included."""
    group = section.get("group_size", section.get("q_group_size"))
    if isinstance(group, bool) or not isinstance(group, int) or group <= 0:  # -1: a scale a channel
        return bits / BITS_PER_BYTE
    return (bits + (SCALE_BITS + (bits if has_zeros else 0)) / group) / BITS_PER_BYTE


def _awq(section: Mapping[str, Any], origin: str) -> _Format | None:
    bits = _bits(section, origin, "bits", "w_bit")
    if bits is None:
        return None
    width = _grouped(section, bits, has_zeros=section.get("zero_point") is True)
    return _Format(f"int{bits}" if bits in (4, 8) else "int4", width, _skips(section, "modules_to_not_convert"))


def _gptq(section: Mapping[str, Any], origin: str) -> _Format | None:
    bits = _bits(section, origin, "bits", "w_bit")
    if bits is None:
        return None
    width = _grouped(section, bits, has_zeros=section.get("sym") is False)
    dynamic = section.get("dynamic")
    rules = [
        (str(rule).startswith("-:"), _matcher([f"re:{str(rule).removeprefix('-:').removeprefix('+:')}"]), changes)
        for rule, changes in (dynamic.items() if isinstance(dynamic, Mapping) else ())
        if isinstance(changes, Mapping)
    ]

    def differs(module: str) -> float | None:
        for excludes, is_meant, changes in rules:
            if is_meant(module):
                own = None if excludes else _bits(changes, origin, "bits")
                changed = width if own is None else _grouped({**section, **changes}, own, has_zeros=False)
                return FULL_WIDTH if excludes else changed
        return None

    return _Format(f"int{bits}" if bits in (4, 8) else "int4", width, differs, section.get("lm_head") is True)


def _fp8(section: Mapping[str, Any], origin: str) -> _Format | None:
    del origin
    names = "modules_to_not_convert" if section.get("modules_to_not_convert") else "ignored_layers"
    return _Format("fp8", 1.0, _skips(section, names))


def _compressed_tensors(section: Mapping[str, Any], origin: str) -> _Format | None:
    sparsity = section.get("sparsity_config")
    structure = sparsity.get("sparsity_structure") if isinstance(sparsity, Mapping) else None
    if structure not in (None, "dense", "unstructured") or "24" in str(section.get("format")):
        raise NotModelledError(
            f"{origin} has weights in a sparse layout (`quantization_config`), which is not modelled."
        )
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        # The short form of FP8 checkpoints names the format alone.
        return (
            _Format("fp8", 1.0, _skips(section, "ignore")) if "float-quantized" in str(section.get("format")) else None
        )
    widths: list[tuple[Callable[[str], bool], str, float]] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        bits = _bits(weights, origin, "num_bits")
        if bits is None:
            raise InputError(f"{origin}: `config_groups.{str(name)[:40]}.weights` lacks `num_bits`.")
        kind = str(weights.get("type") or "int")
        dtype = "fp8" if (kind, bits) == ("float", 8) else "fp4" if (kind, bits) == ("float", 4) else f"int{bits}"
        if dtype == "fp4":
            size, scale = _FP4_GROUP["nvfp4"]
            width = (bits + scale / size) / BITS_PER_BYTE
        else:
            has_zeros = weights.get("symmetric") is False
            width = _grouped(weights, bits, has_zeros=has_zeros)
        targets = group.get("targets") if isinstance(group.get("targets"), list) else ["Linear"]
        patterns = [str(t) for t in targets or ["Linear"]]
        widths.append((_matcher(patterns) if "Linear" not in patterns else _every, dtype, width))
    dtype, width = widths[0][1:]
    dtype = dtype if dtype in BYTES_PER_ELEMENT else "int4"
    skips = _skips(section, "ignore")

    def differs(module: str) -> float | None:
        if (skipped := skips(module)) is not None:
            return skipped
        return next((own for is_meant, _, own in widths if is_meant(module)), FULL_WIDTH)

    return _Format(dtype, width, differs, quantises_head=True)


def _modelopt(section: Mapping[str, Any], origin: str) -> _Format | None:
    del origin
    inner = section["quantization"] if isinstance(section.get("quantization"), Mapping) else section
    algorithm = str(inner.get("quant_algo") or section.get("quant_method") or "").upper()
    skips = _skips(inner, "exclude_modules" if inner.get("exclude_modules") else "ignore")
    if algorithm in ("NVFP4", "FP4", "MODELOPT_FP4"):
        size, scale = _FP4_GROUP["nvfp4"]
        return _Format("fp4", (4 + scale / size) / BITS_PER_BYTE, skips)
    if algorithm.startswith("FP8"):
        return _Format("fp8", 1.0, skips)
    return None


def _bitsandbytes(section: Mapping[str, Any], origin: str) -> _Format | None:
    del origin
    skips = _skips(section, "llm_int8_skip_modules")
    if section.get("load_in_4bit") is True:
        # Blocks of 64 weights share a 32-bit scale, or an 8-bit one where the scales are quantised again.
        scale = 8 if section.get("bnb_4bit_use_double_quant") is True else 32
        return _Format("int4", (4 + scale / 64) / BITS_PER_BYTE, skips)
    return _Format("int8", 1.0, skips) if section.get("load_in_8bit") is True else None


def _mxfp4(section: Mapping[str, Any], origin: str) -> _Format | None:
    del origin
    size, scale = _FP4_GROUP["mxfp4"]
    width = (4 + scale / size) / BITS_PER_BYTE
    skips = _skips(section, "modules_to_not_convert")
    return _Format("mxfp4", width, lambda m: skips(m) if ".experts." in m else FULL_WIDTH)


_READERS: dict[str, Callable[[Mapping[str, Any], str], _Format | None]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}


def _mean_width(kind: _Format, modules: tuple[str, ...], layers: int) -> float:
    """Bytes of a weight of a group, averaged over its modules and layers."""
    total = 0.0
    for module in modules:
        for layer in range(layers):
            own = kind.is_quantised(f"model.layers.{layer}.{module}")
            total += kind.bytes_per_weight if own is None else own
    return total / (len(modules) * layers)


def _skips(section: Mapping[str, Any], key: str) -> Callable[[str], float | None]:
    """A test of modules against a list of those that keep 16 bits."""
    listed = section.get(key)
    is_listed = _matcher([str(p) for p in listed] if isinstance(listed, list) else [])
    return lambda module: FULL_WIDTH if is_listed(module) else None


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """A test whether any of several patterns means a module, by any of the module's names.

    A pattern is a part of a dotted name (``lm_head``, ``layers.0.mlp``), a glob (``model.layers.*.self_attn``) or, after
    ``re:``, a regular expression.
    """
    plain = {p for p in patterns if not p.startswith("re:") and "*" not in p}
    globs = [re.escape(p).replace(r"\*", "[^ ]*") + "$" for p in patterns if not p.startswith("re:") and "*" in p]
    compiled = [_compiled(p) for p in (*globs, *(p[3:] for p in patterns if p.startswith("re:")))]

    def is_meant(module: str) -> bool:
        for name in _names(module):
            parts = name.split(".")
            spans = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
            if any(span in plain for span in spans) or any(c.match(name) for c in compiled):
                return True
        return False

    return is_meant


def _every(module: str) -> bool:
    """Targets `Linear`: every matrix."""
    return bool(module)


def _names(module: str) -> Iterator[str]:
    """The names under which a module goes: its own and those of fused and of whole blocks."""
    yield module
    front, dot, rest = module.partition("model.layers.")
    if not dot:
        return
    number, _, inner = rest.partition(".")
    for other in _OTHER_NAMES.get(inner, ()):
        yield f"{front}model.layers.{number}.{other}"


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _LONGEST_PATTERN or _NESTED_REPEAT.search(pattern):
        raise InputError(
            f"A pattern of `quantization_config` is too complex to match: {shown(pattern)}. Write it plainly."
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise InputError(f"A pattern of `quantization_config` is no regular expression: {shown(pattern)}.") from None
