"""Request traces of others, for replay: arrivals and lengths are all that is needed.

Parquet, CSV and JSON lines, plain or compressed (``.gz``, ``.zst``), of request tables, Azure, BurstGPT, Mooncake and
LLMServingSim. A format is known by its columns, or named.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from stepcal.datasets.readers import existing_file, read_parquet_file
from stepcal.errors import InputError, shown
from stepcal.units import US_PER_S

MOST_ROWS = 20_000_000
MOST_TEXT_BYTES = 8 * 2**30
"""What a compressed trace may unpack to."""
LONGEST_LINE = 4 * 2**20
MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's `hash_ids` stands for."""
MOST_TOKENS = 10**9
MOST_TIME_US = 2**62
MOST_PRIORITY = 2**31 - 1
DATE_TIME = 0.0
"""Unit of arrivals that are dates."""
PARQUET, CSV, LINES = "parquet", "csv", "jsonl"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SUFFIXES = {
    ".parquet": PARQUET, ".pq": PARQUET, ".csv": CSV, ".tsv": CSV, ".jsonl": LINES, ".ndjson": LINES, ".json": LINES,
}  # fmt: skip


@dataclass(frozen=True)
class TraceFormat:
    """How a trace names what is needed.

    Attributes
    ----------
    arrival : mapping of str to float
        Columns with the time of arrival, and how many microseconds their unit has (`DATE_TIME` for dates).
    prompt, output : tuple of str
        Columns with lengths in tokens.
    blocks : str
        Column with the ids of the prompt's blocks, which tell prefixes that are shared; empty without.
    """

    arrival: dict[str, float]
    prompt: tuple[str, ...]
    output: tuple[str, ...]
    blocks: str = ""


FORMATS = {
    "mooncake": TraceFormat({"timestamp": 1e3}, ("input_length",), ("output_length",), "hash_ids"),
    "azure": TraceFormat({"TIMESTAMP": DATE_TIME}, ("ContextTokens",), ("GeneratedTokens",)),
    "burstgpt": TraceFormat({"Timestamp": US_PER_S}, ("Request tokens",), ("Response tokens",)),
    "llmservingsim": TraceFormat(
        {"arrival_time": US_PER_S, "arrival_time_ns": 1e-3}, ("input_toks",), ("output_toks",)
    ),
    "table": TraceFormat(
        {
            "arrival_time_us": 1.0, "arrival_us": 1.0, "arrival_time_ms": 1e3, "arrival_ms": 1e3, "arrival_s": US_PER_S,
            "arrival_time_s": US_PER_S, "arrived_at": US_PER_S, "start_time": US_PER_S, "arrival_time": US_PER_S,
            "timestamp": US_PER_S,
        },
        ("prompt_tokens", "input_tokens", "prompt_len", "input_len", "num_prefill_tokens", "input_length"),
        ("output_tokens", "output_len", "num_decode_tokens", "completion_tokens", "output_length"),
    ),
}  # fmt: skip
"""Formats by the name that `--format` takes, the most particular first."""


@dataclass(frozen=True)
class RequestTrace:
    """A trace that can be replayed.

    Attributes
    ----------
    table : DataFrame
        `index`, `arrival_time_us` (from the first request), `prompt_tokens`, `output_tokens`, in order of arrival; with
        `blocks`, lists of ids, where the trace has them; with `experiment_id`, `has_error` and `priority` where it has
        those.
    format : str
        Which of `FORMATS` it is.
    left_out : int
        Rows without tokens, which failed when the trace was made.
    """

    table: pd.DataFrame
    format: str
    left_out: int


