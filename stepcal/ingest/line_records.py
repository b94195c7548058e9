"""Tools that write a JSON record a request (llmperf, the bench of LLMServingSim) or a line a run (SGLang)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, decoded_lines, elements, number, number_or_nan, rejected, whole
from stepcal.ingest.request_log import Rejected, Request

_META = "meta.json"
_INVENTED = "unverified format: after the tool's documentation, tested on an invented file"


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Rejected]:
    """Objects of a JSON list or of JSON lines."""
    with path.open("rb") as stream:
        is_list = stream.read(4096).lstrip().startswith(b"[")
    if is_list:
        yield from enumerate(elements(path, "item"), start=1)
    else:
        yield from decoded_lines(path, msgspec.json.Decoder(dict[str, Any]))


def _read_llmperf(path: Path, options: Options) -> Iterator[Row]:
    del options
    for item in _objects(path):
        if isinstance(item, Rejected):
            yield item
            continue
        row, content = item
        try:
            code = content.get("error_code")
            failed = code is not None
            yield Request(
                source_row=row,
                prompt_tokens=whole(content.get("number_input_tokens"), "number_input_tokens"),
                output_tokens=whole(content.get("number_output_tokens"), "number_output_tokens"),
                sent_s=math.nan,
                e2e_s=number_or_nan(content.get("end_to_end_latency_s"), "end_to_end_latency_s"),
                ttft_s=math.nan if failed else number(content.get("ttft_s"), "ttft_s"),
                error=f"{code} {content.get('error_msg') or ''}".strip() if failed else None,
            )
        except MALFORMED as error:
            yield rejected(row, str(error), content)


def _read_llmservingsim(path: Path, options: Options) -> Iterator[Row]:
    del options
    for item in decoded_lines(path, msgspec.json.Decoder(dict[str, Any])):
        if isinstance(item, Rejected):
            yield item
            continue
        row, content = item
        try:
            queued = number(content.get("queued_ts"), "queued_ts")
            first = number(content.get("first_token_ts"), "first_token_ts")
            scheduled = content.get("scheduled_ts")
            yield Request(
                source_row=row,
                prompt_tokens=whole(content.get("input_toks"), "input_toks"),
                output_tokens=whole(content.get("output_toks"), "output_toks"),
                sent_s=queued,
                e2e_s=number(content.get("last_token_ts"), "last_token_ts") - queued,
                ttft_s=first - queued,
                queue_s=None if scheduled is None else number(scheduled, "scheduled_ts") - queued,
            )
        except MALFORMED as error:
            yield rejected(row, str(error), content)


def _describe_llmservingsim(path: Path) -> dict[str, Any]:
    meta = path.with_name(_META)
    if not meta.is_file():
        return {}
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableError(f"{meta} is no JSON document ({error}). Copy it again, or take it away.") from None
    return content if isinstance(content, dict) else {}


def _read_sglang(path: Path, options: Options) -> Iterator[Row]:
    del options
    count = 0
    for item in decoded_lines(path, msgspec.json.Decoder(dict[str, Any])):
        if isinstance(item, Rejected):
            yield item
            continue
        line, run = item
        lens, ttfts = run.get("input_lens"), run.get("ttfts")
        if not isinstance(lens, list) or not isinstance(ttfts, list):
            raise UnreadableError(
                f"{path}, line {line}: no `input_lens` and `ttfts`, so no figures of single requests. Run "
                "`sglang.bench_serving` again with `--output-details`."
            )
        for i in range(len(lens)):
            count += 1
            try:
                yield _sglang_request(run, i, count, "" if line == 1 else str(line))
            except MALFORMED as error:
                yield rejected(count, f"{type(error).__name__}: {error}", f"request {i} of line {line}")


def _sglang_request(run: dict[str, Any], i: int, row: int, name: str) -> Request:
    gaps = [number(g, "itls") for g in run["itls"][i]]
    ttft = number(run["ttfts"][i], "ttfts")
    failure = (run.get("errors") or [""] * (i + 1))[i]
    starts = run.get("start_times")
    return Request(
        source_row=row,
        prompt_tokens=whole(run["input_lens"][i], "input_lens"),
        output_tokens=whole(run["output_lens"][i], "output_lens"),
        sent_s=number(starts[i], "start_times") if starts else math.nan,
        e2e_s=math.nan if failure else ttft + sum(gaps),
        ttft_s=math.nan if failure else ttft,
        error=str(failure) if failure else None,
        stream_events=None if failure else len(gaps) + 1,
        longest_gap_s=max(gaps) if gaps else None,
        run=name,
    )


LLMPERF = Format(
    name="llmperf",
    version=1,
    recognises=lambda path, head: b'"end_to_end_latency_s"' in head and b'"ttft_s"' in head,
    read=_read_llmperf,
    definitions={
        "sent": "Not written. Without arrivals nothing can be replayed: lengths and latencies alone are kept.",
        "e2e": "`end_to_end_latency_s`, from sending to the end. Kept.",
        "ttft": "`ttft_s`, from sending. Kept.",
        "itl": "`inter_token_latency_s` is all times between tokens, the first included, over the output tokens: dropped.",
        "tpot": "(e2e - ttft) / (output - 1): ours.",
        "concurrency": "A closed loop of `num_concurrent_requests`.",
    },
    verified=_INVENTED,
)
LLMSERVINGSIM = Format(
    name="llmservingsim",
    version=1,
    recognises=lambda path, head: b'"input_toks"' in head and b'"first_token_ts"' in head,
    read=_read_llmservingsim,
    describe=_describe_llmservingsim,
    definitions={
        "sent": "`queued_ts`, the engine's monotonic clock; `arrival_time` is Unix time of another clock and dropped.",
        "e2e": "`last_token_ts` - `queued_ts`, in the engine: without the API server. Compare with an API time of 0.",
        "ttft": "`first_token_ts` - `queued_ts`, in the engine.",
        "itl": "Not in the file.",
        "tpot": "(last - first) / (output_toks - 1): ours.",
        "concurrency": "Open loop; in flight is counted from the rows.",
    },
    verified=_INVENTED,
)
SGLANG = Format(
    name="sglang",
    version=1,
    recognises=lambda path, head: b'"server_info"' in head or (b'"sglang' in head and b'"backend"' in head),
    read=_read_sglang,
    definitions={
        "sent": "Not written by most releases: arrivals are empty.",
        "e2e": "`ttfts` plus the sum of `itls`, from sending.",
        "ttft": "`ttfts`. Kept.",
        "itl": "A gap between stream events, divided by their tokens in newer releases. Kept as longest gap and number.",
        "tpot": "(e2e - ttft) / (output_lens - 1): ours.",
        "concurrency": "`max_concurrency` is a cap of the client.",
    },
    verified=_INVENTED,
)
