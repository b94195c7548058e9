"""Writes files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from stepcal.errors import InputError


def refuse_unwritable(path: Path) -> None:
    """Raise an `InputError` if `path` cannot be a file: before a long run, rather than after it."""
    if not path.parent.is_dir():
        raise InputError(f"Cannot write {path}: the folder {path.parent} does not exist. Create it, or choose another.")
    if path.is_dir():
        raise InputError(f"Cannot write {path}: it is a folder. Add a file's name.")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`, as `write_bytes_atomically` does."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` by way of a temporary file beside it, so that no reader ever sees half of it.

    Raises
    ------
    InputError
        If the folder does not exist or cannot be written to.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose an existing, writable folder.") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        # mkstemp makes the file private; give it the permissions that open() would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose a writable file.") from None
