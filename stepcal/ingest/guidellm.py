"""GuideLLM's ``benchmarks.json``, `metadata.version` 1 and 2: every benchmark of a sweep becomes a stage of load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ijson.common import ObjectBuilder

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, events, number, number_or_nan, rejected, whole
from stepcal.ingest.request_log import Request
from stepcal.units import MS_PER_S

_KINDS = ("successful", "errored", "incomplete")
_PLACES = {f"benchmarks.item.requests.{kind}.item": kind for kind in _KINDS}
_VERSIONS = (1, 2)


def _requests(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield benchmark, kind and object of each request."""
    benchmark, place, builder = -1, "", ObjectBuilder()
    for prefix, event, value in events(path):
        if prefix == "metadata.version" and value not in _VERSIONS:
            raise UnreadableError(
                f"{path}: `metadata.version` is {value!r}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are known. Write the "
                "file with a GuideLLM from 0.4 to 0.8."
            )
        if prefix == "benchmarks.item" and event == "start_map":
            benchmark += 1
        if not place and event == "start_map" and prefix in _PLACES:
            place, builder = prefix, ObjectBuilder()
        if place:
            builder.event(event, value)
            if prefix == place and event == "end_map":
                yield benchmark, _PLACES[place], builder.value
                place = ""


def _read(path: Path, options: Options) -> Iterator[Row]:
    del options
    row = 0
    for benchmark, kind, content in _requests(path):
        row += 1
        try:
            yield _request(content, kind, benchmark, row)
        except MALFORMED as error:
            yield rejected(row, str(error), content.get("info"))
    if not row:
        raise UnreadableError(
            f"{path} holds no requests. GuideLLM writes them to its JSON output unless told to drop them."
        )


def _request(content: dict[str, Any], kind: str, benchmark: int, row: int) -> Request:
    info = content.get("info") or {}
    times = info.get("timings") or {}
    sent = _first(times.get("request_start"), content.get("request_start_time"), content.get("start_time"))
    failed = kind != "successful"
    last = _first(times.get("last_token_iteration"), times.get("last_iteration"), content.get("last_token_time"))
    ttft_ms = number_or_nan(content.get("time_to_first_token_ms"), "time_to_first_token_ms")
    e2e, events_seen, longest = math.nan, None, None
    if not failed:
        is_streamed = last is not None and sent is not None and not math.isnan(ttft_ms)
        latency = number(content.get("request_latency"), "request_latency")
        e2e = number(last, "last_token_iteration") - number(sent, "request_start") if is_streamed else latency
        counted = times.get("token_iterations")
        events_seen = whole(counted, "token_iterations") if counted else None
    cached = content.get("cached_tokens")
    return Request(
        source_row=row,
        prompt_tokens=_tokens(content, "prompt_tokens", failed),
        output_tokens=_tokens(content, "output_tokens", failed),
        sent_s=number_or_nan(sent, "request_start"),
        e2e_s=e2e,
        ttft_s=math.nan if failed else ttft_ms / MS_PER_S,
        error=str(info.get("error") or kind) if failed else None,
        stage=benchmark,
        stream_events=events_seen,
        longest_gap_s=longest,
        cached_prompt_tokens=None if cached is None else whole(cached, "cached_tokens"),
        session_id=info.get("conversation_id") if info.get("turn_index") else None,
    )


def _tokens(content: dict[str, Any], name: str, failed: bool) -> int:
    value = content.get(name)
    return 0 if value is None and failed else whole(value, name)


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _recognises(path: Path, head: bytes) -> bool:
    del path
    return head.lstrip().startswith(b"{") and (b"guidellm" in head or b'"benchmarks"' in head)


def _describe(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, event, value in events(path):
        if prefix in ("metadata.version", "metadata.guidellm_version") and event in ("string", "number"):
            found[prefix.rpartition(".")[2]] = value
        if prefix.startswith("benchmarks"):
            break
    return found


FORMAT = Format(
    name="guidellm",
    version=1,
    recognises=_recognises,
    read=_read,
    describe=_describe,
    definitions={
        "sent": "`info.timings.request_start`, Unix seconds; `targeted_start` is when it was due.",
        "e2e": "`request_latency` runs to the end of the connection; we take `last_token_iteration` - `request_start`.",
        "ttft": "`time_to_first_token_ms`, from `request_start`. Kept, in seconds.",
        "itl": "`inter_token_latency_ms` is the mean gap between tokens without the first: the same as our TPOT. Not kept.",
        "tpot": "`time_per_output_token_ms` includes the first token: dropped and computed anew.",
        "concurrency": "`max_concurrency` is a cap; the `concurrent` profile is a closed loop. Each benchmark is a stage.",
    },
    verified="version 2 made by GuideLLM 0.8.1 against a mock server; version 1: unverified format",
)
