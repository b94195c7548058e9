"""How the simulator's functions are compiled, and where the machine code is kept between processes."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from stepcal.locations import COMPILED, cache_folder

_LOG = logging.getLogger("stepcal")
_OUR_IMPORTS = re.compile(r"^\s*from (stepcal[\w.]*) import ([^(\n]+|\([^)]*\))", re.MULTILINE)

# None of them allocates, so none needs numba's reference counts, which are atomic and cost more than all the rest
# together.
_OPTIONS: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}

# Functions that are called once or rarely.
compiled = njit(**_OPTIONS)

# Functions of the hot path become part of their callers: passing all the arrays of a run costs more than what most of
# them do.
inlined = njit(forceinline=True, **_OPTIONS)


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an entry point, and keep its machine code in stepcal's cache.

    It touches nothing but the arrays of one run, so it needs no lock of Python's: runs in several threads are simulated
    side by side.
    """
    dispatcher = njit(nogil=True, **_OPTIONS)(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


@cache
def _sources_sha256(source: str) -> str:
    """Hash of a file and of all of ours that it imports. numba looks at the file alone, not at what it calls."""
    root = Path(__file__).parents[2]
    found: dict[Path, bytes] = {}
    ahead = [Path(source)]
    while ahead:
        path = ahead.pop()
        if path in found or not path.is_file():
            continue
        found[path] = path.read_bytes()
        for module, names in _OUR_IMPORTS.findall(found[path].decode("utf-8")):
            folder = root.joinpath(*module.split("."))
            ahead += [folder.with_suffix(".py"), *(folder / f"{name}.py" for name in re.findall(r"\w+", names))]
    return hashlib.sha256(b"".join(found[path] for path in sorted(found))).hexdigest()


class _Locator:
    """Tells numba where machine code lies: a folder of the user's cache for each state of the sources.

    Beside the sources, where numba would put it, an installed package may be read-only.
    """

    def __init__(self, source: str) -> None:
        self._py_file = source

    @classmethod
    def from_function(cls, _: Callable[..., Any], source: str) -> _Locator:
        return cls(source)

    def get_cache_path(self) -> str:
        return str(cache_folder() / COMPILED / self.get_source_stamp()[:16])

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_source_stamp(self) -> str:
        return _sources_sha256(self._py_file)

    def get_disambiguator(self) -> str:
        return ""


class _Files(CompileResultCacheImpl):
    _locator_classes: list[type[object]] = [_Locator]  # noqa: RUF012 as numba declares it


class _Cache(FunctionCache):
    """numba's cache, without what only a compilation needs: loading numba's own libraries takes longer than the code."""

    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load machine code; None where there is none, or none that can be used: it is compiled then."""
        try:
            found = self._load_overload(sig, target_context)
        except Exception:  # a damaged file raises whatever its bytes say
            found = None
            with suppress(OSError):
                self.flush()
        if found is None:
            _LOG.info("Compiling the simulator for this machine: once for this kind of server, up to a minute.")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep machine code, if the cache can be written to."""
        try:
            super().save_overload(sig, data)
        except OSError:
            _LOG.info("The cache %s cannot be written to: the next process compiles again.", self.cache_path)
