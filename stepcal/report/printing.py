"""Prints the whole book to a PDF, with whichever Chromium is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

from stepcal.report.execution import ReportError, run_program
from stepcal.report.finishing import PRINT_PAGE

PDF = "stepcal.pdf"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SCRIPTS_MS = 20_000
"""Virtual time that a page's scripts get: formulas are drawn by one."""


def browser() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def needed_browser() -> str:
    """Return the path of an installed Chromium.

    Raises
    ------
    ReportError
        If there is none.
    """
    program = browser()
    if program is None:
        raise ReportError(
            f"`--pdf` prints with Chromium, and none of {', '.join(PROGRAMS)} is installed. Leave it out."
        )
    return program


async def print_book(pages: Path) -> Path:
    """Print the page that holds all others.

    Raises
    ------
    ReportError
        If there is no Chromium, or it fails.
    """
    program = needed_browser()
    target = pages / PDF
    await run_program(
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-pdf-header-footer",
        f"--virtual-time-budget={_SCRIPTS_MS}",
        f"--print-to-pdf={target}",
        (pages / PRINT_PAGE).as_uri(),
    )
    if not target.is_file():
        raise ReportError(f"{program} wrote no PDF.")
    return target
