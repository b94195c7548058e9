"""One builder at a time, and a new book that takes the old one's place whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepcal.report.execution import ReportError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""Of Linux's renameat2: two paths change places in one step."""


@contextmanager
def only_builder(output: Path) -> Iterator[None]:
    """Hold a folder for one build; the lock goes with the process, however that ends.

    Raises
    ------
    ReportError
        If another build holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ReportError(
                f"Process {lock.read().strip() or 'unknown'} is building in {output}. Nothing was done: wait for it, or "
                "name another folder with --output."
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def take_place(new: Path, current: Path) -> None:
    """Put a finished folder where the last one is, and remove that one.

    On Linux the two change places in one system call. Elsewhere there are two renames; a kill between them leaves the
    last book under a name that `recover` finds.
    """
    old = current.with_name(f".{current.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if not current.exists():
        new.rename(current)
        return
    if _exchanged(new, current):
        new.rename(old)
    else:
        current.rename(old)
        new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def recover(current: Path) -> None:
    """Bring back a book that a killed build left between two names."""
    old = current.with_name(f".{current.name}.old")
    if old.is_dir() and not current.exists():
        old.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
