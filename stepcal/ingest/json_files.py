"""Reading JSON without holding it: lines of a file one by one, and the elements of an array inside a document."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import ijson
import msgspec

from stepcal.errors import shown
from stepcal.ingest.formats import UnreadableError
from stepcal.ingest.request_log import TEXT_LIMIT, Rejected

LONGEST_LINE_BYTES = 256 * 2**20
"""A longer line is refused: a whole document on one line is no JSON-lines file."""
MALFORMED = (ValueError, AttributeError, TypeError, LookupError, OverflowError)
"""What a row of another shape than its format's raises while it is read."""
_READ_BYTES = 1 << 16
T = TypeVar("T")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not blank, with its number, from 1."""
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE_BYTES):
                number += 1
                if len(line) >= LONGEST_LINE_BYTES:
                    raise UnreadableError(
                        f"{path}, line {number}: longer than {LONGEST_LINE_BYTES:,} bytes; no JSON-lines file."
                    )
                if line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. Check the path.") from None


def decoded_lines(path: Path, decoder: msgspec.json.Decoder[T]) -> Iterator[tuple[int, T] | Rejected]:
    """Decode each line; one that does not decode is rejected with the decoder's reason."""
    for number, line in lines(path):
        try:
            yield number, decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield rejected(number, f"not what the format has here: {error}", line)


def rejected(row: int, reason: str, content: bytes | str | Any = b"") -> Rejected:
    """Build a rejection; its text is the start of what was found."""
    if isinstance(content, bytes):
        text = content[: 4 * TEXT_LIMIT].decode("utf-8", "replace")
    else:
        text = content if isinstance(content, str) else repr(content)
    return Rejected(row, reason, text.strip()[:TEXT_LIMIT])


def elements(path: Path, place: str) -> Iterator[Any]:
    """Yield the elements of an array inside a JSON document, such as ``benchmarks.item.requests.successful.item``.

    Raises
    ------
    UnreadableError
        If the document is cut short or no JSON.
    """
    try:
        with path.open("rb") as stream:
            yield from ijson.items(stream, place, use_float=True, buf_size=_READ_BYTES)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
    except (ijson.JSONError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UnreadableError(_cut_short(path, error)) from None


def events(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield ijson's (prefix, event, value) of a document, or of several after one another.

    Raises
    ------
    UnreadableError
        As `elements`.
    """
    try:
        with path.open("rb") as stream:
            yield from ijson.parse(stream, use_float=True, multiple_values=True, buf_size=_READ_BYTES)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
    except (ijson.JSONError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UnreadableError(_cut_short(path, error)) from None


def _cut_short(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:TEXT_LIMIT]
    return f"{path} is no whole JSON document ({reason}): it was cut short or damaged. Copy it again."


def number(value: Any, name: str) -> float:
    """Return a value as a finite number.

    Raises
    ------
    ValueError
        If it is none; the message names it.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` is {shown(value)}; it must be a finite number")
    return float(value)


def number_or_nan(value: Any, name: str) -> float:
    """As `number`, with NaN for null."""
    return math.nan if value is None else number(value, name)


def whole(value: Any, name: str) -> int:
    """Return a value as a whole number.

    Raises
    ------
    ValueError
        If it is none; the message names it.
    """
    as_float = number(value, name)
    if as_float != int(as_float):
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number")
    return int(as_float)
