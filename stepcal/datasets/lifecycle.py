"""Latency files of the load generator inference-perf: summaries per stage and whole run, and one record per request.

Summaries become tidy rows (metric, statistic, value, unit). Two traps of the source are kept and named: lengths of the
output are re-tokenised text, and its token intervals count stream events, of which vLLM sent about two a token.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.datasets.schemas import validate_requests
from stepcal.errors import InputError
from stepcal.units import MS_PER_S, US_PER_S

WHOLE_RUN = -1
"""Stage number of figures over all stages of a run."""


STATISTICS = {"mean": "mean", "median": "p50", "p90": "p90", "p99": "p99"}
LATENCIES = {
    "request_latency": "e2e",
    "time_to_first_token": "ttft",
    "inter_token_latency": "itl",
    "time_per_output_token": "tpot",
}
LENGTHS = {"prompt_len": "prompt_len", "output_len": "output_len"}
THROUGHPUTS = {
    "requests_per_sec": ("requests", "request/s"),
    "input_tokens_per_sec": ("input_tokens", "token/s"),
    "output_tokens_per_sec": ("output_tokens", "token/s"),
    "total_tokens_per_sec": ("total_tokens", "token/s"),
}
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
            for theirs, ours in STATISTICS.items():
                seconds = document.number("successes", "latency", key, theirs)
                rows.append((metric, ours, None if seconds is None else seconds * MS_PER_S, "ms"))
        for key, metric in LENGTHS.items():
            for theirs, ours in STATISTICS.items():
                rows.append((metric, ours, document.number("successes", key, theirs), "token"))
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
    entries = _json(path)
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
        times = info.get("output_token_times") or []
        if not failed:
            prompt, output = info["input_tokens"], info["output_tokens"]
        else:
            prompt, output = info.get("input_tokens") or 0, info.get("output_tokens") or 0
        first_token_s = float(times[0]) - start if times else float("nan")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}, entry {position}: not a request record of inference-perf ({type(error).__name__}: {error}); "
            f"found {_keys(entry)}. Expected start_time, end_time, info (input_tokens, output_tokens, "
            "output_token_times) and error."
        ) from None
    return {
        "start_s": start,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "has_error": failed,
        "e2e_s": end - start,
        "ttft_s": first_token_s,
    }


class _Document:
    """A parsed summary file whose missing keys are named in full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = _json(path)

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
        if isinstance(node, bool) or not isinstance(node, int | float):
            raise InputError(f"{self._path}: `{'.'.join(keys)}` is {node!r}, but must be a number.")
        return float(node)

    def present(self, *keys: str) -> float:
        value = self.number(*keys)
        if value is None:
            raise InputError(f"{self._path}: `{'.'.join(keys)}` is null, but must be a number.")
        return value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}. Check the path.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). The file is corrupt or cut short: copy it again."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): it is no JSON file.") from error


def _keys(node: Any) -> str:
    if isinstance(node, dict):
        return "an object with " + (", ".join(f"`{key}`" for key in node) or "no keys")
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
