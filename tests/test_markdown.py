"""Prose stands one sentence a line, so that a diff shows which sentence changed; the tool that keeps it so is tested too."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from loaded_tools import load_tool

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "book/*.md", "data/*.md", "tests/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("one_sentence_a_line")


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "book/glossary.md"} <= {
        path.relative_to(ROOT).as_posix() for path in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_has_one_sentence_a_line(tool, page):
    text = page.read_text(encoding="utf-8")
    assert tool.rewrite(text) == text, f"run `python tools/one_sentence_a_line.py {page.relative_to(ROOT)}`"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("Orca et al. Found it (cf. Fig. 3). Next.", ["Orca et al. Found it (cf. Fig. 3).", "Next."]),
        ("Run `a. B` now. `make test` follows.", ["Run `a. B` now.", "`make test` follows."]),
        ("At 0.5 of $a. B$. [A link](x. Y.md) starts it.", ["At 0.5 of $a. B$.", "[A link](x. Y.md) starts it."]),
        ('He said "stop." Then went.', ['He said "stop."', "Then went."]),
        ("stepcal 0.1.0 runs. it does", ["stepcal 0.1.0 runs. it does"]),
    ],
)
def test_sentences(tool, text, expected):
    assert tool.sentences(text) == expected


def test_a_list_item_keeps_its_indentation_and_lazy_lines_join(tool):
    assert tool.rewrite("1. One. Two\nmore.\n2. Three.\n") == "1. One.\n   Two more.\n2. Three.\n"


@pytest.mark.parametrize(
    "kept",
    [
        "```\nOne. Two.\nthree\n```\n",
        "| One. Two. | b |\n|---|---|\n",
        "    One. Two.\n    three\n",
        "$$\na. B\nc\n$$\n",
        "# One. Two.\n",
        ":::{admonition} One. Two.\n:class: note\n:::\n",
        "---\ntitle: One. Two.\n---\n",
    ],
)
def test_what_is_no_prose_stays(tool, kept):
    assert tool.rewrite(kept) == kept


def test_words_are_never_changed(tool):
    text = "# T\n\nOne. Two\n- item. More\n  of it.\n\n  ```\n  code. Code\n  ```\n\nterm\n  Its. Meaning\n  goes on.\n"
    once = tool.rewrite(text)
    assert once.split() == text.split()
    assert tool.rewrite(once) == once
    assert "\n  Its.\n  Meaning goes on.\n" in once


def test_check_finds_and_changes_nothing(tool, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("One. Two.\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["tool", "--check", str(page)])
    assert tool.main() == 1
    assert page.read_text(encoding="utf-8") == "One. Two.\n"
    assert "page.md: has lines" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["tool", str(page)])
    assert tool.main() == 0
    assert page.read_text(encoding="utf-8") == "One.\nTwo.\n"
