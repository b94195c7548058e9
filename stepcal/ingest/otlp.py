"""Request spans of a stock vLLM: OTLP JSON lines, as an OpenTelemetry collector's file exporter writes them.

vLLM started with ``--otlp-traces-endpoint`` sends one span a request with ``gen_ai.latency.*`` attributes in seconds. Only
what is needed is decoded, which is what makes it quick. Latencies are the server's: the way to the client is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stepcal.ingest.formats import Format, Options, Row, UnreadableError
from stepcal.ingest.json_files import MALFORMED, decoded_lines, rejected
from stepcal.ingest.request_log import Rejected, Request

_NS_PER_S = 1e9
_E2E = "gen_ai.latency.e2e"
_TTFT = "gen_ai.latency.time_to_first_token"
_QUEUE = "gen_ai.latency.time_in_queue"
_PROMPT = "gen_ai.usage.prompt_tokens"
_OUTPUT = "gen_ai.usage.completion_tokens"
_CACHED = "gen_ai.usage.cached_tokens"
_WANTED = frozenset((_E2E, _TTFT, _QUEUE, _PROMPT, _OUTPUT, _CACHED))


class _Value(msgspec.Struct):
    """OTLP's AnyValue, as far as numbers go; 64-bit integers come as strings."""

    intValue: str | int | None = None  # noqa: N815
    doubleValue: float | int | str | None = None  # noqa: N815
    stringValue: str | None = None  # noqa: N815


class _Attribute(msgspec.Struct):
    key: str
    value: _Value


class _Span(msgspec.Struct):
    startTimeUnixNano: str | int = 0  # noqa: N815
    attributes: list[_Attribute] = []


class _Scope(msgspec.Struct):
    spans: list[_Span] = []


class _Resource(msgspec.Struct):
    scopeSpans: list[_Scope] = []  # noqa: N815


class _Export(msgspec.Struct):
    resourceSpans: list[_Resource]  # noqa: N815


def _read(path: Path, options: Options) -> Iterator[Row]:
    del options
    decoder = msgspec.json.Decoder(_Export)
    found = False
    for line in decoded_lines(path, decoder):
        if isinstance(line, Rejected):
            yield line
            continue
        number, export = line
        for resource in export.resourceSpans:
            for scope in resource.scopeSpans:
                for span in scope.spans:
                    row = _request(span, number)
                    if row is not None:
                        found = True
                        yield row
    if not found:
        raise UnreadableError(
            f"{path} has no span with `{_E2E}`. Start vLLM with `--otlp-traces-endpoint` and let the collector's file "
            "exporter write JSON lines."
        )


def _request(span: _Span, line: int) -> Row | None:
    """The request of a span; None where the span is no request."""
    values = {a.key: a.value for a in span.attributes if a.key in _WANTED}
    if _E2E not in values:
        return None
    try:
        queue, cached = values.get(_QUEUE), values.get(_CACHED)
        return Request(
            line,
            _whole(values, _PROMPT),
            _whole(values, _OUTPUT),
            int(span.startTimeUnixNano) / _NS_PER_S,
            _number(values[_E2E]),
            _number(values[_TTFT]) if _TTFT in values else math.nan,
            queue_s=None if queue is None else _number(queue),
            cached_prompt_tokens=None if cached is None else _whole(values, _CACHED),
        )
    except MALFORMED as error:
        return rejected(line, str(error), str(values))


def _number(value: _Value) -> float:
    found = value.doubleValue if value.doubleValue is not None else value.intValue
    if found is None:
        raise ValueError(f"{value} holds no number")
    return float(found)


def _whole(values: dict[str, _Value], name: str) -> int:
    if name not in values:
        raise ValueError(f"`{name}` is missing")
    number = _number(values[name])
    if number != int(number):
        raise ValueError(f"`{name}` is {number}; it must be a whole number")
    return int(number)


def _recognises(path: Path, head: bytes) -> bool:
    del path
    return b'"resourceSpans"' in head


FORMAT = Format(
    name="otlp",
    version=1,
    recognises=_recognises,
    read=_read,
    definitions={
        "sent": "`startTimeUnixNano`: when the request reached the engine, not when the client sent it.",
        "e2e": "`gen_ai.latency.e2e`, in the server, without network and client. Compare with an API time of 0.",
        "ttft": "`gen_ai.latency.time_to_first_token`, in the server. Kept.",
        "itl": "Not in the spans.",
        "tpot": "(e2e - ttft) / (completion_tokens - 1): ours.",
        "concurrency": "Not in the spans; counted from the requests in flight.",
    },
    verified="unverified format: vLLM's attribute names in JSON of the OTLP specification, invented file",
)
