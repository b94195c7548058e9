"""Where the project's own files lie: ``data/`` (facts we ship) and ``book/`` (prose, notebooks, pre-registrations).

stepcal runs from a checkout; `STEPCAL_ROOT` names another one. Measured traces are not part of the checkout: see
`stepcal.datasets.catalogue`.
"""

from __future__ import annotations

import os
from pathlib import Path

from stepcal.errors import MissingDataError

ROOT_VARIABLE = "STEPCAL_ROOT"


def project_root() -> Path:
    """Return the checkout's root folder.

    Raises
    ------
    MissingDataError
        If neither `STEPCAL_ROOT` nor the package's parent folder holds ``data/`` and ``book/``.
    """
    named = os.environ.get(ROOT_VARIABLE)
    root = Path(named) if named else Path(__file__).resolve().parent.parent
    if not ((root / "data").is_dir() and (root / "book").is_dir()):
        raise MissingDataError(
            f"{root} holds no `data/` and `book/`: stepcal needs its checkout for the tables it ships. "
            f"Install it with `pip install -e CHECKOUT`, or set {ROOT_VARIABLE} to the checkout's folder."
        )
    return root


def data_folder() -> Path:
    """Return ``data/``: the tables of facts and figures that the project ships."""
    return project_root() / "data"


def book_folder() -> Path:
    """Return ``book/``: prose, notebooks and pre-registrations."""
    return project_root() / "book"
