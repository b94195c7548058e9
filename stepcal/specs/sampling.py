"""How tokens are sampled, as far as it costs time: what a request, or the model's ``generation_config.json``, asks for.

vLLM applies a checkpoint's ``generation_config.json`` to every request that says nothing else, unless it is started with
``--generation-config vllm``. Load generators usually say nothing.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.locations import data_folder

GENERATION_CONFIG = "generation_config.json"
KNOWN_FILE = ("transfer", "sampling.csv")
FAMILIES = (
    ("codellama", "codellama-34b-instruct"),
    ("code-llama", "codellama-34b-instruct"),
    ("mistral-nemo", "mistral-nemo-instruct-2407"),
    ("mixtral", "mixtral-8x7b and 8x22b base"),
    ("qwen2.5", "qwen2.5-instruct"),
    ("qwen2-5", "qwen2.5-instruct"),
    ("qwen3", "qwen3"),
    ("llama-4-scout", "llama-4-scout"),
    ("llama-4", "llama-4-scout"),
    ("llama-3", "llama-3.1"),
    ("llama-2", "llama-2"),
)
"""Part of a model's name, and its row of ``data/transfer/sampling.csv``; the first that occurs counts."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters that all requests share.

    Parameters
    ----------
    top_p : float
        Probability mass that is kept; 1 keeps all.
    top_k : int
        Tokens that are kept; 0 keeps all.
    repetition_penalty, presence_penalty, frequency_penalty : float
        1, 0 and 0 switch them off.
    temperature : float
        0 is greedy: nothing is sorted, whatever else is set.

    Raises
    ------
    InputError
        If a parameter is outside of what vLLM takes.
    """

    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        bounds = {
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1 (1 keeps all)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all)"),
            "repetition_penalty": (0.0 < self.repetition_penalty <= 2.0, "above 0 and at most 2 (1 is off)"),
            "presence_penalty": (-2.0 <= self.presence_penalty <= 2.0, "between -2 and 2 (0 is off)"),
            "frequency_penalty": (-2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2 (0 is off)"),
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0.0, "finite and at least 0"),
        }
        for name, (is_fine, bound) in bounds.items():
            if not is_fine:
                raise InputError(f"`{name}` is {getattr(self, name)}; it must be {bound}.")

    @property
    def restricts_tokens(self) -> bool:
        """Whether logits are sorted or searched: top-k or top-p, and not greedy."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0)

    @property
    def penalises(self) -> bool:
        """Whether tokens that occurred are penalised."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


NEUTRAL = Sampling()
"""All tokens kept, none penalised."""


def read_sampling(path: Path) -> Sampling:
    """Read a ``generation_config.json``; what it does not set stays neutral.

    Raises
    ------
    InputError
        If the file is not a JSON object, or a value is out of bounds.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; a {GENERATION_CONFIG} is an object.")
    return sampling_from(content, str(path))


def sampling_from(content: dict[str, Any], origin: str) -> Sampling:
    """Read sampling parameters from a mapping; other keys are ignored.

    Raises
    ------
    InputError
        If a value is no number or out of bounds; `origin` is named.
    """
    values: dict[str, Any] = {}
    for name in ("top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature"):
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{origin}: `{name}` is {value!r}; it must be a number.")
        values[name] = max(int(value), 0) if name == "top_k" else float(value)  # vLLM writes -1 for all tokens
    try:
        return Sampling(**values)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def known_sampling(model: str) -> tuple[Sampling, str] | None:
    """Return the sampling defaults of a model by its name, and how sure they are; None for a model that is not known.

    Examples
    --------
    >>> known_sampling("meta-llama/Llama-3.1-8B-Instruct")[0].top_p
    0.9
    >>> known_sampling("a-model-of-mine") is None
    True
    """
    name = model.lower().replace("_", "-")
    family = next((family for part, family in FAMILIES if part in name), None)
    return None if family is None else _known()[family]


def publishers_sampling(model: str) -> Sampling:
    """Return the sampling defaults of a model by its name; neutral ones for a model that is not known."""
    known = known_sampling(model)
    return NEUTRAL if known is None else known[0]


@functools.cache
def _known() -> dict[str, tuple[Sampling, str]]:
    table = {}
    with open(data_folder().joinpath(*KNOWN_FILE), newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            set_ones = {k: float(v) for k, v in row.items() if k not in ("model_family", "basis") and v}
            table[row["model_family"]] = (sampling_from(set_ones, row["model_family"]), row["basis"])
    return table
