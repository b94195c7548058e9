"""One request as every load generator's file is turned into it, and the table of them: names, units, definitions.

Definitions are the same whatever the tool: a latency runs from the moment the client sent the request, the time per output
token is ``(e2e_s - ttft_s) / (output_tokens - 1)``, and a stream event is not a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stepcal.errors import InputError

LONGEST_S = 1e6
"""A latency beyond this, eleven days, is a wrong unit and no measurement."""
MOST_TOKENS = 2**31 - 1
TEXT_LIMIT = 200
"""Characters of an error or of a refused line that are kept."""

_COLUMNS: tuple[tuple[str, Any, str, str], ...] = (
    ("experiment_id", pa.string(), "", "Run that the request belongs to."),
    ("index", pa.int64(), "request", "The request's place in its run, by arrival, from 0."),
    ("stage", pa.int32(), "", "Stage of load, from 0."),
    (
        "arrival_time_us",
        pa.int64(),
        "µs",
        "Sending, counted from the run's first request; empty where the tool keeps none.",
    ),
    ("prompt_tokens", pa.int64(), "token", "Prompt length; 0 where the request failed and the tool keeps none."),
    ("output_tokens", pa.int64(), "token", "Output length; 0 where the request failed and the tool keeps none."),
    ("has_error", pa.bool_(), "", "Whether the client gave up or was refused."),
    ("e2e_s", pa.float64(), "s", "From sending to the last token, or to giving up."),
    ("ttft_s", pa.float64(), "s", "From sending to the first token; empty without streaming."),
    ("stream_events", pa.int64(), "event", "Events that carried output, the first included; empty where not counted."),
    ("longest_gap_s", pa.float64(), "s", "Longest time between two stream events; empty where not kept."),
    ("queue_s", pa.float64(), "s", "Time in the server's queue, where the server says."),
    ("cached_prompt_tokens", pa.int64(), "token", "Prompt tokens found in the prefix cache, where the server says."),
    ("session_id", pa.string(), "", "Conversation that the request belongs to, where the tool says."),
    ("error", pa.string(), "", "What went wrong, as the tool says it (cut)."),
    ("source_row", pa.int64(), "", "Line, or entry, of the source file, from 1."),
)
SCHEMA = pa.schema([(name, kind) for name, kind, _, _ in _COLUMNS])
"""Arrow schema of an ingested request table, a column a field."""


def request_log_columns() -> list[dict[str, str]]:
    """Return the data dictionary of the table: column, kind, unit, meaning.

    Examples
    --------
    >>> request_log_columns()[7]["column"], request_log_columns()[7]["unit"]
    ('e2e_s', 's')
    """
    return [{"column": n, "kind": str(k), "unit": unit, "meaning": text} for n, k, unit, text in _COLUMNS]


@dataclass(slots=True)
class Request:
    """A request in our definitions, before it has a place in its run.

    Attributes
    ----------
    source_row : int
        Line, or entry, of the source file, from 1.
    prompt_tokens, output_tokens : int
    sent_s : float
        When the client sent it, on any one clock of the file; NaN where the tool keeps none.
    e2e_s, ttft_s : float
        NaN where the tool has none.
    error : str or None
        None for a request that completed.
    stage : int
    run : str
        Run within the file, for files that hold several; empty otherwise.
    """

    source_row: int
    prompt_tokens: int
    output_tokens: int
    sent_s: float
    e2e_s: float
    ttft_s: float
    error: str | None = None
    stage: int = 0
    stream_events: int | None = None
    longest_gap_s: float | None = None
    queue_s: float | None = None
    cached_prompt_tokens: int | None = None
    session_id: str | None = None
    run: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line or an entry that could not be used."""

    source_row: int
    reason: str
    text: str = ""


class BadRowError(InputError):
    """A row that breaks the table's rules; the message says which."""


def checked(request: Request) -> Request:
    """Return the request if it may enter the table.

    Raises
    ------
    BadRowError
        If a length is negative, a latency is not positive, or the first token comes after the last.
    """
    for name in ("prompt_tokens", "output_tokens"):
        tokens = getattr(request, name)
        least = 0 if request.error is not None else 1
        if not least <= tokens <= MOST_TOKENS:
            raise BadRowError(f"`{name}` is {tokens}; a request that completed has {least} to {MOST_TOKENS:,}")
    if math.isinf(request.sent_s):
        raise BadRowError(f"the time of sending is {request.sent_s}; it must be finite")
    if request.error is not None:
        return request
    if not 0.0 < request.e2e_s < LONGEST_S:
        raise BadRowError(f"the end-to-end latency is {request.e2e_s} s; it must be above 0 and below {LONGEST_S:g} s")
    if not math.isnan(request.ttft_s) and not 0.0 < request.ttft_s <= request.e2e_s * (1 + 1e-9):
        raise BadRowError(
            f"the time to the first token is {request.ttft_s} s; it must be above 0 and at most the end-to-end latency "
            f"of {request.e2e_s} s"
        )
    return request
