"""Reads experiments of one's own: a folder for each run, laid out as the public ones.

``<folder>/<id>/exp-config.yaml`` names model and server limits, ``results/config.yaml`` (as run) or ``profile.yaml`` (as
asked for) the workload, ``results/*_lifecycle_metrics.json`` what clients measured, and a ``config.json`` the architecture
of a model that does not ship.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stepcal.architecture import ModelArchitecture, load_architecture, resolve_architecture
from stepcal.datasets import read_lifecycle_summary
from stepcal.datasets.build import OVERLOADED_BELOW_SHARE
from stepcal.datasets.lifecycle import WHOLE_RUN
from stepcal.end_to_end import CLIENT_TIMEOUT_S, Experiment, summary_latencies
from stepcal.errors import InputError, NotModelledError
from stepcal.hardware import load_accelerator
from stepcal.simulator import ServerConfig, SharedPrefixWorkload, read_workload
from stepcal.simulator.config import NOT_MODELLED

DEFAULT_ACCELERATOR = "h100-sxm"
KV_BLOCK_KEYS = ("kv_blocks_total_gpu", "num_gpu_blocks", "kv_blocks")
LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
SWITCHES = ("enable_prefix_caching", "async_scheduling")
SERVER_SETTINGS = ("server_settings.csv", "../requests/server_settings.csv")


def read_experiment_folder(folder: Path, *, accelerator: str | None = None) -> list[tuple[Experiment, pd.DataFrame]]:
    """Read every run of a folder, with its measured summaries.

    Parameters
    ----------
    folder : Path
    accelerator : str, optional
        GPU of runs whose ``exp-config.yaml`` does not name one (`gpu`); H100 SXM by default.

    Returns
    -------
    list of (Experiment, DataFrame)
        The second is what clients measured, as `stepcal.end_to_end.latency_table` gives it.

    Raises
    ------
    InputError
        If the folder holds no run, or a run lacks a file or a setting; the message names it.
    """
    return [_read_run(run, folder, accelerator) for run in _runs(folder)]


@dataclass(frozen=True)
class RefusedRun:
    """A run that asks for what the simulator does not model.

    Attributes
    ----------
    experiment_id, reason : str
    accelerator : str
        Name of its GPU.
    """

    experiment_id: str
    accelerator: str
    reason: str


def read_supported_runs(
    folder: Path, *, accelerator: str | None = None
) -> tuple[list[tuple[Experiment, pd.DataFrame]], list[RefusedRun]]:
    """Read a folder as `read_experiment_folder` does, and list what the simulator refuses by name instead of failing.

    Raises
    ------
    InputError
        If the folder holds no run, or a run lacks a file or a setting: a slip is no refusal.
    """
    cases, refused = [], []
    for run in _runs(folder):
        try:
            cases.append(_read_run(run, folder, accelerator))
        except NotModelledError as error:
            name = _accelerator_name(_yaml(run / "exp-config.yaml"), accelerator)
            refused.append(RefusedRun(run.name, load_accelerator(name).name, str(error)))
    return cases, refused


def _runs(folder: Path) -> list[Path]:
    runs = sorted(path.parent for path in folder.glob("*/exp-config.yaml")) if folder.is_dir() else []
    if not runs:
        raise InputError(
            f"{folder} holds no experiments. It needs a folder for each run, with `exp-config.yaml`, `profile.yaml` and "
            "`results/*_lifecycle_metrics.json`."
        )
    return runs


def _accelerator_name(config: dict[str, Any], accelerator: str | None) -> str:
    return str(config.get("gpu") or accelerator or DEFAULT_ACCELERATOR)


def _read_run(run: Path, folder: Path, accelerator: str | None) -> tuple[Experiment, pd.DataFrame]:
    config = _yaml(run / "exp-config.yaml")
    as_run, as_asked = run / "results" / "config.yaml", run / "profile.yaml"
    source = as_run if as_run.is_file() else as_asked
    if not source.is_file():
        raise InputError(f"{run} has neither `results/config.yaml` nor `profile.yaml`: the workload is unknown.")
    workload = read_workload(_yaml(source))
    workload = replace(workload, timeout_s=min(workload.timeout_s, CLIENT_TIMEOUT_S))
    measured = _measured(run)
    experiment = Experiment(
        experiment_id=run.name,
        architecture=_architecture(run, config),
        accelerator=load_accelerator(_accelerator_name(config, accelerator)),
        tensor_parallel=_tensor_parallel(config, run),
        server=_server(run, folder, config),
        workload=workload,
        overloaded=_is_overloaded(measured, workload),
    )
    experiment.architecture.check_tensor_parallel(experiment.tensor_parallel)
    return experiment, summary_latencies(measured, workload.output_len)


def _tensor_parallel(config: dict[str, Any], run: Path) -> int:
    names = [name for name in ("tensor_parallelism", "tensor_parallel") if config.get(name) is not None]
    return _setting(config, run, names[0]) if names else 1


def _server(run: Path, folder: Path, config: dict[str, Any]) -> ServerConfig:
    """Limits, and whatever else the file says of scheduling; what is not modelled is refused."""
    limits = {name: _setting(config, run, name) for name in LIMITS}
    limits |= {"block_size": _setting(config, run, "block_size")} if config.get("block_size") is not None else {}
    others = {name: config[name] for name in (*SWITCHES, *NOT_MODELLED) if config.get(name) is not None}
    for name in SWITCHES:
        if not isinstance(others.get(name, True), bool):
            raise InputError(f"{run / 'exp-config.yaml'}: `{name}` is {others[name]!r}; it must be true or false.")
    return ServerConfig.from_vllm_arguments({"kv_blocks": _kv_blocks(run, folder, config), **limits, **others})


def _measured(run: Path) -> pd.DataFrame:
    files = sorted((run / "results").glob("*_lifecycle_metrics.json"))
    table = pd.concat([read_lifecycle_summary(file) for file in files]) if files else pd.DataFrame({"stage": []})
    if WHOLE_RUN not in set(table["stage"]):
        raise InputError(
            f"{run / 'results'} lacks `summary_lifecycle_metrics.json`, the figures of the whole run: there is nothing to "
            "compare with."
        )
    return table


def _is_overloaded(measured: pd.DataFrame, workload: SharedPrefixWorkload) -> bool:
    """Whether any stage, or the run if stages have no figures, was served more slowly than it was asked for."""
    served = measured[(measured["metric"] == "throughput") & (measured["statistic"] == "requests")]
    nothing = measured[(measured["metric"] == "requests") & (measured["statistic"] == "completed")].query("value == 0")
    by_stage = {**dict(zip(served["stage"], served["value"], strict=True)), **dict.fromkeys(nothing["stage"], 0.0)}
    shares = [by_stage[i] / stage.rate for i, stage in enumerate(workload.stages) if i in by_stage]
    if not shares and WHOLE_RUN in by_stage:
        asked = sum(s.n_requests for s in workload.stages) / sum(s.duration_s for s in workload.stages)
        shares = [by_stage[WHOLE_RUN] / asked] if asked else []
    return bool(shares and min(shares) < OVERLOADED_BELOW_SHARE)


def _architecture(run: Path, config: dict[str, Any]) -> ModelArchitecture:
    own = run / "config.json"
    if own.is_file():
        return resolve_architecture(str(own))
    if config.get("model") is None:
        raise InputError(f"{run / 'exp-config.yaml'} lacks `model`, and there is no `config.json` beside it.")
    model = str(config["model"])
    for name in (model, model.lower(), model.rpartition("/")[2].lower()):
        try:
            return load_architecture(name)
        except InputError:
            continue
    raise InputError(
        f"{run}: the model `{model}` does not ship. Put its HuggingFace `config.json` into the run's folder."
    )


def _kv_blocks(run: Path, folder: Path, config: dict[str, Any]) -> int:
    for key in KV_BLOCK_KEYS:
        if config.get(key) is not None:
            return _setting(config, run, key)
    for name in SERVER_SETTINGS:
        file = folder / name
        if file.is_file():
            table = _settings_table(file)
            if run.name in table.index:
                return int(table[run.name])
    raise InputError(
        f"{run / 'exp-config.yaml'} does not say how many KV blocks the server had (`{KV_BLOCK_KEYS[0]}`). vLLM logs the "
        f"number at start-up; add it there, or list it in `{SERVER_SETTINGS[0]}` in {folder}."
    )


def _settings_table(file: Path) -> pd.Series:
    """KV blocks by experiment."""
    try:
        table = pd.read_csv(file, dtype={"experiment_id": str}).set_index("experiment_id")
        return table[KV_BLOCK_KEYS[0]].astype(int)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read ({type(error).__name__}: {error}). It is a CSV table with the columns `experiment_id` "
            f"and `{KV_BLOCK_KEYS[0]}`."
        ) from None


def _setting(config: dict[str, Any], run: Path, name: str) -> int:
    value = config.get(name)
    if value is None:
        raise InputError(f"{run / 'exp-config.yaml'} lacks `{name}`. Add what the server was started with.")
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value or isinstance(value, bool):
        raise InputError(f"{run / 'exp-config.yaml'}: `{name}` is {value!r}; it must be a whole number.")
    return whole


def _yaml(path: Path) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds a {type(parsed).__name__}; a mapping of settings was expected.")
    return parsed
