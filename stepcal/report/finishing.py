"""Finishes rendered pages: their foot, the notebooks they offer, repairs of the renderer's marks, and one page of all.

Works on a copy of what Sphinx wrote. What differs between two builds of one commit, the day, is put in here and nowhere
else.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcal import __version__
from stepcal.report import fingerprint
from stepcal.report.execution import ReportError, source_of

FOOT = '<div id="stepcal-foot"></div>'
"""Where a page's foot goes; `_config.yml` puts it there."""
PRINT_PAGE = "print.html"

_REPAIRS = (
    # A checksum that the renderer adds from its second run on; the name has one already.
    (re.compile(r"(mystnb\.[0-9a-f]+\.css)\?v=[0-9a-f]+"), r"\1"),
    # Names that leave out a part of what is seen: the text inside is the name.
    (re.compile(r'(<button class="btn search-button-field[^>]*?) aria-label="Search"'), r"\1"),
    (re.compile(r'(<button class="btn[^"]*theme-switch-button[^>]*?) aria-label="Color mode"'), r"\1"),
    # A name that differs from what is seen; the words inside are the name.
    (re.compile(r'<summary aria-label="Toggle hidden content">'), "<summary>"),
    # A list whose entries are not marked as such.
    (re.compile(r'<div role="list" class="citation-list">'), '<div class="citation-list">'),
    (re.compile(r'<div (class="citation"[^>]*) role="doc-biblioentry"'), r"<div \1"),
)
_UNSEEN = re.compile(
    r"<(script|style|pre|code|title|svg)\b.*?</\1>|<(span|div) class=\"math.*?</\2>", re.DOTALL | re.IGNORECASE
)
_RAW = re.compile(r"\{?glue:[^<]{0,60}|\\(?:frac|mathrm|text)\{|\$[a-zA-Z\\][^$<\n]{0,60}\$")
_GLUED = re.compile(r"\{glue:text\}`(\w+)(?::([^`]*))?`")


@dataclass(frozen=True)
class Facts:
    """What a book was built from, for the foot of its pages.

    Attributes
    ----------
    commit : str
        Short hash, with ``+ changes`` where the checkout had any; empty outside of a repository.
    data : str
        Start of the hash of ``data/`` and of the traces.
    has_traces : bool
    versions : tuple of (str, str)
    days : tuple of (str, str)
        Day on which each page was executed.
    """

    commit: str
    data: str
    has_traces: bool
    versions: tuple[tuple[str, str], ...]
    days: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, root: Path, data_sha256: str, days: Mapping[str, str]) -> Facts:
        """Collect the facts of a checkout."""
        return cls(
            _commit(root),
            data_sha256[:12],
            bool(os.environ.get("STEPCAL_DATA")),
            tuple(fingerprint.versions().items()),
            tuple(sorted(days.items())),
        )


def finish(
    pages: Path,
    toc: Sequence[str],
    notebooks: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Mapping[str, object]],
    facts: Facts,
    private: Sequence[str] = (),
) -> None:
    """Finish all pages in a folder.

    Parameters
    ----------
    pages : Path
        A copy of what the renderer wrote.
    toc : sequence of str
        Pages in the order of the book.
    notebooks : mapping
        Executed notebooks by file name.
    parameters : mapping
        By page, the values that replaced its defaults.
    facts : Facts
    private : sequence of str
        Folders of this machine that no download may name.

    Raises
    ------
    ReportError
        If a page shows a role or TeX as text.
    """
    for path in sorted(pages.rglob("*.html")):
        name = path.stem
        text = path.read_text(encoding="utf-8")
        for pattern, replacement in _REPAIRS:
            text = pattern.sub(replacement, text)
        raw = _RAW.search(_UNSEEN.sub("", _article(text)))
        if raw:
            raise ReportError(f"{name}.html shows `{raw.group(0)}` as text: a role or TeX that was not rendered.")
        foot = _foot(name, parameters.get(name, {}), facts, up="../" * (len(path.relative_to(pages).parts) - 1))
        path.write_text(text.replace(FOOT, foot), encoding="utf-8")
    for file, notebook in notebooks.items():
        target = pages / "_sources" / "book" / file
        if target.is_file():
            target.write_text(downloadable(notebook, private), encoding="utf-8")
    (pages / PRINT_PAGE).write_text(one_page(pages, toc), encoding="utf-8")


