"""Workloads of the load generator inference-perf, as asked for (`profile.yaml`) or as run (`results/config.yaml`).

Only its `shared_prefix` data are modelled: groups of prompts with a common system prompt, which the generator sends
one after the other, over and over. A field that is not known is refused by name, because ignoring it would simulate
another workload.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stepcal.errors import InputError, NotModelledError
from stepcal.simulator.arrivals import LoadStage, generate_arrivals
from stepcal.simulator.workload import RequestList
from stepcal.units import IntArray

# Fields that say something about the workload.
_SHARED_PREFIX_FIELDS = {
    "num_groups": "n_groups",
    "num_unique_system_prompts": "n_groups",
    "num_prompts_per_group": "n_prompts_per_group",
    "num_users_per_system_prompt": "n_prompts_per_group",
    "system_prompt_len": "system_prompt_len",
    "question_len": "question_len",
    "output_len": "output_len",
}
# Fields that say nothing about it, and fields that may only have the values given (None: absent).
_SILENT_SECTIONS = {"report", "storage", "tokenizer", "metrics", "circuit_breakers"}
_SILENT_LOAD_FIELDS = {
    "interval",
    "num_workers",
    "worker_max_concurrency",
    "worker_max_tcp_connections",
    "circuit_breakers",
}
_FIXED_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "api": {"type": ("completion", "chat"), "streaming": (True, False), "headers": (None,)},
    "data": {
        "type": ("shared_prefix",),
        "path": (None,),
        "input_distribution": (None,),
        "output_distribution": (None,),
    },
    "load": {"type": ("constant", "poisson"), "sweep": (None,)},
    "server": {"type": ("vllm",), "ignore_eos": (True,)},
}
_MOST_TOKENS = 10**9  # lengths are 32-bit integers
_SILENT_FIELDS = {
    "server": {"model_name", "base_url", "api_key"},
    "load": _SILENT_LOAD_FIELDS,
    "data": set(),
    "api": set(),
}


@dataclass(frozen=True, kw_only=True)
class SharedPrefixWorkload:
    """Groups of prompts that begin with a common system prompt, sent in turns at given rates.

    Parameters
    ----------
    n_groups, n_prompts_per_group : int
        System prompts, and questions asked about each.
    system_prompt_len, question_len, output_len : int
        Tokens.
    stages : tuple of LoadStage
    timeout_s : float
        How long the client waits, infinite if the file does not say.
    multi_turn_chat : bool
        What the file says of `enable_multi_turn_chat`. The runs of the seed study asked for it, but were run without
        (their prompts do not grow), so `requests` does not act on it; conversations are made by
        `workload.make_conversations`.
    """

    n_groups: int
    n_prompts_per_group: int
    system_prompt_len: int
    question_len: int
    output_len: int
    stages: tuple[LoadStage, ...]
    timeout_s: float = np.inf
    multi_turn_chat: bool = False

    def __post_init__(self) -> None:
        for name in ("n_groups", "n_prompts_per_group", "system_prompt_len", "question_len", "output_len"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"`{name}` of a shared-prefix workload is {getattr(self, name)}; it must be at least 1."
                )
            if getattr(self, name) > _MOST_TOKENS:
                raise InputError(
                    f"`{name}` of a shared-prefix workload is {getattr(self, name)}; it must be at most {_MOST_TOKENS}."
                )
        if not self.stages:
            raise InputError("`load.stages` is empty; a workload needs at least one stage with a rate and a duration.")

    @property
    def n_prompts(self) -> int:
        """Different prompts, through which the generator cycles."""
        return self.n_groups * self.n_prompts_per_group

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt."""
        return self.system_prompt_len + self.question_len

    def with_prompt_len(self, tokens: float) -> "SharedPrefixWorkload":
        """The workload with prompts as long as they were measured; the tokeniser makes more of them than was asked for.

        Parameters
        ----------
        tokens : float
            Typical length of a prompt. Shorter than asked for, or not finite, it changes nothing.
        """
        longer = round(tokens) - self.prompt_len if np.isfinite(tokens) else 0
        return replace(self, question_len=self.question_len + longer) if longer > 0 else self

    def segments(self, number: IntArray, prompt_len: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Prompts as segments: a system prompt and a question.

        Parameters
        ----------
        number : ndarray of int, shape (n,)
            Which of the `n_prompts` texts each prompt is.
        prompt_len : ndarray of int, shape (n,)
            Its tokens; the question takes what the system prompt leaves.

        Returns
        -------
        prompt_start, segment_content, segment_tokens : ndarray of int
            See `RequestList`. System prompts have the contents 0 to ``n_groups - 1``, questions those after.
        """
        content = np.column_stack((number // self.n_prompts_per_group, self.n_groups + number))
        system = np.minimum(self.system_prompt_len, prompt_len - 1)
        tokens = np.column_stack((system, prompt_len - system))
        # A prompt of one token has a question only.
        is_kept = tokens.reshape(-1) > 0
        start = np.concatenate(([0], np.cumsum(is_kept.reshape(-1, 2).sum(axis=1))))
        return start, content.reshape(-1)[is_kept].astype(np.int64), tokens.reshape(-1)[is_kept].astype(np.int64)

    def requests(self, process: str = "poisson", *, cv: float | None = None, seed: int = 0) -> RequestList:
        """Requests of this workload at generated times.

        Parameters
        ----------
        process, cv, seed
            See `arrivals.generate_arrivals`.

        Returns
        -------
        RequestList
        """
        arrival_s, stage = generate_arrivals(self.stages, process, cv=cv, seed=seed)
        n = arrival_s.size
        start, content, tokens = self.segments(np.arange(self.n_prompts), np.full(self.n_prompts, self.prompt_len))
        return RequestList(
            arrival_s=arrival_s,
            prompt=(np.arange(n) % self.n_prompts).astype(np.int32),
            prompt_start=start,
            segment_content=content,
            segment_tokens=tokens,
            output_tokens=np.full(n, self.output_len, np.int32),
            stage=stage,
        )


def read_workload(source: str | Path | Mapping[str, Any]) -> SharedPrefixWorkload:
    """Read an inference-perf workload.

    Parameters
    ----------
    source : path or mapping
        A `profile.yaml` or `results/config.yaml`, or what is in it.

    Returns
    -------
    SharedPrefixWorkload

    Raises
    ------
    NotModelledError
        If a field asks for what is not modelled; it is named.
    InputError
        If a field is unknown or missing; it is named.
    """
    document = source if isinstance(source, Mapping) else _parsed(Path(source))
    if not isinstance(document, Mapping):
        raise InputError(
            f"The workload {source} is not a mapping of `data`, `load` and so on, as inference-perf writes it."
        )
    _refuse_unknown(document, {"data", "load", "api", "server"} | _SILENT_SECTIONS, "")
    data, load = _section(document, "data"), _section(document, "load")
    for section, known in _FIXED_FIELDS.items():
        fields = _section(document, section)
        extra = {"data": {"shared_prefix"}, "load": {"stages", "request_timeout"}}.get(section, set())
        for name, values in known.items():
            if name in fields and fields[name] not in values:
                raise NotModelledError(
                    f"`{section}.{name}: {fields[name]}` is not modelled; it must be one of "
                    f"{', '.join(map(str, values))}. "
                    "Requests of any other kind can be given as a table (`replay_requests`)."
                )
        _refuse_unknown(fields, set(known) | _SILENT_FIELDS[section] | extra, f"{section}.")
    shared = _section(data, "shared_prefix", "data.")
    if not shared:
        raise InputError(
            "The workload has no `data.shared_prefix`, the only kind of inference-perf data that is modelled."
        )
    _refuse_unknown(shared, {*_SHARED_PREFIX_FIELDS, "enable_multi_turn_chat"}, "data.shared_prefix.")
    lengths = {
        _SHARED_PREFIX_FIELDS[name]: _whole_number(f"data.shared_prefix.{name}", value)
        for name, value in shared.items()
        if name in _SHARED_PREFIX_FIELDS
    }
    for name in dict.fromkeys(_SHARED_PREFIX_FIELDS.values()):
        aliases = [field for field, ours in _SHARED_PREFIX_FIELDS.items() if ours == name]
        if name not in lengths:
            raise InputError(f"`data.shared_prefix` lacks {' or '.join(f'`{field}`' for field in aliases)}.")
        if sum(field in shared for field in aliases) > 1:
            raise InputError(
                f"`data.shared_prefix` has {' and '.join(f'`{f}`' for f in aliases)}: keep one, they are one."
            )
    timeout, stages = load.get("request_timeout"), load.get("stages") or ()
    if not isinstance(stages, Sequence) or not all(isinstance(stage, Mapping) for stage in stages):
        raise InputError(f"`load.stages` is {stages!r}; it must be a list of stages, each with `rate` and `duration`.")
    return SharedPrefixWorkload(
        **lengths,
        stages=tuple(_read_stage(stage) for stage in stages),
        timeout_s=np.inf if timeout is None else _number("load.request_timeout", timeout),
        multi_turn_chat=bool(shared.get("enable_multi_turn_chat", False)),
    )


def _read_stage(stage: Mapping[str, Any]) -> LoadStage:
    _refuse_unknown(stage, {"rate", "duration"}, "load.stages.")
    for name in ("rate", "duration"):
        if name not in stage:
            raise InputError(f"A stage of `load.stages` lacks `{name}`.")
    rate, duration = (_number(f"load.stages.{name}", stage[name]) for name in ("rate", "duration"))
    return LoadStage(rate=rate, duration_s=duration)


def _parsed(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}. Give a workload of inference-perf.") from None


def _section(fields: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    section = fields.get(name) or {}
    if not isinstance(section, Mapping):
        raise InputError(f"`{prefix}{name}` of the workload is {section!r}; it must be a mapping of fields.")
    return section


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"`{name}` of the workload is {value!r}; it must be a number.") from None


def _whole_number(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise InputError(f"`{name}` of the workload is {value!r}; it must be a whole number.")
    return int(number)


def _refuse_unknown(fields: Mapping[str, Any], known: set[str], prefix: str) -> None:
    for name in fields:
        if name not in known:
            raise InputError(
                f"Unknown workload field `{prefix}{name}`. Known here: {', '.join(sorted(known))}. "
                "If it does not change which requests are sent, remove it."
            )
