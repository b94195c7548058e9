"""A build executes what changed, says what failed, and never leaves half a book."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_book import code, prose, write_page

from stepcal.errors import InputError
from stepcal.report import build
from stepcal.report.execution import ReportError
from stepcal.report.swap import only_builder, recover, take_place


def page(root, output, name="first"):
    return (output / "html" / "book" / f"{name}.html").read_text()


def counting(monkeypatch):
    executed = []
    really = build.execute

    async def execute(path, *arguments):
        executed.append(path.stem)
        return await really(path, *arguments)

    monkeypatch.setattr(build, "execute", execute)
    return executed


def test_only_what_changed_is_executed_again(small_book, tmp_path, monkeypatch):
    executed, output = counting(monkeypatch), tmp_path / "out"
    build.build_report(output)
    assert sorted(executed) == ["first", "second"]
    assert "seed 0" in page(small_book, output)
    executed.clear()
    build.build_report(output)
    assert executed == []
    # Prose is put together anew, without computing.
    write_page(small_book, "second", prose("# Another title"), code("print('second')"))
    build.build_report(output)
    assert executed == []
    assert "Another title" in page(small_book, output, "second")
    # A parameter reaches the pages that take it, and only these.
    build.build_report(output, settings={"seed": 7})
    assert executed == ["first"]
    assert "seed 7" in page(small_book, output)
    executed.clear()
    # Facts can move any page.
    (small_book / "data" / "facts.csv").write_text("a\n2\n")
    build.build_report(output)
    assert sorted(executed) == ["first", "second"]


def test_one_page_alone(small_book, tmp_path, monkeypatch):
    executed, output = counting(monkeypatch), tmp_path / "out"
    shown = build.build_report(output, only="second")
    assert executed == ["second"]
    assert shown == output / "html" / "book" / "second.html"
    assert "was not executed" in page(small_book, output, "first")
    # Later the others are shown as they were last executed, although their data have changed.
    build.build_report(output)
    (small_book / "data" / "facts.csv").write_text("a\n3\n")
    executed.clear()
    build.build_report(output, only="second")
    assert executed == ["second"]
    assert "seed 0" in page(small_book, output, "first")
    with pytest.raises(InputError, match=r"no such page.*first, second"):
        build.build_report(output, only="third")
    # Prose that cites a number which the page did not have then is not put to it.
    write_page(small_book, "first", prose("{glue:text}`new:.1f`"), code("seed: int = 0", "parameters"), code("1"))
    build.build_report(output, only="second")
    assert "was not executed" in page(small_book, output, "first")


def test_a_failed_page_is_named_with_its_cell_and_leaves_the_last_book(small_book, tmp_path):
    output = tmp_path / "out"
    build.build_report(output)
    before = page(small_book, output)
    write_page(small_book, "second", code("x = 1"), code("raise ValueError('not today')"))
    with pytest.raises(ReportError, match=r"second.ipynb, code cell 2 \(`raise .*ValueError: not today"):
        build.build_report(output)
    assert page(small_book, output) == before


def test_a_setting_that_no_page_takes_is_refused(small_book, tmp_path):
    with pytest.raises(InputError, match="No page takes `n_seeds`"):
        build.build_report(tmp_path / "out", settings={"n_seeds": 3})
    with pytest.raises(InputError, match="`source='guessed'` is unknown"):
        build.build_report(tmp_path / "out", source="guessed")
    with pytest.raises(InputError, match="not a folder"):
        build.build_report(tmp_path / "out", data=tmp_path / "nowhere")


def test_two_builds_on_one_folder(small_book, tmp_path):
    with only_builder(tmp_path / "out"), pytest.raises(ReportError, match=f"Process {os.getpid()} is building"):
        build.build_report(tmp_path / "out")
    build.build_report(tmp_path / "out")


def test_downloads_hold_numbers_and_no_paths(small_book, tmp_path):
    from stepcal.report.finishing import downloadable

    glued = {
        "output_type": "display_data",
        "metadata": {"scrapbook": {"name": "error"}},
        "data": {"application/papermill.record/text/plain": "2.25"},
    }
    notebook = {
        "cells": [
            prose("off by {glue:text}`error:.1f`%"),
            code("1") | {"outputs": [glued]},
            code(f"open('{small_book}/x')"),
        ],
        "metadata": {"papermill": {"input_path": str(small_book)}},
    }
    text = downloadable(notebook, [str(small_book)])
    assert "off by 2.2%" in text
    assert str(small_book) not in text
    assert json.loads(text)["cells"][2]["source"] == "open('./x')"


def test_the_new_book_takes_the_old_ones_place_whole(tmp_path):
    current, new = tmp_path / "html", tmp_path / ".html.new"
    for round_ in range(3):
        new.mkdir()
        (new / "index.html").write_text(str(round_))
        take_place(new, current)
        assert (current / "index.html").read_text() == str(round_)
        assert not new.exists()
    # A kill between two renames, where there is no exchange, leaves the book under another name.
    current.rename(tmp_path / ".html.old")
    recover(current)
    assert (current / "index.html").read_text() == "2"


def test_a_stopped_build_ends_its_kernels_and_leaves_the_last_book(small_book, tmp_path):
    output = tmp_path / "out"
    build.build_report(output)
    before = page(small_book, output)
    write_page(
        small_book,
        "first",
        code("import os, time"),
        code(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"),
        code("time.sleep(60)"),
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from stepcal.report import build\n"
        "build.shipped_folder = lambda: Path(sys.argv[2])\n"
        "build.build_report(Path(sys.argv[3]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, os.getcwd(), str(small_book), str(output)], stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.terminate()
        said = running.communicate(timeout=30)[1]
    assert "was stopped. The last book stands" in said
    assert not _lives(int((tmp_path / "pid").read_text()))
    assert page(small_book, output) == before


def test_no_kernel_outlives_a_killed_build(tmp_path):
    """The process that a build starts for a page ends with the build, even if that is killed."""
    script = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'from stepcal.report.attached import end_with_parent as e; e(); "
        "import time; print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE, start_new_session=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _lives(child):
        time.sleep(0.1)
    assert not _lives(child)


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
