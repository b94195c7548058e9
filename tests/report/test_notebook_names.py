"""Pages call what the package has: every name that a notebook takes from a module of ours exists there."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from stepcal.locations import book_folder

NOTEBOOKS = sorted(book_folder().glob("*.ipynb"))


def missing_names(code: str) -> list[str]:
    """Names of our modules that some code uses and that they lack."""
    tree = ast.parse(code)
    modules: dict[str, ModuleType] = {}
    missing = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stepcal"):
            continue
        for alias in node.names:
            try:
                value = getattr(import_module(node.module), alias.name, None) or import_module(
                    f"{node.module}.{alias.name}"
                )
            except ImportError:
                missing.append(f"{node.module}.{alias.name}")
                continue
            if isinstance(value, ModuleType):
                modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            missing += [] if hasattr(module, node.attr) else [f"{module.__name__}.{node.attr}"]
    return missing


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_exists(notebook: Path):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert missing_names(code) == []


def test_a_name_that_is_gone_is_found():
    code = "from stepcal.studies import registry as r\nfrom stepcal.studies import nothing\nr.load_study\nr.gone()"
    assert missing_names(code) == ["stepcal.studies.nothing", "stepcal.studies.registry.gone"]
