"""Renders staged sources with Jupyter Book: all pages at first, afterwards those that changed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from stepcal.report.execution import run_attached

_UNFINISHED = ".rendering"
_NAVIGATION = "navigation.json"


async def render(stage: Path, work: Path, log: Path) -> Path:
    """Bring the rendered pages up to date with the staged sources, warnings as errors.

    Parameters
    ----------
    stage : Path
        Sources from `stepcal.report.staging.stage_sources`.
    work : Path
        Sphinx's own folder; kept from build to build, and made anew after one that did not end and when a title changed:
        every page shows the titles of all, and Sphinx writes only those whose own source did.
    log : Path

    Returns
    -------
    Path
        The folder with the pages, which belongs to Sphinx: copy it, then change the copy.

    Raises
    ------
    ReportError
        If Sphinx fails or warns; the message holds the end of its log.
    """
    mark, shown, titles = work / _UNFINISHED, work / _NAVIGATION, navigation(stage)
    if mark.exists() or not shown.is_file() or shown.read_text(encoding="utf-8") != titles:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    # Jupyter Book appends `_build` to its output path.
    await run_attached("render", "build", str(stage), "--path-output", str(work), "-W", "--keep-going", log=log)
    shown.write_text(titles, encoding="utf-8")
    mark.unlink()
    return work / "_build" / "html"


def navigation(stage: Path) -> str:
    """Return what the side bar of every page shows: the order of the pages and their titles, as JSON."""
    titles = {}
    for path in sorted((stage / "book").glob("*.*")):
        text = path.read_text(encoding="utf-8") if path.suffix in {".md", ".ipynb"} else ""
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        found = re.search(r"^# (.+)$", text, re.MULTILINE)
        if found:
            titles[path.stem] = found.group(1)
    order = (stage / "_toc.yml").read_text(encoding="utf-8")
    return json.dumps({"order": order, "titles": titles}, sort_keys=True)