def read_request_trace(path: Path | str, *, format_name: str | None = None) -> RequestTrace:
    """Read a trace of requests.

    Parameters
    ----------
    path : Path or str
    format_name : str, optional
        One of `FORMATS`; by default the one whose columns the file has.

    Returns
    -------
    RequestTrace

    Raises
    ------
    InputError
        If the file is absent, cannot be read, is of no known format, or a row has no time or length; it is named.
    """
    path = existing_file(path)
    if format_name is not None and format_name not in FORMATS:
        raise InputError(f"`--format` is {shown(format_name)}; it must be one of {', '.join(FORMATS)}.")
    raw = _read_rows(path)
    name = format_name or _recognised(raw, path)
    known = FORMATS[name]
    arrival = _first_column(raw, tuple(known.arrival), name, path)
    prompt, output = (_first_column(raw, names, name, path) for names in (known.prompt, known.output))
    has_error = _flags(raw, path)
    lengths = {
        "prompt_tokens": _whole_numbers(raw[prompt], prompt, path, has_error),
        "output_tokens": _whole_numbers(raw[output], output, path, has_error),
    }
    table = pd.DataFrame({"arrival_time_us": _times_us(raw[arrival], known.arrival[arrival], path), **lengths})
    if known.blocks and known.blocks in raw.columns:
        table["blocks"] = raw[known.blocks].to_numpy()
    for column in ("experiment_id", "index"):
        if column in raw.columns and name == "table":
            table[column] = raw[column].to_numpy()
    if "priority" in raw.columns and name == "table":
        table["priority"] = _priorities(raw["priority"], path)
    is_served = ~has_error & (table["prompt_tokens"] > 0) & (table["output_tokens"] > 0)
    table = table[is_served].sort_values("arrival_time_us", kind="stable").reset_index(drop=True)
    if table.empty:
        raise InputError(f"{path} has no request with a prompt and an output: there is nothing to replay.")
    table["arrival_time_us"] -= table["arrival_time_us"].iloc[0]
    if "index" not in table.columns or not _are_names(table["index"]):
        table["index"] = np.arange(len(table))
    if "blocks" in table.columns:
        _check_blocks(table, path)
    return RequestTrace(table, name, int((~is_served).sum()))


def cut_and_scale(
    table: pd.DataFrame,
    *,
    from_s: float | None = None,
    until_s: float | None = None,
    first: int | None = None,
    rate_scale: float = 1.0,
) -> pd.DataFrame:
    """Return a part of a trace, arriving faster or slower; times count from its first request again.

    Parameters
    ----------
    table : DataFrame
        Of `RequestTrace`.
    from_s, until_s : float, optional
        Seconds of the trace from which, and before which, requests are kept.
    first : int, optional
        How many of them are kept.
    rate_scale : float
        By how much the rate grows: 2 halves every gap.

    Raises
    ------
    InputError
        If a number is not positive, or nothing is left.
    """
    if not (np.isfinite(rate_scale) and rate_scale > 0):
        raise InputError(f"`--rate-scale` is {rate_scale}; it must be positive and finite.")
    if first is not None and first < 1:
        raise InputError(f"`--first` is {first}; it must be at least 1.")
    seconds = table["arrival_time_us"].to_numpy(dtype=float) / US_PER_S
    low = 0.0 if from_s is None else from_s
    high = np.inf if until_s is None else until_s
    if not low < high or low < 0:
        raise InputError(
            f"`--from {low:g}` and `--until {high:g}` leave nothing; they are seconds from the first request."
        )
    kept = (
        table[(seconds >= low) & (seconds < high)].head(len(table) if first is None else first).reset_index(drop=True)
    )
    if kept.empty:
        raise InputError(
            f"No request arrives from {low:g} s until {high:g} s; the trace lasts {seconds.max(initial=0.0):,.1f} s."
        )
    shifted = (kept["arrival_time_us"] - kept["arrival_time_us"].iloc[0]) / rate_scale
    return kept.assign(arrival_time_us=shifted)


