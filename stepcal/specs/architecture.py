"""What a transformer costs is fixed by a dozen integers; this module reads them from any HuggingFace ``config.json``.

`ModelArchitecture` holds the integers, counts parameters, and says which tensor-parallel degrees fit. It knows nothing
of data or fits.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepcal.errors import InputError, NotModelledError
from stepcal.locations import data_folder

BYTES_PER_ELEMENT = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
"""Storage of one weight, bytes. IEEE 754 and OCP FP8 widths."""

UNGATED_MODEL_TYPES = frozenset(
    {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2"}
)
"""Model types whose MLP has two matrices (up, down); every other one is taken to be gated (three)."""

ATTENTION_NOT_MODELLED = {
    "kv_lora_rank": "multi-head latent attention",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
    "linear_num_key_heads": "linear attention",
}
FULL_ATTENTION_LAYERS = frozenset({"full_attention", "global"})


@dataclass(frozen=True)
class ModelArchitecture:
    """The dimensions of a decoder-only transformer.

    Parameters
    ----------
    name : str
        How reports call the model.
    hidden_size, num_layers, num_attention_heads, num_kv_heads, head_dim, vocab_size : int
        As in ``config.json`` (`num_hidden_layers`, `num_key_value_heads`).
    intermediate_size : int
        Width of a dense MLP. In a mixture whose layers are all sparse, the width of one expert.
    num_experts, experts_per_token : int
        Routed experts a mixture layer holds and each token visits; 1 and 1 for a dense model.
    expert_intermediate_size : int
        Width of one routed expert (`intermediate_size` for a dense model).
    shared_expert_intermediate_size : int
        Summed width of the experts that every token visits, 0 if none.
    num_moe_layers : int
        Layers with a mixture; the other layers have a dense MLP.
    mlp_matrices : int
        3 for a gated MLP (gate, up, down), 2 otherwise.
    attention_bias, tie_word_embeddings : bool
    max_position_embeddings : int
    weight_dtype : str
        A key of `BYTES_PER_ELEMENT`; ``fp8`` and the like where a quantisation is declared.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 1
    experts_per_token: int = 1
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    num_moe_layers: int = 0
    mlp_matrices: int = 3
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    weight_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise InputError(f"`{field}` of `{self.name}` is {getattr(self, field)}; it must be at least 1.")
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"`{self.name}` sends each token to {self.experts_per_token} experts (`num_experts_per_tok`) "
                f"but has {self.num_experts}. Check `num_local_experts` in config.json."
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise InputError(
                f"The {self.num_attention_heads} attention heads of `{self.name}` do not share its "
                f"{self.num_kv_heads} KV heads evenly (`num_key_value_heads` in config.json)."
            )

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) in one layer: ``num_kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """Elements of one token's queries in one layer: ``num_attention_heads * head_dim``."""
        return self.num_attention_heads * self.head_dim

    @property
    def is_mixture(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return self.num_experts > 1

    @property
    def active_expert_fraction(self) -> float:
        """Share of a mixture's routed experts that one token visits; 1 for a dense model."""
        return self.experts_per_token / self.num_experts

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of one stored weight."""
        return BYTES_PER_ELEMENT[self.weight_dtype]

    def num_parameters(self) -> int:
        """Count the weights of a Llama-like checkpoint: matrices, biases of queries, keys and values, two norms a layer.

        Gates of shared experts, norms of queries and keys, and other biases, which some families add, are not counted;
        they are below a ten-thousandth of the whole.
        """
        h, bias = self.hidden_size, int(self.attention_bias)
        attention = h * (self.query_width + 2 * self.kv_width) + self.query_width * h
        attention += bias * (self.query_width + 2 * self.kv_width)
        dense_mlp = self.mlp_matrices * h * self.intermediate_size
        sparse_mlp = (
            self.mlp_matrices
            * h
            * (self.num_experts * self.expert_intermediate_size + self.shared_expert_intermediate_size)
        )
        router = h * self.num_experts
        layers = self.num_layers * (attention + 2 * h)
        layers += (self.num_layers - self.num_moe_layers) * dense_mlp + self.num_moe_layers * (sparse_mlp + router)
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + h

    def tensor_parallel_degrees(self) -> list[int]:
        """List the degrees that divide the attention heads, ascending."""
        return [tp for tp in range(1, self.num_attention_heads + 1) if self.num_attention_heads % tp == 0]

    def check_tensor_parallel(self, tensor_parallel: int) -> int:
        """Return `tensor_parallel` if it divides the attention heads.

        Raises
        ------
        InputError
            If it does not; the message lists the degrees that do.
        """
        if tensor_parallel not in self.tensor_parallel_degrees():
            degrees = ", ".join(map(str, self.tensor_parallel_degrees()))
            raise InputError(
                f"`tensor_parallel={tensor_parallel}` does not divide the {self.num_attention_heads} attention heads of "
                f"`{self.name}` (`num_attention_heads` in config.json). Degrees that fit: {degrees}."
            )
        return tensor_parallel

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path, *, name: str | None = None, max_model_len: int | None = None
    ) -> ModelArchitecture:
        """Read a HuggingFace ``config.json``.

        Parameters
        ----------
        config : mapping, str or Path
            The parsed file, or its path.
        name : str, optional
            Defaults to `_name_or_path` in the file, else the file's or its folder's name.
        max_model_len : int, optional
            The server's context limit. A sliding window at least this long never slides, and is accepted.

        Returns
        -------
        ModelArchitecture

        Raises
        ------
        InputError
            If the file is not JSON, a dimension is missing, or the attention is of a kind that is not modelled
            (sliding window, latent, linear, state space).
        """
        origin = "config"
        if not isinstance(config, Mapping):
            path = Path(config)
            origin, config = str(path), _read_json(path)
            name = (
                name or config.get("_name_or_path") or (path.parent.name if path.name == "config.json" else path.stem)
            )
        outer = config
        # Multimodal checkpoints nest the language model; the top level still declares the quantisation.
        config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
        _refuse_other_attention(config, origin, max_model_len)

        hidden, heads = (
            _integer(config, origin, "hidden_size", "n_embd"),
            _integer(config, origin, "num_attention_heads", "n_head"),
        )
        layers = _integer(config, origin, "num_hidden_layers", "n_layer")
        mixture = _mixture_fields(config, origin, layers)
        model_type = config.get("model_type", "")
        return cls(
            name=str(name or outer.get("_name_or_path") or "unnamed"),
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=_integer(config, origin, "vocab_size"),
            mlp_matrices=2 if model_type in UNGATED_MODEL_TYPES else 3,
            # Qwen2 has query, key and value biases that its config does not declare.
            attention_bias=bool(
                config.get("attention_bias", config.get("qkv_bias", model_type in ("qwen2", "qwen2_moe")))
            ),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=int(config.get("max_position_embeddings", 4096)),
            weight_dtype=_weight_dtype(outer, config, origin),
            **mixture,
        )


def load_architecture(name: str) -> ModelArchitecture:
    """Return one of the architectures that the project ships, by name or alias.

    Raises
    ------
    InputError
        If no row of ``data/architectures.csv`` bears the name; the message lists those that exist.
    """
    table = _shipped()
    if name not in table:
        names = ", ".join(sorted({a.name for a in table.values()}))
        raise InputError(
            f"Unknown model `{name}`. Models that ship: {names}. For another one give the path of its config.json."
        )
    return table[name]


def resolve_architecture(name_or_path: str, *, max_model_len: int | None = None) -> ModelArchitecture:
    """Return a shipped architecture by name, or read the ``config.json`` at a path.

    A file with the dimensions of a shipped model is that model, whatever it is called: fitted families go by its name.
    A sliding window at least as long as `max_model_len`, the server's context limit, never slides, and is accepted.
    """
    if not (name_or_path.endswith(".json") or Path(name_or_path).is_file()):
        return load_architecture(name_or_path)
    try:
        read = ModelArchitecture.from_config(name_or_path, max_model_len=max_model_len)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(
            f"{name_or_path} is not a transformer's config.json: a field has a value of the wrong kind ({error})."
        ) from None
    return next((known for known in _shipped().values() if replace(read, name=known.name) == known), read)


@functools.cache
def _shipped() -> dict[str, ModelArchitecture]:
    table: dict[str, ModelArchitecture] = {}
    with open(data_folder() / "architectures.csv", newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            experts = int(row["num_experts"])
            layers, width = int(row["num_layers"]), int(row["intermediate_size"])
            one = ModelArchitecture(
                name=row["name"],
                hidden_size=int(row["hidden_size"]),
                num_layers=layers,
                num_attention_heads=int(row["num_attention_heads"]),
                num_kv_heads=int(row["num_kv_heads"]),
                head_dim=int(row["head_dim"]),
                intermediate_size=width,
                vocab_size=int(row["vocab_size"]),
                num_experts=experts,
                experts_per_token=int(row["experts_per_token"]),
                expert_intermediate_size=width,
                num_moe_layers=layers if experts > 1 else 0,
                tie_word_embeddings=row["tie_word_embeddings"].lower() == "true",
                max_position_embeddings=int(row["max_position_embeddings"]),
                weight_dtype=row["dtype"],
            )
            for alias in [one.name, *filter(None, row["aliases"].split(";"))]:
                table[alias] = replace(one)
    return table


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"No architecture file at {path}. Give the path of a HuggingFace config.json.") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable JSON file: {error}. Download the model's config.json again."
        ) from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds a JSON {type(parsed).__name__}; a HuggingFace config.json is an object.")
    return parsed


def _integer(config: Mapping[str, Any], origin: str, *keys: str) -> int:
    for key in keys:
        if config.get(key) is not None:
            return int(config[key])
    raise InputError(f"{origin} lacks `{keys[0]}`: it does not look like a transformer's config.json.")


def _mixture_fields(config: Mapping[str, Any], origin: str, layers: int) -> dict[str, int]:
    """Dense and expert widths, and how many layers are mixtures (interleaved in Llama 4 and Qwen2-MoE)."""
    experts = next(
        (int(config[k]) for k in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(k)), 1
    )
    width = int(
        config.get("intermediate_size")
        or config.get("n_inner")
        or 4 * _integer(config, origin, "hidden_size", "n_embd")
    )
    if experts == 1:
        return {"intermediate_size": width, "expert_intermediate_size": width}
    sparse = set(range(layers))
    if config.get("moe_layers") is not None:
        sparse = set(config["moe_layers"])
    elif step := config.get("interleave_moe_layer_step"):
        sparse = set(range(step - 1, layers, step))
    elif step := config.get("decoder_sparse_step"):
        sparse = {layer for layer in range(layers) if (layer + 1) % step == 0}
    if frequency := config.get("moe_layer_freq"):
        every = frequency if isinstance(frequency, list) else [layer % frequency == 0 for layer in range(layers)]
        sparse &= {layer for layer, is_sparse in enumerate(every) if is_sparse}
    sparse -= set(config.get("mlp_only_layers") or [])
    sparse -= set(range(int(config.get("first_k_dense_replace") or 0)))
    expert_width = int(config.get("moe_intermediate_size") or width)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    shared += int(config.get("n_shared_experts") or 0) * expert_width
    if config.get("model_type", "").startswith("llama4"):
        # Llama 4 always has one shared expert, and keeps the dense layers' width under a name of its own.
        shared, expert_width = width, width
        width = int(config.get("intermediate_size_mlp") or width)
    return {
        "intermediate_size": width,
        "num_experts": experts,
        "experts_per_token": _integer(config, origin, "num_experts_per_tok", "moe_topk"),
        "expert_intermediate_size": expert_width,
        "shared_expert_intermediate_size": shared,
        "num_moe_layers": len(sparse),
    }


def _refuse_other_attention(config: Mapping[str, Any], origin: str, max_model_len: int | None) -> None:
    for key, kind in ATTENTION_NOT_MODELLED.items():
        if config.get(key):
            raise NotModelledError(
                f"{origin} declares {kind} (`{key}`), which stepcal does not model. Use a model with full attention."
            )
    other = sorted(set(config.get("layer_types") or []) - FULL_ATTENTION_LAYERS - {"sliding_attention"})
    if other:
        raise NotModelledError(f"{origin} has layers of type {', '.join(other)}, which stepcal does not model.")
    layers = config.get("layer_types")
    slides = "sliding_attention" in layers if layers else config.get("use_sliding_window", True)
    longest = max_model_len or int(config.get("max_position_embeddings", 4096))
    window, key = (config.get("sliding_window"), "sliding_window") if slides else (None, "")
    if config.get("attention_chunk_size"):
        window, key = config["attention_chunk_size"], "attention_chunk_size"
    if window and window < longest:
        raise NotModelledError(
            f"{origin} attends to {window} tokens at a time (`{key}`), below the context limit of {longest}, "
            f"which stepcal does not model. A server limited to `max_model_len` <= {window} never slides: pass that."
        )


def _weight_dtype(outer: Mapping[str, Any], config: Mapping[str, Any], origin: str) -> str:
    quantization = outer.get("quantization_config") or config.get("quantization_config")
    if quantization:
        method = str(quantization.get("quant_method", "")).lower()
        bits = quantization.get("bits") or quantization.get("w_bit")
        dtype = {"4": "int4", "8": "int8"}.get(str(bits)) if bits else None
        if dtype is None and ("fp8" in method or "float-quantized" in str(quantization)):
            dtype = "fp8"
        if dtype is None:
            raise InputError(
                f"{origin} declares the quantisation `{method}` (`quantization_config`), whose width stepcal does not know. "
                f"Widths it knows: {', '.join(BYTES_PER_ELEMENT)}."
            )
        return dtype
    dtype = str(config.get("torch_dtype") or config.get("dtype") or outer.get("torch_dtype") or "bfloat16")
    dtype = dtype.removeprefix("torch.")
    if dtype not in BYTES_PER_ELEMENT:
        raise InputError(f"{origin} has `torch_dtype` {dtype!r}; stepcal knows {', '.join(BYTES_PER_ELEMENT)}.")
    return dtype
