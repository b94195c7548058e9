"""Renders staged sources with Jupyter Book: all pages at first, afterwards those that changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from stepcal.report.execution import run_attached

_UNFINISHED = ".rendering"


async def render(stage: Path, work: Path, log: Path) -> Path:
    """Bring the rendered pages up to date with the staged sources, warnings as errors.

    Parameters
    ----------
    stage : Path
        Sources from `stepcal.report.staging.stage_sources`.
    work : Path
        Sphinx's own folder; kept from build to build, and made anew after one that did not end.
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
    mark = work / _UNFINISHED
    if mark.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    # Jupyter Book appends `_build` to its output path.
    await run_attached("render", "build", str(stage), "--path-output", str(work), "-W", "--keep-going", log=log)
    mark.unlink()
    return work / "_build" / "html"
