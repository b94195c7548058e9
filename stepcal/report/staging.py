"""Puts a page together for the renderer: prose, outputs, and the frame that every page shares."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepcal.errors import InputError
from stepcal.files import write_atomically
from stepcal.report.execution import code_cells, source_of
from stepcal.report.glossary import link_terms
from stepcal.report.parameters import PARAMETERS

FRAME_ID = "stepcal-rerun"


def read_toc(root: Path) -> list[str]:
    """Return the pages in the order of the book, as paths without suffix: ``book/summary`` first."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [c["file"] for part in toc.get("parts", []) for c in part["chapters"]]
    return [toc["root"], *chapters, *(c["file"] for c in toc.get("chapters", []))]


def declared_parameters(notebook: Mapping[str, Any]) -> dict[str, object]:
    """Return the parameters that a notebook takes, with their defaults, in order."""
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return dict(_assignments(source_of(cell)))
    return {}


def page_path(root: Path, name: str) -> Path:
    """Return the notebook of a page by its name, with or without folder and suffix.

    Raises
    ------
    InputError
        If there is no such page.
    """
    stem = Path(name).stem
    path = root / "book" / f"{stem}.ipynb"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (root / "book").glob("*.ipynb")))
        raise InputError(f"`--only {name}`: there is no such page of code. Pages: {known}.")
    return path


def framed(notebook: dict[str, Any], page: str, terms: Sequence[str] = ()) -> dict[str, Any]:
    """Return an executed notebook as it is rendered: set-up hidden, terms linked, and how to run it again at its end."""
    cells = []
    for cell in link_terms(notebook["cells"], terms):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and ("parameters" in tags or _is_set_up(source_of(cell))):
            hidden = [*(t for t in tags if t != "hide-input"), "remove-input"]
            cells.append({**cell, "metadata": {**cell["metadata"], "tags": hidden}})
        else:
            cells.append(cell)
    if code_cells(notebook):
        cells.append(_again(page, declared_parameters(notebook)))
    return {**notebook, "cells": cells}


def stage_sources(root: Path, stage: Path, notebooks: Mapping[str, dict[str, Any]]) -> None:
    """Write everything that the renderer reads; files that stay the same keep their time, so that it skips them.

    Parameters
    ----------
    root : Path
        The checkout.
    stage : Path
    notebooks : mapping
        Executed and framed, by file name.
    """
    wanted: dict[Path, bytes] = {Path(name): (root / name).read_bytes() for name in ("_config.yml", "_toc.yml")}
    for path in sorted((root / "book").rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and path.suffix != ".ipynb" and not any(p.startswith(".") for p in parts):
            wanted[Path(*parts)] = path.read_bytes()
    for name, notebook in notebooks.items():
        wanted[Path("book") / name] = json.dumps(notebook, sort_keys=True, ensure_ascii=False).encode()
    for relative, content in wanted.items():
        path = stage / relative
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(stage) not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


def unexecuted(page: str) -> dict[str, Any]:
    """Return what stands in for a page that was left out of this build."""
    text = f"# {page.replace('_', ' ')}\n\nThis page was not executed: the book was built with `--only`."
    return {"cells": [_markdown(text)], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(path: Path, notebook: Mapping[str, Any]) -> None:
    """Write a notebook as JSON."""
    write_atomically(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _is_set_up(source: str) -> bool:
    """Tell whether a cell has imports, and hence is not what a reader wants to see under a figure."""
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


def _assignments(source: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.append((node.target.id, ast.literal_eval(node.value)))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.append((node.targets[0].id, ast.literal_eval(node.value)))
    return found


def _again(page: str, parameters: Mapping[str, object]) -> dict[str, Any]:
    example = next((n for n, v in parameters.items() if n not in {"source", "data"} and v is not None), None)
    setting = f" --set {example}={parameters[example]}" if example else ""
    if "coefficients" in parameters:  # a page about runs of one's own, which lie in a folder
        setting = f" --data FOLDER{setting}"
    rows = "\n".join(f"| `{n}` | `{v}` | {PARAMETERS[n].meaning} |" for n, v in parameters.items() if n in PARAMETERS)
    text = (
        "## Re-run this page\n\n"
        f"```console\n$ stepcal report --only {page}{setting}\n```\n\n"
        f"| parameter | default | what it is |\n|---|---|---|\n{rows}\n"
    )
    return _markdown(text)


def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": FRAME_ID, "metadata": {}, "source": text}
