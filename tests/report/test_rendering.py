"""The renderer starts anew when the side bar of every page would change, and only then."""

import asyncio
import json

import pytest

from stepcal.report import rendering


@pytest.fixture(name="stage")
def staged(tmp_path, monkeypatch):
    async def attached(*arguments, log):
        (tmp_path / "work" / "_build" / "html").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(rendering, "run_attached", attached)
    (tmp_path / "stage" / "book").mkdir(parents=True)
    (tmp_path / "stage" / "_toc.yml").write_text("root: book/one")
    (tmp_path / "stage" / "book" / "two.md").write_text("# Two\n\nText.")
    return tmp_path / "stage"


def page(stage, title, text="Text."):
    cells = [{"cell_type": "markdown", "source": [f"# {title}\n", "\n", text]}]
    (stage / "book" / "one.ipynb").write_text(json.dumps({"cells": cells}))


def is_kept(stage):
    """Render, and tell whether what was there before still is."""
    work = stage.parent / "work"
    asyncio.run(rendering.render(stage, work, stage.parent / "log"))
    kept = (work / "seen").exists()
    (work / "seen").touch()
    return kept


def test_only_a_change_of_the_side_bar_renders_all_pages_anew(stage):
    page(stage, "One")
    assert not is_kept(stage)
    assert is_kept(stage)
    page(stage, "One", text="Another text.")
    assert is_kept(stage)
    page(stage, "Another title")
    assert not is_kept(stage)
    (stage / "book" / "two.md").write_text("# Two, renamed")
    assert not is_kept(stage)
    (stage / "_toc.yml").write_text("root: book/two")
    assert not is_kept(stage)
    (stage.parent / "work" / ".rendering").touch()
    assert not is_kept(stage), "what a killed rendering left is not built upon"
