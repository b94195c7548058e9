"""``stepcal report``: build the book, or one page of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    output: Annotated[Path, typer.Option("--output", help="Folder for the built book.")] = Path("_build"),
    source: Annotated[
        str, typer.Option("--source", help="measured (recorded where traces are missing) or simulated.")
    ] = "measured",
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with the traces, or of your own runs. Default: STEPCAL_DATA.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Notebooks that run at once.")] = 2,
    only: Annotated[
        str | None, typer.Option("--only", help="Execute this page alone and open it; others stay as they were.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: replaces a parameter on every page that takes it. May be repeated."),
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print the whole book to a PDF too; needs Chromium.")] = False,
) -> None:
    """Execute the notebooks that changed and build the book; prints the path of its first page.

    What was executed before with the same code, parameters and data is not executed again. The last book stays until the
    new one is complete.
    """
    from stepcal.report.build import build_report
    from stepcal.report.extra import refuse_without_extra
    from stepcal.report.parameters import parse_setting

    refuse_without_extra()
    settings = dict(parse_setting(text) for text in setting or [])
    page = build_report(output, source=source, data=data, jobs=jobs, only=only, settings=settings, pdf=pdf)
    typer.echo(str(page))
    if only and sys.stdout.isatty():
        typer.launch(page.as_uri())