def downloadable(notebook: Mapping[str, Any], private: Sequence[str] = ()) -> str:
    """Return an executed notebook as readers get it: numbers in the prose, nothing of the machine it ran on."""
    values = glued_values(notebook)

    def filled(match: re.Match[str]) -> str:
        name, spec = match.group(1), match.group(2) or ""
        if name not in values:
            return match.group(0)
        value = values[name]
        return format(value, spec) if spec else str(value)

    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cells.append({**cell, "source": _GLUED.sub(filled, source_of(cell))})
        else:
            cells.append(cell)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    text = json.dumps({**notebook, "cells": cells, "metadata": metadata}, indent=1, ensure_ascii=False)
    for folder in private:
        text = text.replace(folder, ".")
    return text + "\n"


def glued_values(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a notebook's cells gave to its prose, by name."""
    values = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            # What is glued without being displayed has a MIME type of its own.
            plain = [text for mime, text in output.get("data", {}).items() if mime.endswith("text/plain")]
            if name and plain:
                values[name] = ast.literal_eval("".join(plain[0]))
    return values


def one_page(pages: Path, toc: Sequence[str]) -> str:
    """Return all pages as one, to be printed: each begins a sheet, and links between them stay inside."""
    names = [Path(page).name for page in toc]
    first = (pages / "book" / f"{names[0]}.html").read_text(encoding="utf-8")
    head = first[: first.index("</head>")].replace("../_static/", "_static/")
    articles = []
    for name in names:
        article = _article((pages / "book" / f"{name}.html").read_text(encoding="utf-8"))
        article = re.sub(r"<script\b.*?</script>", "", article, flags=re.DOTALL)
        article = re.sub(r'\bid="([^"]+)"', rf'id="{name}--\1"', article)
        article = re.sub(r'href="#([^"]+)"', rf'href="#{name}--\1"', article)
        article = re.sub(r"url\(#", f"url(#{name}--", article)
        for other in names:
            article = re.sub(rf'href="{other}\.html#([^"]+)"', rf'href="#{other}--\1"', article)
            article = article.replace(f'href="{other}.html"', f'href="#{other}"')
        article = re.sub(r"<details\b(?! open)", "<details open", article)
        article = article.replace("../_images/", "_images/").replace("../_static/", "_static/")
        articles.append(f'<section id="{name}" class="printed-page">{article}</section>')
    main = '<main class="bd-main"><div class="bd-article">' + "\n".join(articles) + "</div></main>"
    return f'{head}</head>\n<body class="printed" data-bs-root-margin="0px">{main}</body></html>\n'


def _article(text: str) -> str:
    found = re.search(r'<article class="bd-article">(.*?)</article>', text, re.DOTALL)
    return found.group(1) if found else ""


def _foot(name: str, parameters: Mapping[str, object], facts: Facts, up: str) -> str:
    day = dict(facts.days).get(name)
    lines = [f"stepcal {__version__}" + (f", commit {facts.commit}" if facts.commit else "")]
    if day:
        traces = "with the traces" if facts.has_traces else "without traces: recorded results"
        changed = {n: v for n, v in parameters.items() if (n, v) != ("source", "measured")}
        lines.append(f"executed on {day}, {traces}, data {facts.data}")
        lines.append(
            "parameters: " + (", ".join(f"{n} = {v}" for n, v in changed.items()) if changed else "the page's defaults")
        )
    lines.append(", ".join(f"{n} {v}" for n, v in facts.versions))
    return (
        '<p class="stepcal-foot">'
        + ". ".join(html.escape(line) for line in lines)
        + (f'. <a href="{up}{PRINT_PAGE}">The whole book on one page, to print.</a></p>')
    )


def _commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        return commit + (" + changes" if commit and git("status", "--porcelain") else "")
    except FileNotFoundError:
        return ""
