"""Which sampling parameters the requests of a run had: what its files say, else what the model's publisher set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.specs.sampling import GENERATION_CONFIG, NEUTRAL, Sampling, known_sampling, read_sampling, sampling_from

SOURCE_KEY = "generation_config"
"""vLLM's argument: ``vllm`` switches the model's own defaults off, a path names another folder."""
OVERRIDE_KEY = "override_generation_config"
LARGE_VOCABULARY = 100_000
"""Tokens from which a sort of the logits shows in the step time, so that what is assumed is worth a note."""


def sampling_of(
    settings: dict[str, Any], config: Path | None, names: Iterable[str], *, vocab_size: int
) -> tuple[Sampling, list[str]]:
    """Return the sampling parameters of a server's requests that say nothing themselves, and notes on what was assumed.

    A ``generation_config.json`` beside the model's ``config.json`` goes first, then what is known of the model by its name.

    Parameters
    ----------
    settings : dict
        vLLM's arguments by name.
    config : Path or None
        The model's ``config.json``.
    names : iterable of str
        What the model may be called, the surest first.
    vocab_size : int

    Raises
    ------
    InputError
        If a file or a setting cannot be used.
    """
    sampling, notes = _default(settings, config, names, vocab_size)
    override = settings.get(OVERRIDE_KEY)
    if override is None:
        return sampling, notes
    if not isinstance(override, dict):
        raise InputError(f"`{OVERRIDE_KEY}` is {override!r}; it must be a mapping of sampling parameters.")
    return sampling_from({**asdict(sampling), **override}, f"`{OVERRIDE_KEY}`"), notes


def _default(
    settings: dict[str, Any], config: Path | None, names: Iterable[str], vocab_size: int
) -> tuple[Sampling, list[str]]:
    if str(settings.get(SOURCE_KEY) or "auto") == "vllm":
        return NEUTRAL, []
    beside = None if config is None else config.parent / GENERATION_CONFIG
    if beside is not None and beside.is_file():
        return read_sampling(beside), []
    for name in names:
        known = known_sampling(name)
        if known is not None:
            sampling, basis = known
            said = f"sampling parameters are not given; those of `{name}` by its publisher were assumed ({basis})."
            note = f"{said} Put its `{GENERATION_CONFIG}` beside config.json to be sure"
            return sampling, [note] if vocab_size >= LARGE_VOCABULARY else []
    if vocab_size < LARGE_VOCABULARY:
        return NEUTRAL, []
    said = "sampling parameters are not given; no top-k and no top-p were assumed."
    why = "with top-k or top-p a step also cuts the logits, and vLLM before 0.18 sorts them for it"
    return NEUTRAL, [f"{said} Put the model's `{GENERATION_CONFIG}` beside config.json: {why}"]
