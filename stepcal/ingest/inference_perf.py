"""inference-perf's ``per_request_lifecycle_metrics.json``: requests with their token times, from release 0.2.

Where the tokens stand has moved: under ``info`` at first, ``info.response_info`` in 0.5, ``info.response_metrics`` from 0.6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, elements, number, rejected, whole
from stepcal.ingest.request_log import Request

_INNER = ("response_metrics", "response_info")


def _read(path: Path, options: Options) -> Iterator[Row]:
    del options
    row = 0
    for row, content in enumerate(elements(path, "item"), start=1):
        try:
            yield _request(content, row)
        except MALFORMED as error:
            yield rejected(row, str(error), content)
    if not row:
        raise UnreadableError(f"{path} holds no requests: an empty list, or no list.")


def _request(content: dict[str, Any], row: int) -> Request:
    info = content.get("info") or {}
    inner: dict[str, Any] = next((info[name] for name in _INNER if isinstance(info.get(name), dict)), {})
    about = {**info, **inner}
    failure = content.get("error")
    error = (
        None if failure is None else str(failure.get("error_msg", failure) if isinstance(failure, dict) else failure)
    )
    sent = number(content.get("start_time"), "start_time")
    end = number(content.get("end_time"), "end_time")
    times = [number(t, "output_token_times") for t in about.get("output_token_times") or []]
    gaps = [b - a for a, b in pairwise(times)]
    failed = error is not None
    last = times[-1] if times else end
    return Request(
        source_row=row,
        prompt_tokens=_tokens(about, ("input_tokens", "prompt_tokens"), failed),
        output_tokens=_tokens(about, ("output_tokens",), failed),
        sent_s=sent,
        e2e_s=math.nan if failed else last - sent,
        ttft_s=times[0] - sent if times and not failed else math.nan,
        error=error,
        stage=whole(content.get("stage_id") or 0, "stage_id"),
        stream_events=len(times) or None,
        longest_gap_s=max(gaps) if gaps else None,
    )


def _tokens(about: dict[str, Any], names: tuple[str, ...], failed: bool) -> int:
    value = next((about[name] for name in names if about.get(name) is not None), None)
    return 0 if value is None and failed else whole(value, names[0])


def _recognises(path: Path, head: bytes) -> bool:
    is_named = path.name.endswith("per_request_lifecycle_metrics.json")
    return is_named or (head.lstrip().startswith(b"[") and b'"start_time"' in head and b'"info"' in head)


FORMAT = Format(
    name="inference-perf",
    version=1,
    recognises=_recognises,
    read=_read,
    definitions={
        "sent": "`start_time`, seconds of one clock. Kept, counted from the first.",
        "e2e": "The last of `output_token_times` less `start_time`; `end_time` is later than the last token.",
        "ttft": "The first of `output_token_times` less `start_time`: ours.",
        "itl": "Gaps of `output_token_times`, which are stream events. Kept as longest gap and number of events.",
        "tpot": "Counts stream events: dropped and computed anew from tokens.",
        "concurrency": "`num_workers` x `worker_max_concurrency` is a cap; what waits for it is outside latencies.",
    },
    verified="unverified format: layouts of releases 0.2 to 0.6.1; the tool is not on the registry",
)
