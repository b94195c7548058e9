"""A build that is killed at any moment leaves a whole book and no process; two builds of the same sources are the same.

``STEPCAL_RANDOM_KILLS=10 pytest tests/report/test_killed_builds.py`` kills so many builds of each kind.
"""

import datetime
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
from small_book import code, prose, write_page
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.report import build, execution
from stepcal.report.printing import PDF, browser

N_KILLS = int(os.environ.get("STEPCAL_RANDOM_KILLS", "3"))
PAGES = ("first", "second")
STAMPS = re.compile(r"executed on \d{4}-\d\d-\d\d")
"""What may differ between two builds of the same sources; build.json, which no page shows, holds their hash."""


def write_version(root, version, pids, *, executes):
    """Write both pages in a version; where `executes`, the code changes too, and leaves the process it ran in."""
    body = f"import os, pathlib; pathlib.Path({str(pids)!r}, str(os.getpid())).touch()"
    for name in PAGES:
        write_page(
            root,
            name,
            prose(f"# {name}, version {version}"),
            code("seed: int = 0", "parameters"),
            code(f"{body}\nprint('computed', {version if executes else 0})"),
        )


def versions_shown(output):
    """Return what the pages of the book say of their version, in prose, in output and on the page to print."""
    html = output / "html"
    texts = [(html / "book" / f"{name}.html").read_text() for name in PAGES]
    assert all("executed on" in t and t.rstrip().endswith("</p>") for t in texts)
    return {v for t in [*texts, (html / "print.html").read_text()] for v in re.findall(r"version (\d+)", t)}


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="builds are forked")
@pytest.mark.parametrize("executes", [False, True], ids=["putting-together", "executing"])
def test_a_build_killed_at_random_moments_leaves_a_whole_book_and_no_process(small_book, tmp_path, executes):
    output, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    chosen, context = random.Random(2026), multiprocessing.get_context("fork")
    write_version(small_book, 0, pids, executes=executes)
    build.build_report(output)
    write_version(small_book, 1, pids, executes=executes)
    started = time.monotonic()
    build.build_report(output)
    takes_s = time.monotonic() - started
    shown, n_killed = "1", 0
    for version in range(2, 2 + N_KILLS):
        write_version(small_book, version, pids, executes=executes)
        process = context.Process(target=build.build_report, args=(output,))
        process.start()
        time.sleep(chosen.random() * takes_s)
        process.kill()
        process.join()
        n_killed += process.exitcode == -signal.SIGKILL
        found = versions_shown(output)
        assert found in ({shown}, {str(version)}), "two versions of the book are mixed"
        (shown,) = found
    deadline = time.monotonic() + 20
    while (alive := [p.name for p in pids.iterdir() if lives(p.name)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []
    assert n_killed > 0, "every build ended before it could be killed"
    # The next build is not in the way of what the killed ones left.
    build.build_report(output)
    assert versions_shown(output) == {str(1 + N_KILLS)}
    assert sorted(p.name for p in output.iterdir() if p.name.startswith(".html")) == []


def test_two_builds_are_the_same_but_for_the_declared_stamps(small_book, tmp_path, monkeypatch):
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2031, 1, 2)

    one, other = tmp_path / "one", tmp_path / "in" / "another" / "place"
    build.build_report(one, jobs=1)
    with monkeypatch.context() as later:
        later.setattr(execution.datetime, "date", Tomorrow)
        build.build_report(other, jobs=2)
    files = [
        {p.relative_to(o / "html"): p.read_text() for p in (o / "html").rglob("*") if p.is_file()} for o in (one, other)
    ]
    assert set(files[0]) == set(files[1])
    assert "executed on 2031-01-02" in "".join(files[1].values())
    for path, text in files[0].items():
        if path.name != "build.json":
            assert STAMPS.sub("", text) == STAMPS.sub("", files[1][path]), path


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed (apt-get install chromium)")
def test_the_command_line_prints_the_book(small_book, tmp_path):
    result = CliRunner().invoke(app, ["report", "--pdf", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "html" / PDF).read_bytes()[:5] == b"%PDF-"


def test_without_a_browser_the_command_line_says_so_and_builds_nothing(small_book, tmp_path, monkeypatch):
    monkeypatch.setattr("stepcal.report.printing.browser", lambda: None)
    result = CliRunner().invoke(app, ["report", "--pdf", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "none of chromium" in result.output
    assert not (tmp_path / "out").exists()
