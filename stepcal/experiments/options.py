"""Which server a log comes from: what the user says on the command line or in an ``exp-config.yaml``, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.experiments.engine_args import (
    CONFIG_NAMES,
    OPTIONS,
    Settings,
    accelerator_of,
    kv_cache_dtype_of,
    read_settings,
    served_architecture,
    server_of,
    tensor_parallel_of,
)
from stepcal.experiments.sampling_defaults import sampling_of
from stepcal.specs.architecture import resolve_architecture
from stepcal.specs.deployment import Deployment


@dataclass(frozen=True)
class Served:
    """A deployment, and what was assumed of it because nothing was said."""

    deployment: Deployment
    notes: tuple[str, ...] = ()


def deployment_from(options: Mapping[str, Any], folder: Path | None = None) -> Served:
    """Build a deployment from settings by vLLM's names, and from the ``exp-config.yaml`` of a folder where there is one.

    Parameters
    ----------
    options : mapping
        `architecture` (a name that ships or the path of a ``config.json``), `accelerator`, `tensor_parallel_size`, and the
        server's arguments; None is not said. They go before those of the file.
    folder : Path, optional

    Returns
    -------
    Served

    Raises
    ------
    InputError
        If the model is not named, or a setting cannot be used.
    """
    given = {k: v for k, v in options.items() if v is not None}
    file = _config(folder)
    values = {**({} if file is None else file.values), **given}
    model = given.get("architecture") or values.get("model") or values.get("model_name")
    if model is None:
        raise InputError(
            "Which model was served is not said. Give `--architecture` (a name that ships, or the path of its config.json), "
            f"or put `{CONFIG_NAMES[0]}` with `model` beside the runs."
        )
    gpu = given.get("accelerator")
    about = {k: v for k, v in values.items() if k not in ("architecture", "accelerator")}
    path, of_file = (OPTIONS, ()) if file is None else (file.path, file.notes)
    settings = Settings(path, about, of_file)
    read = resolve_architecture(str(model), max_model_len=settings.whole("max_model_len"))
    architecture, as_served = served_architecture(settings, read)
    accelerator, notes = accelerator_of(settings, None if gpu is None else str(gpu))
    degree, more = tensor_parallel_of(settings)
    server, assumed = server_of(settings, architecture, accelerator, tensor_parallel=degree)
    config = Path(str(model)) if str(model).endswith(".json") else None
    names = (str(values.get("model") or ""), architecture.name)
    sampling, sampled = sampling_of(about, config, names, vocab_size=architecture.vocab_size)
    about_it = (*architecture.notes, *settings.notes, *as_served, *notes, *more, *assumed, *sampled)
    return Served(
        Deployment(architecture, accelerator, degree, server, sampling, kv_cache_dtype_of(settings)), about_it
    )


def _config(folder: Path | None) -> Settings | None:
    if folder is None or not any((folder / name).is_file() for name in CONFIG_NAMES):
        return None
    return read_settings(folder)
