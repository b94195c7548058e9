"""What a page was computed from, as one hash: its code cells, its parameters, the code it imports, the data, the versions.

Two builds that agree in all of these show the same page, so the second need not execute it. The code a page imports is
followed through the package by its import statements, without running anything.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "stepcal"
SHOWN_PACKAGES = ("numpy", "pandas", "scipy", "numba", "matplotlib", "xgboost-cpu")
"""Versions that can move a number or the look of a figure; they are in the hash, and in the foot of each page."""


def page_key(code_cells: Iterable[str], parameters: Mapping[str, object], computed_from: str) -> str:
    """Return the content address of an executed page.

    Parameters
    ----------
    code_cells : iterable of str
        Sources in order. Prose is not part of the address: it changes nothing that was computed.
    parameters : mapping
        Values that replace the page's own.
    computed_from : str
        Hash of code, data and versions together.
    """
    return sha256_of(json.dumps([list(code_cells), dict(parameters), computed_from], sort_keys=True, default=str))


def code_sha256(code: str, package: Path | None = None) -> str:
    """Return a hash of every module of the package that some code imports, directly or not."""
    sources = module_files(package or Path(__file__).parent.parent)
    return sha256_of(*(f"{module}\0{_read(sources[module])}" for module in sorted(modules_of(code, sources))))


def modules_of(code: str, sources: Mapping[str, Path]) -> set[str]:
    """Return the modules of the package that some code imports, directly or not."""
    wanted, seen = _imported(code, PACKAGE, sources), set[str]()
    while wanted:
        module = wanted.pop()
        if module not in seen:
            seen.add(module)
            wanted |= _imported(_read(sources[module]), module, sources) - seen
    return seen


def files_sha256(*folders: Path) -> str:
    """Return a hash of the names and contents of all files in some folders; hidden ones and caches are left out."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            if path.is_file() and not any(p.startswith((".", "__pycache__")) for p in parts):
                digest.update(f"{'/'.join(parts)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of what a page's numbers depend on most."""
    found = {"Python": platform.python_version()}
    for name in SHOWN_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def sha256_of(*texts: str) -> str:
    """Return a hash of some texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def module_files(package: Path) -> dict[str, Path]:
    """Return the source file of each module of the package that lies in a folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(code: str, module: str, sources: Mapping[str, Path]) -> set[str]:
    """Return the package's modules that code names in its imports, and the packages that hold them."""
    found: set[str] = set()
    is_package = module in sources and sources[module].name == "__init__.py"
    for node in ast.walk(_parsed(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            # A lazy name of the package itself: static reading cannot follow it, so it may be anything.
            found |= set(sources) if any(alias.name == PACKAGE for alias in node.names) else set()
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            found.add(base)
            for alias in node.names:
                if f"{base}.{alias.name}" in sources:
                    found.add(f"{base}.{alias.name}")
                elif base == PACKAGE and alias.name not in _assigned(sources):
                    found |= set(sources)
    with_parents = {".".join(name.split(".")[: i + 1]) for name in found for i in range(name.count(".") + 1)}
    return with_parents & set(sources)


def _assigned(sources: Mapping[str, Path]) -> set[str]:
    """Return the names that the package itself assigns, such as its version."""
    targets = [
        t for node in _parsed(_read(sources[PACKAGE])).body if isinstance(node, ast.Assign) for t in node.targets
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    up = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*up, *([node.module] if node.module else [])])


@lru_cache(maxsize=1024)
def _parsed(code: str) -> ast.Module:
    return ast.parse(code)


@lru_cache(maxsize=1024)
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
