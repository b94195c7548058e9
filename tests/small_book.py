"""A book of two small pages, and a renderer that takes no time."""

import json
import shutil
from pathlib import Path

import pytest

from stepcal.report import build
from stepcal.report.finishing import FOOT


def code(source, *tags):
    return {
        "cell_type": "code",
        "id": f"c{abs(hash(source)) % 10**8}",
        "metadata": {"tags": list(tags)},
        "source": source,
        "execution_count": None,
        "outputs": [],
    }


def prose(source):
    return {"cell_type": "markdown", "id": f"m{abs(hash(source)) % 10**8}", "metadata": {}, "source": source}


def write_page(root: Path, name: str, *cells):
    notebook = {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / "book" / f"{name}.ipynb").write_text(json.dumps(notebook))


@pytest.fixture(name="small_book")
def make_small_book(tmp_path, monkeypatch):
    """Return the root of a checkout with two pages; what it renders is the staged source itself."""
    root = tmp_path / "checkout"
    (root / "book" / "preregistrations").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "data" / "facts.csv").write_text("a\n1\n")
    (root / "_config.yml").write_text("title: small\n")
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/first\nparts:\n- chapters:\n  - file: book/second\n")
    write_page(root, "first", prose("# First"), code("seed: int = 0", "parameters"), code("print('seed', seed)"))
    write_page(root, "second", prose("# Second"), code("print('second')"))
    monkeypatch.setattr(build, "shipped_folder", lambda: root)
    monkeypatch.setattr(build, "render", _copied)
    monkeypatch.delenv("STEPCAL_DATA", raising=False)
    return root


async def _copied(stage, work, log):
    pages = work / "html"
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "book").mkdir(parents=True)
    for path in sorted((stage / "book").glob("*.ipynb")):
        body = "".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
        outputs = json.dumps([c.get("outputs") for c in json.loads(path.read_text())["cells"]])
        (pages / "book" / f"{path.stem}.html").write_text(
            f'<head></head><article class="bd-article"><pre>{body}{outputs}</pre></article>{FOOT}'
        )
    log.write_text("copied")
    return pages
