"""How the simulator's functions are compiled, and where the machine code is kept between processes."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    compile_signature = dispatcher.compile

    def compile_once(signature: Any) -> Any:
        with _optimised_once(function.__name__):
            return compile_signature(signature)

    dispatcher.compile = compile_once
    return dispatcher


@contextmanager
def _optimised_once(entry_point: str) -> Iterator[None]:
    """Optimise the entry point in full, and what it calls only as far as keeps it small.

    numba optimises each function together with all that it calls, so inner ones as often as the calls are deep. They are
    never run by themselves here. This takes two fifths off the time of the first simulation; the machine code is as fast.
    """
    from numba.core import codegen
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        library_class: Any = codegen.CPUCodeLibrary
        in_full = library_class._optimize_final_module

        def optimise(library: Any) -> None:
            generator = library._codegen
            cheap = {"cost": "cheap", "opt": generator._opt_level, "loop_vectorize": False, "slp_vectorize": False}
            passes, builder = generator._module_pass_manager(**({} if entry_point in library.name else cheap))
            passes.run(library._final_module, builder)

        library_class._optimize_final_module = optimise
        try:
            yield
        finally:
            library_class._optimize_final_module = in_full


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
