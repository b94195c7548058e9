"""Executes notebooks, several at once, and keeps what came out under its content address.

A kernel is the only process that a build starts for a page, and it ends with the build (`stepcal.report.attached`). The
cache holds the outputs of the code cells alone, so a page whose prose changed is put together anew without computing.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcal.errors import StepcalError
from stepcal.files import write_atomically

KERNEL = "stepcal-report"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Sums are then added in the same order on any number of cores."""
CELL_TIMEOUT_S = 1800
CITED = re.compile(r"\{glue:text\}`(\w+)")
"""Where prose cites a number of the page's cells."""
_START_TIMEOUT_S = 180
_LOG_LINES = 25


class ReportError(StepcalError):
    """A notebook failed or the book did not build; the message names the page, the cell and what it said."""


@dataclass(frozen=True)
class Executed:
    """What a page's code cells put out, and when.

    Attributes
    ----------
    outputs : list
        One entry a code cell, in order: its outputs, in the notebook format.
    seconds : float
        How long the execution took.
    day : str
        ISO date of the execution.
    """

    outputs: list[list[dict[str, Any]]]
    seconds: float
    day: str


class PageCache:
    """Executed pages by content address, a JSON file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Executed | None:
        """Return a page's outputs, or None where they are missing or were not written to the end."""
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            found = Executed(content["outputs"], float(content["seconds"]), str(content["day"]))
        except (OSError, ValueError, KeyError):
            return None
        os.utime(self._path(key))
        return found

    def put(self, key: str, page: Executed) -> None:
        """Keep a page's outputs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(key), json.dumps(vars(page)))

    def latest(self, name: str) -> Executed | None:
        """Return a page as it was last executed, with whatever code and data; None if it never was."""
        return self.get(self._index().get(name, ""))

    def note_latest(self, keys: Mapping[str, str]) -> None:
        """Remember under which address each page was last executed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / "latest.json", json.dumps({**self._index(), **keys}, sort_keys=True))

    def _index(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self._folder / "latest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def seconds(self) -> dict[str, float]:
        """Return how long each page took when it was last executed, by the page's name."""
        try:
            found: dict[str, float] = json.loads((self._folder / "seconds.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def note_seconds(self, seconds: Mapping[str, float]) -> None:
        """Remember how long pages took; the next build's time left rests on it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / "seconds.json", json.dumps({**self.seconds(), **seconds}, sort_keys=True))

    def forget_before(self, days: float) -> None:
        """Remove pages that no build has used for some days."""
        oldest = time.time() - 86_400 * days
        for path in self._folder.glob("*.json"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


def fits(notebook: Mapping[str, Any], page: Executed) -> bool:
    """Whether a notebook has as many code cells as a page has outputs, and cites only numbers that are among them."""
    prose = "\n".join(source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    glued = {o.get("metadata", {}).get("scrapbook", {}).get("name") for cell in page.outputs for o in cell}
    return len(code_cells(notebook)) == len(page.outputs) and set(CITED.findall(prose)) <= glued


def code_cells(notebook: Mapping[str, Any]) -> list[str]:
    """Return the sources of a notebook's code cells in order."""
    return [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source_of(cell: Mapping[str, Any]) -> str:
    """Return a cell's source as one text."""
    return "".join(cell["source"])


def with_outputs(notebook: Mapping[str, Any], page: Executed) -> dict[str, Any]:
    """Return the notebook with the outputs of its code cells filled in."""
    outputs = iter(page.outputs)
    cells = [
        {**cell, "outputs": next(outputs), "execution_count": None} if cell["cell_type"] == "code" else dict(cell)
        for cell in notebook["cells"]
    ]
    return {**notebook, "cells": cells}


async def execute(path: Path, parameters: Mapping[str, object], jupyter_path: Path) -> Executed:
    """Execute one notebook in a kernel of its own.

    Parameters
    ----------
    path : Path
    parameters : mapping
        Replace the values of the cell tagged `parameters`.
    jupyter_path : Path
        Folder that holds the build's kernel, from `install_kernel`.

    Raises
    ------
    ReportError
        Naming the page, the cell and what it said.
    """
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    started = time.perf_counter()
    notebook = load_notebook_node(str(path))
    notebook.metadata["kernelspec"] = {"name": KERNEL, "display_name": KERNEL, "language": "python"}
    if parameters:
        notebook = parameterize_notebook(notebook, dict(parameters))
    at = {"cell": 0}

    def remember(cell: Any, cell_index: int) -> None:  # noqa: ARG001
        at["cell"] = cell_index

    manager = AsyncKernelManager(kernel_name=KERNEL)
    manager.kernel_spec_manager.kernel_dirs = [str(jupyter_path / "kernels")]
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=CELL_TIMEOUT_S,
        startup_timeout=_START_TIMEOUT_S,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=remember,
    )
    try:
        await client.async_execute(env={**os.environ, **ONE_THREAD}, cleanup_kc=True)
    except CellExecutionError as error:
        raise ReportError(_failure(path, notebook, at["cell"], f"{error.ename}: {error.evalue}")) from None
    except CellTimeoutError:
        raise ReportError(_failure(path, notebook, at["cell"], f"ran for over {CELL_TIMEOUT_S} s")) from None
    except DeadKernelError:
        raise ReportError(_failure(path, notebook, at["cell"], "its process died (memory?)")) from None
    finally:
        if manager.has_kernel:
            await manager.shutdown_kernel(now=True)
    outputs = [
        json.loads(json.dumps(cell["outputs"]))
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    return Executed(outputs, time.perf_counter() - started, datetime.date.today().isoformat())


def install_kernel(folder: Path) -> Path:
    """Write a kernel that runs this very interpreter: a kernel named python3 may belong to another environment."""
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "stepcal.report.attached", "kernel", "--log-level=ERROR", "-f", "{connection_file}"]
    content = {"argv": launch, "display_name": "stepcal report", "language": "python"}
    write_atomically(spec / "kernel.json", json.dumps(content))
    return folder


async def run_attached(*arguments: str, log: Path | None = None) -> None:
    """Run one of `stepcal.report.attached`'s processes to its end.

    Raises
    ------
    ReportError
        With the end of what it said, if it fails.
    """
    await run_program(sys.executable, "-m", "stepcal.report.attached", *arguments, log=log)


async def run_program(*command: str, log: Path | None = None) -> None:
    """Run a program in a session of its own, and end it with all it started if this one is stopped.

    Raises
    ------
    ReportError
        With the end of what it said, if it fails.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **ONE_THREAD},
        start_new_session=True,
    )
    try:
        said = (await process.communicate())[0].decode(errors="replace")
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if log:
        log.write_text(said, encoding="utf-8")
    if process.returncode:
        lines = said.strip().splitlines()
        # What a renderer complains of stands far above the end of its log.
        complaints = [line for line in lines if "WARNING" in line or "ERROR" in line]
        tail = "\n".join((complaints or lines)[-_LOG_LINES:])
        where = f" The log is {log}:" if log else ""
        raise ReportError(f"`{' '.join(command[:5])}` failed.{where}\n{tail}")


def _failure(path: Path, notebook: Any, index: int, said: str) -> str:
    cells = notebook.cells
    number = 1 + sum(c.cell_type == "code" for c in cells[:index])
    lines = [line for line in cells[index].source.splitlines() if line.strip()]
    return f"{path.name}, code cell {number} (`{lines[0] if lines else ''}`): {said}"