def _read_rows(path: Path) -> pd.DataFrame:
    """All columns of the file, whatever they mean."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = _SUFFIXES.get((suffixes[:-1] if compression else suffixes)[-1:][0] if suffixes else "")
    with path.open("rb") as stream:
        head = stream.read(4)
    if head == b"PAR1" or kind == PARQUET:
        return read_parquet_file(path)
    try:
        with pa.input_stream(str(path), compression=compression) as source:
            text = io.TextIOWrapper(io.BufferedReader(_Bounded(source, path)), encoding="utf-8-sig")
            start = text.read(1)
            while start.isspace():
                start = text.read(1)
            is_json = start in ("{", "[")
            if is_json or kind == LINES:
                return _json_rows(start, text, path)
            return _csv_rows(start, text, path, suffixes)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a request trace: {reason}. It is parquet, CSV or JSON lines, plain, .gz or .zst."
        ) from None


class _Bounded(io.RawIOBase):
    """A stream that refuses to unpack more than any trace has."""

    def __init__(self, source: Any, path: Path) -> None:
        self._source, self._path, self._left = source, path, MOST_TEXT_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._source.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise InputError(f"{self._path} unpacks to more than {MOST_TEXT_BYTES:,} bytes. Cut the trace first.")
        buffer[: len(content)] = content
        return len(content)


def _csv_rows(start: str, text: io.TextIOWrapper, path: Path, suffixes: list[str]) -> pd.DataFrame:
    header = start + text.readline(LONGEST_LINE).rstrip("\r\n")
    separator = "\t" if ".tsv" in suffixes else ","
    names = [name.strip().strip('"') for name in header.split(separator)]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"{path} is neither parquet, CSV with a header, nor JSON lines; its first line is {shown(header)}."
        )
    try:
        frame = pd.read_csv(text, names=names, sep=separator, header=None, low_memory=False, nrows=MOST_ROWS + 1)
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError, OverflowError) as error:
        if isinstance(error, UnicodeDecodeError | InputError):
            raise
        raise InputError(f"{path} is not a readable CSV table: {shown(str(error))}.") from None
    if len(frame) > MOST_ROWS:
        raise InputError(f"{path} has more than {MOST_ROWS:,} rows. Cut the trace first.")
    return frame if isinstance(frame.index, pd.RangeIndex) else _too_wide(path, names)


def _too_wide(path: Path, names: list[str]) -> pd.DataFrame:
    raise InputError(f"{path} has rows with more cells than its {len(names)} columns. Quote cells that hold commas.")


def _json_rows(start: str, text: io.TextIOWrapper, path: Path) -> pd.DataFrame:
    if start == "[":
        rows = _parsed(start + text.read(), path, "the file")
        if not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path} is a JSON list, but not of objects, one a request.")
        return pd.DataFrame(rows)
    rows = list(_json_lines(start, text, path))
    return pd.DataFrame(rows)


def _json_lines(start: str, text: io.TextIOWrapper, path: Path) -> Iterator[dict[str, Any]]:
    number, first = 0, start
    while line := first + text.readline(LONGEST_LINE):
        number, first = number + 1, ""
        if len(line) >= LONGEST_LINE:
            raise InputError(f"{path}, line {number}: longer than {LONGEST_LINE:,} characters; no JSON lines.")
        if number > MOST_ROWS:
            raise InputError(f"{path} has more than {MOST_ROWS:,} rows. Cut the trace first.")
        if line.isspace():
            continue
        row = _parsed(line, path, f"line {number}")
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not an object with a request.")
        yield row


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, {where}: not JSON ({shown(str(error))}). JSON lines have one object a line."
        ) from None


def _recognised(raw: pd.DataFrame, path: Path) -> str:
    columns = set(raw.columns)
    for name, known in FORMATS.items():
        if columns & set(known.arrival) and columns & set(known.prompt) and columns & set(known.output):
            if known.blocks and known.blocks not in columns:
                continue
            return name
    found = ", ".join(f"`{str(c)[:40]}`" for c in list(raw.columns)[:12])
    raise InputError(
        f"{path} has the columns {found}: no format that can be replayed. A request table has `arrival_time_us` (or "
        f"`arrival_s`), `prompt_tokens` and `output_tokens`; other formats: {', '.join(f for f in FORMATS if f != 'table')} "
        "(`--format`)."
    )


def _first_column(raw: pd.DataFrame, names: tuple[str, ...], format_name: str, path: Path) -> str:
    found = next((name for name in names if name in raw.columns), None)
    if found is None:
        raise InputError(f"{path} lacks {' or '.join(f'`{n}`' for n in names)}, which the format `{format_name}` has.")
    return found


def _times_us(values: pd.Series, unit_us: float, path: Path) -> np.ndarray:
    """Times in microseconds, shape (n,)."""
    if unit_us == DATE_TIME:
        parsed = pd.to_datetime(values.astype(str), errors="coerce", format="ISO8601", utc=True)
        numbers = parsed.astype("int64").to_numpy(dtype=float)
        per_us = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}[cast(Any, parsed.dtype).unit]
        times = np.where(parsed.isna().to_numpy(), np.nan, numbers * per_us)
    else:
        times = _numbers(values) * unit_us
    wrong = ~(np.abs(times) < MOST_TIME_US)
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(f"{path}, row {i + 1}: `{values.name}` is {shown(values.iloc[i])}; it must be a time.")
    return times


def _whole_numbers(values: pd.Series, name: str, path: Path, is_failed: np.ndarray) -> np.ndarray:
    """Lengths in tokens, shape (n,); 0 where a request failed and has none."""
    numbers = _numbers(values)
    numbers = np.where(np.isnan(numbers) & is_failed, 0.0, numbers)
    wrong = ~((numbers >= 0) & (numbers <= MOST_TOKENS) & (numbers == np.floor(numbers)))
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"{path}, row {i + 1}: `{name}` is {shown(values.iloc[i])}; it must be a whole number of at least 0 tokens."
        )
    return numbers.astype(np.int64)


def _priorities(values: pd.Series, path: Path) -> np.ndarray:
    """Priorities, shape (n,); 0, vLLM's default, where a cell is empty."""
    numbers = np.where(values.isna(), 0.0, _numbers(values))
    wrong = ~((np.abs(numbers) <= MOST_PRIORITY) & (numbers == np.floor(numbers)))
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"{path}, row {i + 1}: `priority` is {shown(values.iloc[i])}; it must be a whole number, at most "
            f"{MOST_PRIORITY:,} on either side of 0."
        )
    return numbers.astype(np.int64)


