"""``stepcal cache``: what stepcal keeps between processes, and how to be rid of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from stepcal.cli.output import Json, emit
from stepcal.locations import COMPILED, RESULTS, cache_folder

KEPT = {
    RESULTS: ("results of studies", re.compile(r"\w+-[0-9a-f]{32}\.json")),
    COMPILED: ("machine code of the simulator", re.compile(r"[0-9a-f]{16}/[^/]+\.nb[ci]")),
}
"""What can be made again, by its folder, and how its files are called. Nothing else is deleted, wherever the cache lies."""


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete results and machine code; downloaded traces stay.")
    ] = False,
    json_out: Json = None,
) -> None:
    """Show the cache: results of studies and machine code, kept so that the second time is quick.

    It lies in the folder that STEPCAL_CACHE names, by default in the user's cache. Nothing in it is ever stale: entries are
    named by a hash of the code and data that they were made from. Example: stepcal cache --clear
    """
    from stepcal.units import BYTES_PER_MB

    folder = cache_folder()
    files = {name: _files(folder / name, pattern) for name, (_, pattern) in KEPT.items()}
    found = {name: sum(path.stat().st_size for path in own) for name, own in files.items()}
    if clear:
        for path in (path for own in files.values() for path in own):
            path.unlink(missing_ok=True)
    result: dict[str, Any] = {"folder": str(folder), "cleared": clear, "bytes": found}
    lines = [f"{'Cleared' if clear else 'Cache'}: {folder}"]
    lines += [f"  {what}: {found[name] / BYTES_PER_MB:.1f} MB" for name, (what, _) in KEPT.items()]
    emit(result, json_out, "\n".join(lines))


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [p for p in folder.rglob("*") if pattern.fullmatch(p.relative_to(folder).as_posix()) and p.is_file()]
