"""AIPerf's ``profile_export.jsonl``: one record a request, each metric with its own unit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, decoded_lines, number, rejected, whole
from stepcal.ingest.request_log import Rejected, Request

_NS_PER_S = 1e9
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "us": 1e-6, "ns": 1e-9}
_WARM_UP = "warmup"


class _Metric(msgspec.Struct):
    value: Any
    unit: str = ""


class _Record(msgspec.Struct):
    metadata: dict[str, Any]
    metrics: dict[str, _Metric] = {}
    error: dict[str, Any] | str | None = None


def _read(path: Path, options: Options) -> Iterator[Row]:
    del options
    found = False
    for line in decoded_lines(path, msgspec.json.Decoder(_Record)):
        if isinstance(line, Rejected):
            yield line
            continue
        row, record = line
        if record.metadata.get("benchmark_phase") == _WARM_UP:
            continue
        found = True
        try:
            yield _request(record, row)
        except MALFORMED as error:
            yield rejected(row, str(error), record.metadata)
    if not found:
        raise UnreadableError(f"{path} holds no request of a profiling phase.")


def _request(record: _Record, row: int) -> Request:
    about, metrics = record.metadata, record.metrics
    error = record.error
    message = None if error is None else str(error.get("message", error) if isinstance(error, dict) else error)
    if message is None and about.get("was_cancelled"):
        message = "cancelled by the client"
    failed = message is not None
    gaps = metrics.get("inter_chunk_latency")
    seconds = [] if gaps is None else [number(g, "inter_chunk_latency") for g in gaps.value]
    turn = about.get("turn_index")
    return Request(
        source_row=row,
        prompt_tokens=_tokens(metrics, ("usage_prompt_tokens", "input_sequence_length"), failed),
        output_tokens=_tokens(metrics, ("usage_completion_tokens", "output_sequence_length"), failed),
        sent_s=number(about.get("request_start_ns"), "request_start_ns") / _NS_PER_S,
        e2e_s=math.nan if failed else _seconds(metrics, "request_latency"),
        ttft_s=math.nan if failed or "time_to_first_token" not in metrics else _seconds(metrics, "time_to_first_token"),
        error=message,
        stage=whole(about.get("phase_index") or 0, "phase_index"),
        stream_events=None if failed or gaps is None else len(seconds) + 1,
        longest_gap_s=max(seconds) * _SECONDS[gaps.unit] if gaps is not None and seconds else None,
        session_id=str(about.get("conversation_id")) if turn else None,
    )


def _seconds(metrics: dict[str, _Metric], name: str) -> float:
    if name not in metrics:
        raise ValueError(f"`{name}` is missing")
    metric = metrics[name]
    if metric.unit not in _SECONDS:
        raise ValueError(f"`{name}` is in {metric.unit!r}; known units of time are {', '.join(_SECONDS)}")
    return number(metric.value, name) * _SECONDS[metric.unit]


def _tokens(metrics: dict[str, _Metric], names: tuple[str, ...], failed: bool) -> int:
    value = next((metrics[name].value for name in names if name in metrics), None)
    return 0 if value is None and failed else whole(value, names[-1])


FORMAT = Format(
    name="aiperf",
    version=1,
    recognises=lambda path, head: b'"credit_issued_ns"' in head or (b'"timestamp_ns"' in head and b'"metrics"' in head),
    read=_read,
    definitions={
        "sent": "`request_start_ns`, Unix time. `credit_issued_ns` is when it was due.",
        "e2e": "`request_latency`, from sending to the last event with output. Kept, in seconds by its own unit.",
        "ttft": "`time_to_first_token`. Kept, in seconds by its own unit.",
        "itl": "`inter_token_latency` is our TPOT; `inter_chunk_latency` are gaps of events, kept as longest and number.",
        "tpot": "Our own, the same as its `inter_token_latency`.",
        "concurrency": "`--concurrency` is a closed loop, with `--request-rate` a cap. Warm-up requests are left out.",
    },
    verified="made by AIPerf 0.13.0 against a mock server",
)
