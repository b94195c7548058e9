"""Reads workloads of the load generator inference-perf: as asked for (`profile.yaml`) or as run (`results/config.yaml`).

Its `shared_prefix` data are modelled, in stages of constant, Poisson or closed-loop load. What a field means, and which one
is refused, stands in `inference_perf_fields`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepcal.documents import read_yaml
from stepcal.errors import InputError, NotModelledError, shown
from stepcal.simulator.load.arrivals import LoadStage
from stepcal.simulator.load.inference_perf_fields import FIXED, fields_of
from stepcal.simulator.load.shared_prefix import Workload

DEFAULT_INTERVAL_S = 1.0
DEFAULT_WORKER_CONCURRENCY = 100
"""What inference-perf takes where the file does not say (``LoadConfig``)."""
CONCURRENT = "concurrent"
CLOSED_LOOP_SEND_S = 1.0
"""A stage of fixed concurrency has all its requests scheduled within a second; its clients send them one by one."""
_MOST_CLIENTS = 10**9
_LENGTHS = {
    "num_groups": "n_groups",
    "num_unique_system_prompts": "n_groups",
    "num_prompts_per_group": "n_prompts_per_group",
    "num_users_per_system_prompt": "n_prompts_per_group",
    "system_prompt_len": "system_prompt_len",
    "question_len": "question_len",
    "output_len": "output_len",
}


def read_workload(source: str | Path | Mapping[str, Any]) -> Workload:
    """Read an inference-perf workload.

    Parameters
    ----------
    source : path or mapping
        A `profile.yaml` or `results/config.yaml`, or what is in it.

    Returns
    -------
    Workload

    Raises
    ------
    NotModelledError
        If a field asks for what is not modelled; it is named.
    InputError
        If a field is unknown or missing; it is named.
    """
    document = source if isinstance(source, Mapping) else read_yaml(source, what="workload of inference-perf")
    _check_fields(document, "")
    data, load = _section(document, "data"), _section(document, "load")
    _check_fields(_section(document, "api"), "api")
    _check_fields(_section(document, "server"), "server")
    _check_fields(data, "data")
    _check_fields(load, "load")
    shared = _section(data, "shared_prefix", "data.")
    if not shared:
        raise InputError(
            "The workload has no `data.shared_prefix`, the only kind of inference-perf data that is modelled."
        )
    _check_fields(shared, "data.shared_prefix")
    timeout, interval = load.get("request_timeout"), load.get("interval")
    stages = _stages(load)
    return Workload(
        **_lengths(shared),
        stages=tuple(_read_stage(stage) for stage in stages),
        timeout_s=np.inf if timeout is None else _positive("load.request_timeout", timeout),
        multi_turn_chat=_flag("data.shared_prefix.enable_multi_turn_chat", shared.get("enable_multi_turn_chat")),
        max_in_flight=_cap(load, stages),
        stage_interval_s=DEFAULT_INTERVAL_S if interval is None else _number("load.interval", interval, least=0.0),
    )


def _lengths(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of prompts and their lengths, under whichever of their names."""
    given = {name: value for name, value in shared.items() if name in _LENGTHS and value is not None}
    for ours in dict.fromkeys(_LENGTHS.values()):
        aliases = [name for name, of in _LENGTHS.items() if of == ours]
        present = [name for name in aliases if name in given]
        if not present:
            raise InputError(f"`data.shared_prefix` lacks {' or '.join(f'`{name}`' for name in aliases)}.")
        if len(present) > 1:
            raise InputError(
                f"`data.shared_prefix` has {' and '.join(f'`{f}`' for f in present)}: keep one, they are one."
            )
    return {_LENGTHS[name]: _whole_number(f"data.shared_prefix.{name}", value) for name, value in given.items()}


