"""The formats that are known, and how the format of a file is told."""

from __future__ import annotations

from pathlib import Path

from stepcal.errors import InputError
from stepcal.ingest import aiperf, blis_trace, guidellm, inference_perf, line_records, mapped, otlp, vllm_bench
from stepcal.ingest.formats import Format, UnreadableError

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        vllm_bench.FORMAT,
        guidellm.FORMAT,
        aiperf.FORMAT,
        inference_perf.FORMAT,
        otlp.FORMAT,
        line_records.LLMSERVINGSIM,
        line_records.LLMPERF,
        line_records.SGLANG,
        blis_trace.FORMAT,
        mapped.FORMAT,
    )
}
"""Formats by name, in the order in which they are tried."""
_HEAD_BYTES = 1 << 16


def format_of(path: Path) -> Format:
    """Tell the format of a file by its head.

    Raises
    ------
    InputError
        If no known format fits.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
    if not head.strip():
        raise UnreadableError(f"{path} is empty.")
    found = next((f for f in FORMATS.values() if f.recognises(path, head)), None)
    if found is None:
        raise InputError(
            f"{path} looks like no known tool's file. Name its format with `--format` ({', '.join(FORMATS)}), or give a "
            "CSV or parquet table with `--mapping`."
        )
    return found


def format_named(name: str) -> Format:
    """Return a format by name.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in FORMATS:
        raise InputError(f"`--format {name}` is unknown. Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def definitions_table() -> list[dict[str, str]]:
    """Return what each tool means by its words, and what is done with it: a row a tool and word.

    Examples
    --------
    >>> {row["tool"] for row in definitions_table()} >= {"vllm-bench", "guidellm", "aiperf"}
    True
    """
    return [
        {"tool": f.name, "word": word, "meaning": meaning, "tested_on": f.verified}
        for f in FORMATS.values()
        for word, meaning in f.definitions.items()
    ]
