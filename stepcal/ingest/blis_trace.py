"""BLIS TraceV2: a YAML header and a CSV table, in one file (header between ``---`` lines) or in two beside each other."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, rejected
from stepcal.ingest.request_log import Request
from stepcal.units import US_PER_S

_NEEDED = (
    "input_tokens",
    "output_tokens",
    "arrival_time_us",
    "send_time_us",
    "first_chunk_time_us",
    "last_chunk_time_us",
)
_DONE = ("ok", "success", "completed", "200", "")


def _read(path: Path, options: Options) -> Iterator[Row]:
    del options
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            skipped = 0
            start = stream.tell()
            line = stream.readline()
            while line and "input_tokens" not in line:
                skipped, start = skipped + 1, stream.tell()
                line = stream.readline()
            stream.seek(start)
            table = csv.DictReader(stream)
            missing = [c for c in _NEEDED if c not in (table.fieldnames or ())]
            if missing:
                raise UnreadableError(
                    f"{path} lacks the column `{missing[0]}` of a BLIS TraceV2. Found: {table.fieldnames}."
                )
            for record in table:
                row = skipped + table.line_num
                try:
                    yield _request(record, row)
                except MALFORMED as error:
                    yield rejected(row, str(error), str(record))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(f"{path} cannot be read as a CSV table: {error}.") from None


def _request(record: dict[str, str], row: int) -> Request:
    status = (record.get("status") or "").strip().lower()
    failed = status not in _DONE
    sent = float(record["send_time_us"] or record["arrival_time_us"])
    first, last = (float(record[c]) if record[c] else math.nan for c in _NEEDED[-2:])
    return Request(
        source_row=row,
        prompt_tokens=int(record["input_tokens"]),
        output_tokens=int(record["output_tokens"]),
        sent_s=sent / US_PER_S,
        e2e_s=math.nan if failed else (last - sent) / US_PER_S,
        ttft_s=math.nan if failed else (first - sent) / US_PER_S,
        error=status if failed else None,
        session_id=record.get("session_id") or None,
    )


FORMAT = Format(
    name="blis-trace",
    version=1,
    recognises=lambda path, head: b"first_chunk_time_us" in head and b"send_time_us" in head,
    read=_read,
    definitions={
        "sent": "`send_time_us`; `arrival_time_us` is when it was due. Kept, counted from the first.",
        "e2e": "`last_chunk_time_us` - `send_time_us`: ours. From `arrival_time_us` it would hold the client's own delay.",
        "ttft": "`first_chunk_time_us` - `send_time_us`: ours.",
        "itl": "Not in the table; chunks are stream events.",
        "tpot": "(last - first) / (output_tokens - 1): ours.",
        "concurrency": "Sessions are closed loops; other requests come open loop.",
    },
    verified="unverified format: after its documentation, tested on an invented file",
)
