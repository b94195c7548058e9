"""The report needs more than the package: what the extra ``[report]`` installs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

from stepcal.report.execution import ReportError

_REQUIREMENT = re.compile(r"([\w.-]+).*extra == ['\"]report['\"]")


def refuse_without_extra() -> None:
    """Say at once what is missing, rather than after the studies have run.

    Raises
    ------
    ReportError
        If a package of the extra is not installed.
    """
    missing = [name for name in _extra() if not _is_installed(name)]
    if missing:
        raise ReportError(
            f"The report needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            "`pip install 'stepcal[report]'` installs what the book is built with."
        )


def _extra() -> list[str]:
    """Packages of the extra, as the installed package's metadata say; none where only sources are at hand."""
    try:
        asked = requires("stepcal") or []
    except PackageNotFoundError:
        return []
    return [found[1] for found in map(_REQUIREMENT.match, asked) if found]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
