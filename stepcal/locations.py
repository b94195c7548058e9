"""Where files lie: the tables and the book that ship with stepcal, and the user's cache.

An installed wheel carries what it ships inside the package, in ``stepcal/_shipped``; a checkout has it beside the package.
Measured traces are part of neither: see `stepcal.datasets.catalogue`.
"""

from __future__ import annotations

import functools
import os
from importlib.resources import files
from pathlib import Path

from stepcal.errors import MissingDataError

CACHE_VARIABLE = "STEPCAL_CACHE"
"""Environment variable that names the cache folder."""
RESULTS, COMPILED = "results", "compiled"
"""Folders of the cache: results of studies, and the simulator's machine code. Downloaded traces lie beside them."""


@functools.cache
def shipped_folder() -> Path:
    """Return the folder of what ships: ``data/``, ``book/``, and the book's configuration.

    Raises
    ------
    MissingDataError
        If the package has lost it.
    """
    package = Path(str(files("stepcal")))
    for folder in (package / "_shipped", package.parent):
        if (folder / "data").is_dir() and (folder / "book").is_dir():
            return folder
    raise MissingDataError(
        f"{package} has no `data/` and `book/`, inside or beside it: the installation is not complete. Install the wheel "
        "again, or `pip install -e CHECKOUT`."
    )


def data_folder() -> Path:
    """Return ``data/``: the tables of facts and figures that ship."""
    return shipped_folder() / "data"


def book_folder() -> Path:
    """Return ``book/``: prose, notebooks and pre-registrations."""
    return shipped_folder() / "book"


def cache_folder() -> Path:
    """Return the cache: the folder that `STEPCAL_CACHE` names, else stepcal's own in the user's cache. It need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("stepcal", appauthor=False))
