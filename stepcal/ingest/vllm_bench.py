"""``vllm bench serve --save-result --save-detailed``: a JSON object of columns a run; with ``--append-result`` several.

`itls` are gaps between stream events. They are summed as they are read and never held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import events, number, number_or_nan, rejected, whole
from stepcal.ingest.request_log import Request

_COLUMNS = ("input_lens", "output_lens", "ttfts", "latencies", "start_times", "errors", "server_queue_times")
_NEEDED = ("input_lens", "output_lens", "ttfts", "itls")


@dataclass
class _Run:
    """Columns of one run, with the token gaps of each request reduced to sum, number and longest."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    gaps: list[tuple[float, int, float] | str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


def _runs(path: Path) -> Iterator[_Run]:
    run, total, count, longest, bad = _Run(), 0.0, 0, 0.0, ""
    for prefix, event, value in events(path):
        if event == "map_key" and prefix == "":
            run.seen.add(str(value))
        elif prefix == "itls.item.item":
            if event == "number":
                total, count, longest = total + value, count + 1, max(longest, value)
            else:
                bad = f"`itls` holds {value!r}; gaps are finite numbers"
        elif prefix == "itls.item":
            if event == "start_array":
                total, count, longest, bad = 0.0, 0, 0.0, ""
            else:
                run.gaps.append(bad or (total, count, longest))
        elif prefix.endswith(".item") and prefix[:-5] in _COLUMNS:
            run.columns.setdefault(prefix[:-5], []).append(value)
        elif prefix == "" and event == "end_map":
            yield run
            run = _Run()


def _read(path: Path, options: Options) -> Iterator[Row]:
    del options
    row = 0
    for n, run in enumerate(_runs(path)):
        missing = [name for name in _NEEDED if name not in run.seen]
        if missing:
            raise UnreadableError(
                f"{path} has no `{missing[0]}`, so no figures of single requests. Run `vllm bench serve` again with "
                "`--save-result --save-detailed`."
            )
        size = len(run.gaps)
        uneven = next((c for c, values in run.columns.items() if values and len(values) != size), None)
        if uneven is not None:
            raise UnreadableError(
                f"{path}: `{uneven}` has {len(run.columns[uneven])} elements and `itls` {size}; a run has one of each a "
                "request. The file is damaged: copy it again."
            )
        for i in range(size):
            row += 1
            try:
                yield _request(run, i, row, "" if n == 0 else str(n + 1))
            except ValueError as error:
                yield rejected(row, str(error), {c: values[i] for c, values in run.columns.items() if values})
    if not row:
        raise UnreadableError(f"{path} holds no requests.")


def _request(run: _Run, i: int, row: int, name: str) -> Request:
    def cell(column: str) -> Any:
        values = run.columns.get(column)
        return values[i] if values else None

    failure = cell("errors")
    error = str(failure) if failure else None
    ttft = number_or_nan(cell("ttfts"), "ttfts")
    if error is None and ttft == 0.0:
        error = "no token came (an older release keeps no reason)"
    gap = run.gaps[i]
    if isinstance(gap, str):
        raise ValueError(gap)
    total, count, longest = gap
    latency = number_or_nan(cell("latencies"), "latencies")
    e2e = latency if latency > 0 else ttft + total
    failed = error is not None
    queue = cell("server_queue_times")
    return Request(
        source_row=row,
        prompt_tokens=whole(cell("input_lens"), "input_lens"),
        output_tokens=whole(cell("output_lens"), "output_lens"),
        sent_s=number_or_nan(cell("start_times"), "start_times"),
        e2e_s=math.nan if failed else e2e,
        ttft_s=math.nan if failed else ttft,
        error=error,
        stream_events=None if failed else count + 1,
        longest_gap_s=longest if count and not failed else None,
        queue_s=None if queue is None else number(queue, "server_queue_times"),
        run=name,
    )


def _recognises(path: Path, head: bytes) -> bool:
    del path
    return (
        head.lstrip().startswith(b"{")
        and (b'"endpoint_type"' in head or b'"tokenizer_id"' in head)
        and b'"date"' in head
    )


def _describe(path: Path) -> dict[str, Any]:
    wanted = ("backend", "model_id", "request_rate", "burstiness", "max_concurrency", "num_prompts", "duration")
    found: dict[str, Any] = {}
    for prefix, event, value in events(path):
        if prefix in wanted and event in ("string", "number", "null"):
            found[prefix] = value
        if prefix == "input_lens" or (prefix == "" and event == "end_map"):
            break
    return found


FORMAT = Format(
    name="vllm-bench",
    version=1,
    recognises=_recognises,
    read=_read,
    describe=_describe,
    definitions={
        "sent": "`start_times`: when the request left, after the client's own limit (`--max-concurrency`). Kept as it is.",
        "e2e": "`latencies`, from sending to the last event; where a release lacks it, `ttfts` plus the sum of `itls`.",
        "ttft": "`ttfts`, from sending to the first event with output. Kept as it is.",
        "itl": "A gap between stream events, which may carry several tokens. Kept as longest gap and number of events.",
        "tpot": "(latency - ttft) / (output_lens - 1): ours.",
        "concurrency": "A cap of the client. `queue_times` is the wait for it, outside all latencies: dropped.",
    },
    verified="made by vLLM 0.33.0's bench client against a mock server",
)
