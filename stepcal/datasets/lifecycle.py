"""Latency files of the load generator inference-perf: summaries per stage and whole run, and one record per request.

Summaries become tidy rows (metric, statistic, value, unit). Two traps of the source are kept and named: lengths of the
output are re-tokenised text, and its token intervals count stream events, of which vLLM sent about two a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.datasets.schemas import validate_requests
from stepcal.documents import read_json
from stepcal.errors import InputError, shown
from stepcal.units import MS_PER_S, US_PER_S

WHOLE_RUN = -1
"""Stage number of figures over all stages of a run."""
MEAN = "mean"
QUANTILES = {"median": "p50", "p50": "p50", "p90": "p90", "p99": "p99"}
"""Statistics by their names in the files; since release 0.4 a run can leave out any quantile."""
LATENCIES = {
    "request_latency": "e2e",
    "time_to_first_token": "ttft",
    "inter_token_latency": "itl",
    "time_per_output_token": "tpot",
}
LENGTHS = {"prompt_len": ("prompt_len", "prompt_tokens"), "output_len": ("output_len", "output_tokens")}
"""Names of lengths, the second since August 2026."""
THROUGHPUTS = {
    "requests_per_sec": ("requests", "request/s"),
    "input_tokens_per_sec": ("input_tokens", "token/s"),
    "output_tokens_per_sec": ("output_tokens", "token/s"),
    "total_tokens_per_sec": ("total_tokens", "token/s"),
}
INFO_SECTIONS = ("request_info", "response_info", "request_metrics", "response_metrics")
_MOST = 1e15
_MOST_KEYS_SHOWN = 20
_STAGE_NAME = re.compile(r"stage_(\d+)_lifecycle_metrics\.json$")
_WHOLE_RUN_NAME = re.compile(r"summary_lifecycle_metrics\.json$")


def read_lifecycle_summary(path: Path | str, *, stage: int | None = None) -> pd.DataFrame:
    """Read ``stage_N_lifecycle_metrics.json`` or ``summary_lifecycle_metrics.json`` into tidy rows.

    Parameters
    ----------
    path : Path or str
    stage : int, optional
        Overrides the stage that the file's name tells; -1 is the whole run.

    Returns
    -------
    DataFrame
        Columns stage, metric, statistic, value, unit. Counts (`requests`: requested, completed, failed); mean, p50,
        p90, p99 over completed requests of `e2e`, `ttft`, `itl`, `tpot` in ms and `prompt_len`, `output_len` in
        tokens; `throughput`. A statistic that the file leaves null (nothing completed) has no row.

    Raises
    ------
    InputError
        If the file is absent, not JSON, of another layout (the missing key is named), or its name tells no stage.
    """
    path = Path(path)
    document = _Document(path)
    stage = _stage(path) if stage is None else stage
    completed = document.number("successes", "count")
    rows: list[tuple[str, str, float | None, str]] = [
        ("requests", "requested", document.number("load_summary", "count"), "request"),
        ("requests", "completed", completed, "request"),
        ("requests", "failed", document.number("failures", "count"), "request"),
    ]
    if completed:
        for key, metric in LATENCIES.items():
            values = document.statistics("successes", "latency", key)
            rows += [(metric, name, value * MS_PER_S, "ms") for name, value in values.items()]
        for metric, keys in LENGTHS.items():
            values = document.statistics("successes", document.first_of(keys, "successes"))
            rows += [(metric, name, value, "token") for name, value in values.items()]
        for key, (statistic, unit) in THROUGHPUTS.items():
            rows.append(("throughput", statistic, document.number("successes", "throughput", key), unit))
    frame = pd.DataFrame(rows, columns=["metric", "statistic", "value", "unit"]).dropna(subset=["value"])
    frame.insert(0, "stage", stage)
    return frame.reset_index(drop=True)


def read_load_summary(path: Path | str) -> dict[str, float]:
    """Read how a stage was driven: requested and achieved rate (1/s), time spent sending (s), requests sent.

    Parameters
    ----------
    path : Path or str
        A ``stage_N_lifecycle_metrics.json``.

    Returns
    -------
    dict
        Keys requested_rate_per_s, achieved_rate_per_s, send_duration_s, requests.

    Raises
    ------
    InputError
        If the file is absent, not JSON, or lacks one of the figures.
    """
    document = _Document(Path(path))
    keys = {
        "requested_rate_per_s": "requested_rate",
        "achieved_rate_per_s": "achieved_rate",
        "send_duration_s": "send_duration",
        "requests": "count",
    }
    return {ours: document.present("load_summary", theirs) for ours, theirs in keys.items()}


def read_lifecycle_per_request(path: Path | str, *, experiment_id: str) -> pd.DataFrame:
    """Read ``per_request_lifecycle_metrics.json`` into request rows (unverified format).

    Expected, from the public project's report code: a list of ``{start_time, end_time, request, response, info:
    {input_tokens, output_tokens, output_token_times}, error}``, times in seconds of one clock, `error` null on success.
    No public sample was found; tested on an invented fixture only.

    Parameters
    ----------
    path : Path or str
    experiment_id : str
        Name of the run, which the file does not tell.

    Returns
    -------
    DataFrame
        Canonical request rows, by arrival.

    Raises
    ------
    InputError
        If the file is absent, not JSON, of another layout (the entry and its keys are named), or breaks the schema.
    """
    path = Path(path)
    entries = read_json(path, what="file of inference-perf")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a non-empty JSON list of requests, found {_keys(entries)}.")
    rows = [_request(entry, position, path) for position, entry in enumerate(entries, start=1)]
    frame = pd.DataFrame(rows).sort_values("start_s", kind="stable").reset_index(drop=True)
    since_first_s = frame["start_s"] - frame["start_s"].iloc[0]
    frame = frame.assign(
        experiment_id=experiment_id,
        index=np.arange(len(frame)),
        arrival_time_us=(since_first_s * US_PER_S).round().astype("int64"),
    )
    return validate_requests(frame.drop(columns="start_s"), source=str(path))


def _request(entry: Any, position: int, path: Path) -> dict[str, Any]:
    try:
        failed = entry["error"] is not None
        info = entry["info"] or {}
        start, end = float(entry["start_time"]), float(entry["end_time"])
        if not (abs(start) < _MOST and abs(end) < _MOST):
            raise ValueError("times must be finite seconds")
        times = _found(info, "output_token_times") or []
        prompt, output = _found(info, "input_tokens", "prompt_tokens"), _found(info, "output_tokens")
        if not failed and (prompt is None or output is None):
            raise KeyError("input_tokens" if prompt is None else "output_tokens")
        first_token_s = float(times[0]) - start if times else float("nan")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}, entry {position}: not a request record of inference-perf ({type(error).__name__}: "
            f"{shown(str(error))}); found {_keys(entry)}. Expected start_time, end_time, info (input_tokens, "
            "output_tokens, output_token_times, themselves or in `response_info` or `response_metrics`) and error."
        ) from None
    return {
        "start_s": start,
        "prompt_tokens": prompt or 0,
        "output_tokens": output or 0,
        "has_error": failed,
        "e2e_s": end - start,
        "ttft_s": first_token_s,
    }


def _found(info: Mapping[str, Any], *names: str) -> Any:
    """A figure of a request: in `info` itself (to 0.4), in `response_info` (0.5) or in `response_metrics` (from 0.6)."""
    parts = (info, *(info[k] for k in INFO_SECTIONS if isinstance(info.get(k), Mapping)))
    return next((part[name] for part in parts for name in names if part.get(name) is not None), None)


class _Document:
    """A parsed summary file whose missing keys are named in full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = read_json(path, what="file of inference-perf")

    def number(self, *keys: str) -> float | None:
        node = self._content
        for depth, key in enumerate(keys):
            if not isinstance(node, dict) or key not in node:
                where = ".".join(keys[: depth + 1])
                raise InputError(
                    f"{self._path}: lacks `{where}` (found there: {_keys(node)}). "
                    "Give a summary that inference-perf wrote with `report.request_lifecycle.summary: true`."
                )
            node = node[key]
        if node is None:
            return None
        is_number = isinstance(node, int | float) and not isinstance(node, bool)
        if not is_number or not 0 <= node < _MOST:
            raise InputError(
                f"{self._path}: `{'.'.join(keys)}` is {shown(node)}, but must be a finite number of at least 0."
            )
        return float(node)

    def first_of(self, names: tuple[str, ...], *section: str) -> str:
        """The first of several names that a section has; the first of all if it has none."""
        node = self._node(*section)
        return next((name for name in names if isinstance(node, dict) and name in node), names[0])

    def statistics(self, *keys: str) -> dict[str, float]:
        """Mean and quantiles of a quantity; none where the quantity is null, as latencies of tokens without streaming."""
        if self._is_null(*keys):
            return {}
        found = {MEAN: self.number(*keys, MEAN)}
        for theirs, ours in QUANTILES.items():
            if ours not in found and self._has(*keys, theirs):
                found[ours] = self.number(*keys, theirs)
        return {name: value for name, value in found.items() if value is not None}

    def _is_null(self, *keys: str) -> bool:
        return self._has(*keys) and self._node(*keys) is None

    def _has(self, *keys: str) -> bool:
        parent = self._node(*keys[:-1])
        return isinstance(parent, dict) and keys[-1] in parent

    def _node(self, *keys: str) -> Any:
        node: Any = self._content
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def present(self, *keys: str) -> float:
        value = self.number(*keys)
        if value is None:
            raise InputError(f"{self._path}: `{'.'.join(keys)}` is null, but must be a number.")
        return value


def _keys(node: Any) -> str:
    if isinstance(node, dict):
        names = [f"`{str(key)[:40]}`" for key in list(node)[:_MOST_KEYS_SHOWN]]
        return "an object with " + (", ".join(names) or "no keys") + (", ..." if len(node) > _MOST_KEYS_SHOWN else "")
    return f"a {type(node).__name__}"


def _stage(path: Path) -> int:
    if match := _STAGE_NAME.search(path.name):
        return int(match.group(1))
    if _WHOLE_RUN_NAME.search(path.name):
        return WHOLE_RUN
    raise InputError(
        f"{path}: the name tells no stage (expected `stage_N_lifecycle_metrics.json` or "
        "`summary_lifecycle_metrics.json`). Rename the file or pass `stage`."
    )