def _numbers(values: pd.Series) -> np.ndarray:
    """Values as floats, shape (n,); NaN for what is no number, or too large for one."""
    if values.dtype != object and pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values.to_numpy(dtype=float, na_value=np.nan)

    def number(value: Any) -> float:
        if isinstance(value, str):  # a column of CSV in which some cell is no number
            try:
                return float(value)
            except ValueError:
                return np.nan
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        return float(value) if is_number and abs(value) <= sys.float_info.max else np.nan

    return np.array([number(value) for value in values], dtype=float)


def _flags(raw: pd.DataFrame, path: Path) -> np.ndarray:
    if "has_error" not in raw.columns:
        return np.zeros(len(raw), dtype=bool)
    values = raw["has_error"].map(lambda v: {"true": True, "false": False}.get(str(v).lower()))
    if values.isna().any():
        i = int(values.isna().to_numpy().argmax())
        raise InputError(
            f"{path}, row {i + 1}: `has_error` is {shown(raw['has_error'].iloc[i])}; it must be true or false."
        )
    return values.to_numpy(dtype=bool)


def _are_names(index: pd.Series) -> bool:
    """Whether an `index` can name requests: whole numbers, each once."""
    return bool(pd.api.types.is_integer_dtype(index) and index.is_unique and (index >= 0).all())


def _check_blocks(table: pd.DataFrame, path: Path) -> None:
    """Refuse a prompt whose number of blocks is not that of its tokens."""
    needed = -(-table["prompt_tokens"].to_numpy() // MOONCAKE_BLOCK_TOKENS)
    for i, (ids, n_blocks) in enumerate(zip(table["blocks"], needed, strict=True)):
        is_list = isinstance(ids, list | tuple | np.ndarray) and all(
            isinstance(v, int | np.integer) and not isinstance(v, bool) and abs(int(v)) < MOST_TIME_US for v in ids
        )
        if not is_list or len(ids) != n_blocks:
            raise InputError(
                f"{path}: the prompt of request {i + 1} (by arrival) has {table['prompt_tokens'].iloc[i]} tokens, so "
                f"`hash_ids` must be a list of {n_blocks} whole numbers, one for each {MOONCAKE_BLOCK_TOKENS} tokens; it is "
                f"{shown(ids)}."
            )
