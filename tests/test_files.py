"""Files are written whole, keep their mode and their place behind a link; devices and pipes are written through."""

import os
import stat
import threading
from pathlib import Path

import pytest

from stepcal.errors import InputError
from stepcal.files import refuse_unwritable, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new", "x")
    (tmp_path / "beside").write_text("x")
    assert mode(tmp_path / "new") == mode(tmp_path / "beside")


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o755])
def test_a_file_keeps_its_mode(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    path.chmod(bits)
    write_atomically(path, "new")
    assert (path.read_text(), mode(path)) == ("new", bits)
    assert os.listdir(tmp_path) == ["kept"]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "deep" / "later")
    write_atomically(dangling, "new")
    assert dangling.is_symlink() and (tmp_path / "deep" / "later").read_text() == "new"


def test_a_device_is_written_to_and_stays_one() -> None:
    write_atomically(Path("/dev/null"), "x" * 100_000)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_device_is_an_error_with_its_reason() -> None:
    with pytest.raises(InputError, match="Cannot write /dev/full: No space left on device"):
        write_atomically(Path("/dev/full"), "x")


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "y" * 200_000)
    reader.join(timeout=10)
    assert read == ["y" * 200_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere/x", "does not exist"), (".", "it is a folder"), ("folder-link", "it is a folder")]
)
def test_what_cannot_be_written_is_refused_beforehand(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder-link").symlink_to(tmp_path / "folder")
    with pytest.raises(InputError, match=message):
        refuse_unwritable(tmp_path / path)
    with pytest.raises(InputError, match=message):
        write_atomically(tmp_path / path, "x")
