"""Builds the book: notebooks are executed by papermill, then Jupyter Book renders pages and outputs.

The checkout stays as it is. Sources are staged in ``<output>/stage``, executed there, and rendered to ``<output>/html``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from stepcal.errors import InputError, StepcalError
from stepcal.locations import shipped_folder
from stepcal.studies.registry import SHARED_RESULTS, SOURCES, STUDIES, load_study

KERNEL = "stepcal-report"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Sums are then added in the same order on any number of cores."""


class ReportError(StepcalError):
    """A notebook failed or the book did not build; the message holds the end of the log."""


def build_report(output: Path, *, source: str = "measured", jobs: int = 2) -> Path:
    """Execute all notebooks and build the book.

    Parameters
    ----------
    output : Path
        Folder to build in; its ``stage`` and ``html`` are replaced.
    source : str
        Passed to every notebook: ``measured``, or ``simulated`` for a book on simulated rows that says so on every page.
    jobs : int
        Notebooks that run at once.

    Returns
    -------
    Path
        The first page.

    Raises
    ------
    InputError
        If `source` is unknown.
    ReportError
        If a notebook fails, or Sphinx warns: the book is built with warnings as errors.
    """
    if source not in SOURCES:
        raise InputError(f"`source={source!r}` is unknown; it is one of {', '.join(SOURCES)}.")
    root, output = shipped_folder(), output.resolve()
    stage = output / "stage"
    _stage(root, stage)
    notebooks = sorted((root / "book").glob("*.ipynb"))
    shared = output / "shared"
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    os.environ.update(ONE_THREAD, **{SHARED_RESULTS: str(shared), "JUPYTER_PATH": str(_own_kernel(output / "jupyter"))})
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(load_study, source=source), STUDIES))
        runs = [pool.submit(execute_notebook, n, stage / "book" / n.name, {"source": source}) for n in notebooks]
        for notebook, run in zip(notebooks, runs, strict=True):
            print(f"  {notebook.name}: {run.result():.1f} s", file=sys.stderr)
    _build(stage, output)
    return output / "html" / "index.html"


def execute_notebook(notebook: Path, executed: Path, parameters: dict[str, object]) -> float:
    """Execute one notebook with papermill and return the seconds it took.

    Raises
    ------
    ReportError
        Naming the notebook and what its failing cell said.
    """
    import papermill

    started = time.perf_counter()
    try:
        papermill.execute_notebook(
            notebook, executed, parameters=parameters, kernel_name=KERNEL, cwd=notebook.parent, progress_bar=False
        )
    except papermill.PapermillExecutionError as error:
        raise ReportError(f"{notebook.name} failed in cell {error.cell_index}: {error.ename}: {error.evalue}") from None
    _hide_injected_parameters(executed)
    return time.perf_counter() - started


def _hide_injected_parameters(executed: Path) -> None:
    """Keep the cell that papermill adds off the page: the notebook's own parameters cell stands there already."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags:
            cell["metadata"]["tags"] = [*tags, "remove-cell"]
    executed.write_text(json.dumps(notebook), encoding="utf-8")


def _own_kernel(folder: Path) -> Path:
    """Write a kernel that runs this very interpreter: a kernel named python3 may belong to another environment."""
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
    content = {"argv": launch, "display_name": "stepcal report", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _stage(root: Path, stage: Path) -> None:
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(root / "book", stage / "book", ignore=shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(root / name, stage / name)


def _build(stage: Path, output: Path) -> None:
    # Jupyter Book appends `_build` to its output path: build in a folder of its own and move the pages.
    scratch = output / "book"
    shutil.rmtree(scratch, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(stage), "--path-output", str(scratch), "--all", "-W", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (output / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise ReportError(f"The book did not build; the log is {output / 'build.log'}. Its end:\n{tail}")
    pages = output / "html"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.move(str(scratch / "_build" / "html"), pages)
    shutil.rmtree(scratch, ignore_errors=True)
