"""What a transformer costs is fixed by a dozen integers; this module reads them from any HuggingFace ``config.json``.

`ModelArchitecture` holds the integers, counts parameters, and says which tensor-parallel degrees fit. It knows nothing
of data or fits.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepcal.documents import read_json_object
from stepcal.errors import InputError, shown
from stepcal.locations import data_folder
from stepcal.simulator.versions import NEWEST
from stepcal.specs.config_json import read_fields
from stepcal.specs.latent_attention import LatentAttention
from stepcal.specs.layer_windows import MOST_WINDOW, LayerWindows
from stepcal.specs.weight_formats import BYTES_PER_ELEMENT, FULL_WIDTH, WeightWidths

MODELOPT_FILE = "hf_quant_config.json"
"""Where modelopt writes the quantisation, beside config.json."""
_LONGEST_NAME = 100
_POSITIVE_FIELDS = (
    "hidden_size", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim", "vocab_size", "intermediate_size",
    "num_experts", "experts_per_token", "max_position_embeddings",
)  # fmt: skip


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
    weight_widths : WeightWidths, optional
        Bytes of a weight by group, scales included. By default `weight_dtype` in the layers and 16 bits in the embedding
        and the output matrix.
    other_parameters : int, optional
        Weights outside the matrices: norms, biases, position tables and gates. By default those of a Llama: two norms a
        layer and one at the end, and the biases that `attention_bias` stands for.
    positions_are_stated : bool
        Whether the file says `max_position_embeddings`; without, it is vLLM's default and no bound.
    latent : LatentAttention, optional
        Widths of latent attention; the KV cache then holds one latent a token, whatever the heads. None for the usual kind.
    kv_precision : {"bf16", "fp8"}
        What the KV cache is kept in unless the server says.
    windows : LayerWindows, optional
        Layers that read a window only, None where all read everything.
    notes : tuple of str
        What of the checkpoint was left out.

    Examples
    --------
    >>> import stepcal
    >>> model = stepcal.ModelArchitecture.load("llama-2-70b")
    >>> model.num_layers, model.num_kv_heads, round(model.num_parameters() / 1e9, 1)
    (80, 8, 69.0)
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
    weight_widths: WeightWidths | None = None
    other_parameters: int | None = None
    positions_are_stated: bool = True
    latent: LatentAttention | None = None
    kv_precision: str = "bf16"
    windows: LayerWindows | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, name_or_path: str) -> ModelArchitecture:
        """Return a model that ships, by name, or read the ``config.json`` at a path, as `resolve_architecture` does."""
        return resolve_architecture(name_or_path)

    def __post_init__(self) -> None:
        for field in _POSITIVE_FIELDS:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(
                    f"`{field}` of `{self.name}` is {shown(value)}; it must be a whole number of at least 1."
                )
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
        if self.other_parameters is None:
            object.__setattr__(self, "other_parameters", self._llama_like_parameters())
        if self.weight_widths is None:
            width = self.bytes_per_weight
            object.__setattr__(self, "weight_widths", WeightWidths(attention=width, mlp=width, experts=width))

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
        """Bytes of one stored weight of the layers, without scales."""
        return BYTES_PER_ELEMENT[self.weight_dtype]

    @property
    def widths(self) -> WeightWidths:
        """Bytes of one stored weight by group of weights, scales included."""
        return self.weight_widths or WeightWidths()

    def windows_of(self, vllm_version: str) -> LayerWindows | None:
        """Return the layers that have a window where a release of vLLM serves the model."""
        return None if self.windows is None else self.windows.served_by(vllm_version)

    def windows_within(self, max_model_len: int | None, vllm_version: str = NEWEST) -> LayerWindows | None:
        """Return the windows that slide on a server of some context limit: one at least that long never does."""
        windows = self.windows_of(vllm_version)
        return None if windows is None or windows.window >= (max_model_len or MOST_WINDOW) else windows

    def num_parameters(self) -> int:
        """Count the weights of the checkpoint: matrices, norms, biases, position tables and gates."""
        return sum(self._matrix_elements().values()) + int(self.other_parameters or 0)

    def weights_bytes(self) -> float:
        """Bytes of the stored weights: each group at its own width, scales included; all else at 16 bits."""
        elements, widths = self._matrix_elements(), self.widths
        stored = sum(elements[group] * getattr(widths, group) for group in elements if group != "router")
        return stored + FULL_WIDTH * (elements["router"] + int(self.other_parameters or 0))

    def weights_bytes_of_a_rank(self, tensor_parallel: int) -> float:
        """Bytes of weights in a GPU's memory: a share of all, and what latent attention keeps on every rank.

        That are the matrices towards the latents, and 16-bit copies of the absorbed ones.
        """
        shared = self.weights_bytes() / tensor_parallel
        if self.latent is None:
            return shared
        whole = self.latent.elements(self.hidden_size, 0.0) * self.widths.attention
        heads = self.num_attention_heads / tensor_parallel
        copies = heads * self.latent.kv_rank * (self.latent.nope_dim + self.latent.value_dim) * FULL_WIDTH
        return shared + self.num_layers * (whole * (1.0 - 1.0 / tensor_parallel) + copies)

    def _matrix_elements(self) -> dict[str, int]:
        """Elements of the matrices by group, as `WeightWidths` names them, and of the routers."""
        h, mlp = self.hidden_size, self.mlp_matrices * self.hidden_size
        dense = (self.num_layers - self.num_moe_layers) * self.intermediate_size
        shared = self.num_moe_layers * self.shared_expert_intermediate_size
        attention = h * 2 * (self.query_width + self.kv_width)
        if self.latent is not None:
            attention = int(self.latent.elements(h, self.num_attention_heads))
        return {
            "attention": self.num_layers * attention,
            "mlp": mlp * (dense + shared),
            "experts": self.num_moe_layers * mlp * self.num_experts * self.expert_intermediate_size,
            "router": self.num_moe_layers * h * self.num_experts,
            "embedding": self.vocab_size * h,
            "head": 0 if self.tie_word_embeddings else self.vocab_size * h,
        }

    def _llama_like_parameters(self) -> int:
        biases = (self.query_width + 2 * self.kv_width) if self.attention_bias else 0
        return self.num_layers * (2 * self.hidden_size + biases) + self.hidden_size

    def tensor_parallel_degrees(self) -> list[int]:
        """List the degrees that vLLM takes, ascending.

        They divide the attention heads and the MLP's width; they divide the KV heads, or are multiples of them (each head
        is then replicated).
        """
        return [tp for tp in range(1, self.num_attention_heads + 1) if self._why_not(tp) is None]

    def check_max_model_len(self, max_model_len: int, where: str = "") -> int:
        """Return `max_model_len` if vLLM takes it for this model: at most the positions that its config.json states.

        Raises
        ------
        InputError
            If it is longer; the message begins with `where`.
        """
        if self.positions_are_stated and max_model_len > self.max_position_embeddings:
            raise InputError(
                f"{where}`max_model_len` is {max_model_len:,}, above the {self.max_position_embeddings:,} positions of "
                f"`{self.name}` (config.json), and vLLM refuses it."
            )
        return max_model_len

    def check_tensor_parallel(self, tensor_parallel: int) -> int:
        """Return `tensor_parallel` if vLLM takes it for this model.

        Raises
        ------
        InputError
            If it does not; the message lists the degrees that do.
        """
        why_not = self._why_not(tensor_parallel)
        if why_not is not None:
            degrees = ", ".join(map(str, self.tensor_parallel_degrees()))
            raise InputError(f"`tensor_parallel={shown(tensor_parallel)}` {why_not}. Degrees that fit: {degrees}.")
        return tensor_parallel

    def _why_not(self, tensor_parallel: int) -> str | None:
        """What of the model a tensor-parallel degree does not divide, None if it fits."""
        tp, kv = tensor_parallel, self.num_kv_heads
        if tp < 1 or self.num_attention_heads % tp:
            return (
                f"does not divide the {self.num_attention_heads} attention heads of `{self.name}` (`num_attention_heads` in "
                "config.json)"
            )
        if self.latent is None and kv % tp and tp % kv:
            return (
                f"neither divides the {kv} KV heads of `{self.name}` (`num_key_value_heads` in config.json) nor is a "
                "multiple of them, and vLLM refuses it"
            )
        widths = [self.intermediate_size] if self.num_moe_layers < self.num_layers else []
        widths += [self.expert_intermediate_size, self.shared_expert_intermediate_size] if self.num_moe_layers else []
        uneven = next((w for w in widths if w % tp), None)
        return (
            None
            if uneven is None
            else f"does not divide the MLP's width of {uneven} (`{self.name}`), and vLLM refuses it"
        )

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
            The server's context limit. A window at least this long never slides, so it does not matter which
            layers have it.

        Returns
        -------
        ModelArchitecture

        Raises
        ------
        InputError
            If the file is not JSON, a dimension is missing, or the attention is of a kind that is not modelled
            (linear, state space, windows of layers that are not named).
        """
        origin = "config"
        if not isinstance(config, Mapping):
            path = Path(config)
            origin, config = str(path), _read_json(path)
            name = (
                name
                or _own_name(config)
                or (path.parent.name if path.name == "config.json" else path.stem)
                or "unnamed"
            )
        return cls(name=name or _own_name(config) or "unnamed", **read_fields(config, origin, max_model_len))


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
    A window at least as long as `max_model_len`, the server's context limit, never slides, so it does not matter which
    layers have it.
    """
    if not (name_or_path.endswith(".json") or Path(name_or_path).is_file()):
        return load_architecture(name_or_path)
    read = ModelArchitecture.from_config(name_or_path, max_model_len=max_model_len)
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


def _own_name(config: Mapping[str, Any]) -> str | None:
    name = config.get("_name_or_path")
    return name[:_LONGEST_NAME] if isinstance(name, str) and name else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"No architecture file at {path}. Give the path of a HuggingFace config.json.")
    config = read_json_object(path, what="HuggingFace config.json")
    beside = path.parent / MODELOPT_FILE
    if path.name == "config.json" and not config.get("quantization_config") and beside.is_file():
        config["quantization_config"] = read_json_object(beside, what="quantisation file of modelopt")
    return config
