"""Writes files whole or not at all; through devices, pipes and links, and never in place of what is no plain file."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from stepcal.errors import InputError


def refuse_unwritable(path: Path) -> None:
    """Raise an `InputError` if `path` cannot be written: before a long run, rather than after it."""
    target = _target(path)
    if target.is_dir():
        raise InputError(f"Cannot write {path}: it is a folder. Add a file's name.")
    if not target.parent.is_dir():
        raise InputError(
            f"Cannot write {path}: the folder {target.parent} does not exist. Create it, or choose another."
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"Cannot write {path}: it is write-protected. Change its mode, or choose another file.")
    if not _is_stream(target) and not os.access(target.parent, os.W_OK):
        raise InputError(f"Cannot write {path}: the folder {target.parent} is write-protected. Choose another.")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`, as `write_bytes_atomically` does."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, so that no reader ever sees half of a file.

    A file is written by way of a temporary one beside it and keeps its mode; a symbolic link stays, and what it points to is
    written. A device or a pipe is written to as it is.

    Raises
    ------
    InputError
        If the path cannot be written.
    """
    refuse_unwritable(path)
    target = _target(path)
    try:
        if _is_stream(target):
            with target.open("wb", buffering=0) as stream:
                written = 0
                while written < len(content):
                    written += stream.write(content[written:]) or 0
        else:
            _replace(target, content)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose a writable file with room for it.") from None


def _replace(target: Path, content: bytes) -> None:
    """Put a new plain file in the place of another, or of none."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else _default_mode()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except OSError:
        os.unlink(temporary)
        raise


def _default_mode() -> int:
    """Mode that open() would give a new file; a temporary file is private."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _target(path: Path) -> Path:
    """What a symbolic link leads to; the path itself if it is none."""
    try:
        return Path(os.path.realpath(path, strict=False)) if path.is_symlink() else path
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write {path}: {error}.") from None


def _is_stream(path: Path) -> bool:
    """Whether a path is there and is neither a plain file nor a folder: a device, a pipe, a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()