def _stages(load: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    stages = load.get("stages") or ()
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not all(isinstance(s, Mapping) for s in stages):
        raise InputError(
            f"`load.stages` is {shown(stages)}; it must be a list of stages, each with `rate` and `duration`."
        )
    for stage in stages:
        _check_fields(stage, "load.stages")
        is_closed = stage.get("concurrency_level") is not None
        if is_closed != (load.get("type") == CONCURRENT):
            raise InputError(
                f"`load.stages` has a stage {'with' if is_closed else 'without'} `concurrency_level`, and `load.type` is "
                f"{shown(load.get('type'))}. Stages of fixed concurrency belong to `{CONCURRENT}`, and it needs them."
            )
    return stages


def _read_stage(stage: Mapping[str, Any]) -> LoadStage:
    if stage.get("concurrency_level") is not None:
        count = stage.get("num_requests")
        if count is None:
            raise InputError("A stage of `load.stages` has `concurrency_level` but lacks `num_requests`.")
        number = _whole_number("load.stages.num_requests", count)
        return LoadStage(rate=number / CLOSED_LOOP_SEND_S, duration_s=CLOSED_LOOP_SEND_S)
    for name in ("rate", "duration"):
        if stage.get(name) is None:
            raise InputError(f"A stage of `load.stages` lacks `{name}`.")
    rate, duration = (_number(f"load.stages.{name}", stage[name]) for name in ("rate", "duration"))
    return LoadStage(rate=rate, duration_s=duration)


def _cap(load: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> int | None:
    """Most requests in flight, None where the file does not say: `num_workers` is the client's number of CPUs then."""
    levels = {_whole_number("load.stages.concurrency_level", s["concurrency_level"]) for s in stages if _is_closed(s)}
    if len(levels) > 1:
        raise NotModelledError(
            f"`load.stages` has stages of different `concurrency_level` ({', '.join(map(str, sorted(levels)[:5]))}), which "
            "is not modelled. Give a file for each level."
        )
    workers, each = load.get("num_workers"), load.get("worker_max_concurrency")
    cap = None
    if workers is not None:
        each = DEFAULT_WORKER_CONCURRENCY if each is None else _whole_number("load.worker_max_concurrency", each)
        cap = _whole_number("load.num_workers", workers) * each
    for name, value in (("load.num_workers", workers), ("load.worker_max_concurrency", each)):
        if value is not None and _whole_number(name, value) < 1:
            raise InputError(f"`{name}` of the workload is {shown(value)}; it must be at least 1.")
    cap = min([*levels, *([] if cap is None else [cap])], default=None)
    if cap is not None and not 1 <= cap <= _MOST_CLIENTS:
        raise InputError(
            f"`load` allows {shown(cap)} requests in flight; it must be at least 1 and at most {_MOST_CLIENTS:,}."
        )
    return cap


def _is_closed(stage: Mapping[str, Any]) -> bool:
    return stage.get("concurrency_level") is not None


def _check_fields(fields: Mapping[str, Any], section: str) -> None:
    """Refuse a field that has a value and is unknown, or whose value is not modelled."""
    known, prefix = fields_of(section), f"{section}." if section else ""
    for name, value in fields.items():
        field = known.get(str(name))
        if field is None and value is not None and value is not False and value not in ([], {}, ""):
            raise InputError(
                f"Unknown workload field `{prefix}{str(name)[:80]}` ({shown(value)}). Known here: "
                f"{', '.join(sorted(known))}. If it does not change which requests are sent, remove it or set it to null."
            )
        if field is None or field.treatment != FIXED or value is None or _is_one_of(value, field.values):
            continue
        modelled = f"it must be one of {', '.join(map(str, field.values))}" if field.values else "it must be null"
        plain = value[:80] if isinstance(value, str) else shown(value)
        raise NotModelledError(
            f"`{prefix}{name}: {plain}` is not modelled ({field.meaning}); {modelled}. "
            "Requests of any other kind can be given as a table (`--requests`, or `replay_requests`)."
        )


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in values)


def _section(fields: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    section = fields.get(name) or {}
    if not isinstance(section, Mapping):
        raise InputError(f"`{prefix}{name}` of the workload is {shown(section)}; it must be a mapping of fields.")
    return section


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InputError(f"`{name}` of the workload is {shown(value)}; it must be true or false.")
    return bool(value)


def _number(name: str, value: Any, *, least: float = -np.inf) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"`{name}` of the workload is {shown(value)}; it must be a number.") from None
    if not np.isfinite(number) or number < least:
        bound = "" if least == -np.inf else f" of at least {least:g}"
        raise InputError(f"`{name}` of the workload is {shown(value)}; it must be a finite number{bound}.")
    return number


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0.0:
        raise InputError(f"`{name}` of the workload is {shown(value)}; it must be positive.")
    return number


def _whole_number(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise InputError(f"`{name}` of the workload is {shown(value)}; it must be a whole number.")
    return int(number)
