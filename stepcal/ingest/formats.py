"""What a reader of one tool's files is: how its files are known, what its words mean, and how rows come out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.ingest.request_log import Rejected, Request

Row = Request | Rejected


class UnreadableError(InputError):
    """A file that cannot be read to its end: cut short, not of its format, or not text."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user says of a file that the file does not say.

    Attributes
    ----------
    mapping : mapping
        For tables of one's own: our column to theirs (`stepcal.ingest.mapped`).
    """

    mapping: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The files of one tool.

    Attributes
    ----------
    name : str
        What `--format` calls it.
    version : int
        Grows when the same file would give other rows.
    recognises : callable
        Whether the head of a file (bytes) and its path look like this tool's.
    read : callable
        Path and options to rows, good and rejected, in constant memory.
    definitions : mapping
        What the tool means by its words (`ttft`, `e2e`, `tpot`, `itl`, `concurrency`), and what was done with it.
    verified : str
        On what files the reader was tested: made by the tool itself, after its documentation, or invented.
    describe : callable, optional
        Path to facts of the run that the file tells (tool version, model, server arguments).
    """

    name: str
    version: int
    recognises: Callable[[Path, bytes], bool]
    read: Callable[[Path, Options], Iterator[Row]]
    definitions: Mapping[str, str]
    verified: str
    describe: Callable[[Path], dict[str, Any]] | None = None
