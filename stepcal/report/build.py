"""Builds the book as a graph: studies, then the pages that show them, then the rendering, then the swap.

Each page has a content address (`stepcal.report.fingerprint`); what has been executed under the same address is taken from
the cache. The checkout stays as it is, and so does the last book until the new one is complete.

``<output>/html`` is the book, ``<output>/cache`` what was executed, ``<output>/work`` what the renderer keeps.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepcal.datasets import have_traces
from stepcal.errors import InputError
from stepcal.locations import shipped_folder
from stepcal.report import fingerprint, staging
from stepcal.report.claims import check_claims
from stepcal.report.execution import (
    Executed,
    PageCache,
    ReportError,
    code_cells,
    execute,
    fits,
    install_kernel,
    run_attached,
)
from stepcal.report.execution import with_outputs as _with_outputs
from stepcal.report.finishing import Facts, finish
from stepcal.report.glossary import read_terms
from stepcal.report.own_server import is_own_server, own_root
from stepcal.report.printing import needed_browser, print_book
from stepcal.report.progress import BuildProgress
from stepcal.report.rendering import render
from stepcal.report.swap import only_builder, recover, take_place
from stepcal.studies.registry import SOURCES, STUDIES
from stepcal.studies.results.provenance import MEASURED

UNUSED_DAYS = 30
"""Executed pages that no build asked for in so many days are forgotten."""
_BUILT = "build.json"


@dataclass(frozen=True)
class Page:
    """A notebook of the book, with what it is executed with and its content address."""

    name: str
    path: Path
    notebook: dict[str, Any]
    parameters: dict[str, object]
    key: str

    @property
    def studies(self) -> tuple[str, ...]:
        """Studies that its code loads by name."""
        return studies_in("\n".join(code_cells(self.notebook)))


def build_report(
    output: Path,
    *,
    source: str = "measured",
    data: Path | None = None,
    jobs: int = 2,
    only: str | None = None,
    settings: Mapping[str, object] | None = None,
    pdf: bool = False,
) -> Path:
    """Execute the notebooks that changed and build the book.

    Parameters
    ----------
    output : Path
        Folder to build in; its ``html`` is replaced once the new book is complete.
    source : str
        Passed to every notebook: ``measured``, or ``simulated`` for a book on simulated rows that says so on every page.
    data : Path, optional
        Folder with the traces; by default the one that STEPCAL_DATA names. A folder of one's own runs (what `stepcal ingest`
        wrote, with an ``exp-config.yaml``) makes the book about that server instead.
    jobs : int
        Notebooks that run at once.
    only : str, optional
        Execute this page alone. Others are shown as they were last executed, or not at all.
    settings : mapping, optional
        Parameters that replace the defaults of every page that takes them.
    pdf : bool
        Print the whole book to ``stepcal.pdf`` too, with Chromium.

    Returns
    -------
    Path
        The first page, or the page that `only` names.

    Raises
    ------
    InputError
        If `source`, `only` or a setting is unknown, or `data` is no folder.
    ReportError
        If a notebook fails, Sphinx warns, the build is stopped, another one holds `output`, or there is no Chromium for the
        PDF. The last book then stands.
    """
    if source not in SOURCES:
        raise InputError(f"`source={source!r}` is unknown; it is one of {', '.join(SOURCES)}.")
    if data is not None and not data.is_dir():
        raise InputError(f"`--data {data}` is not a folder that exists.")
    if pdf:
        needed_browser()
    root, output = shipped_folder(), output.resolve()
    if data is not None:
        os.environ["STEPCAL_DATA"] = str(data.resolve())
    with only_builder(output):
        recover(output / "html")
        if data is not None and is_own_server(data):
            root = own_root(output / "work" / "own_server")
            settings = {**(settings or {}), "folder": str(data.resolve())}
        pages = _pages(root, {**(settings or {}), **({} if source == MEASURED else {"source": source})})
        shown = staging.page_path(root, only).stem if only else Path(staging.read_toc(root)[0]).stem
        asyncio.run(_Build(root, output, jobs, pdf).run(pages, shown if only else None))
        return output / "html" / "book" / f"{shown}.html" if only else output / "html" / "index.html"


def studies_in(code: str) -> tuple[str, ...]:
    """Return the studies that code loads by their literal names."""
    found = re.findall(r"load_study\(\s*\"(\w+)\"", code)
    found += [n.lower() for n in re.findall(r"load_study\(\s*\w+\.([A-Z_0-9]+)\b", code)]
    return tuple(dict.fromkeys(n for n in found if n in STUDIES))


def _pages(root: Path, settings: Mapping[str, object]) -> list[Page]:
    pages, taken = [], set[str]()
    data_hash = _data_sha256(root)
    versions = json.dumps(fingerprint.versions())
    for name in staging.read_toc(root):
        path = root / f"{name}.ipynb"
        if not path.is_file():
            continue
        notebook = json.loads(path.read_text(encoding="utf-8"))
        declared = staging.declared_parameters(notebook)
        taken |= set(settings) & set(declared)
        own = {n: v for n, v in settings.items() if n in declared and v != declared[n]}
        cells = code_cells(notebook)
        code = fingerprint.code_sha256("\n".join(cells))
        key = fingerprint.page_key(cells, own, fingerprint.sha256_of(code, data_hash, versions))
        pages.append(Page(path.stem, path, notebook, own, key))
    unused = set(settings) - taken
    if unused:
        raise InputError(f"No page takes {', '.join(f'`{n}`' for n in sorted(unused))}.")
    return pages


class _Build:
    """One build: what it reads, where it writes, how far it is."""

    def __init__(self, root: Path, output: Path, jobs: int, pdf: bool) -> None:
        self._pdf = pdf
        self._root = root
        self._output = output
        self._jobs = jobs
        self._cache = PageCache(output / "cache" / "pages")
        self._progress = BuildProgress(self._cache.seconds(), jobs)

    async def run(self, pages: Sequence[Page], only: str | None) -> None:
        """Execute, render and swap; leave the last book where anything fails."""
        stopped = _cancel_when_stopped()
        try:
            await self._run(pages, only)
        except asyncio.CancelledError:
            raise ReportError("The build was stopped. The last book stands as it was.") from None
        except BaseExceptionGroup as group:
            if stopped.is_set():
                # What a kernel that was ended says of its end is no news.
                raise ReportError("The build was stopped. The last book stands as it was.") from None
            failures, rest = group.split(ReportError)
            if rest is not None or failures is None:
                raise
            raise _first(failures) from None

    async def _run(self, pages: Sequence[Page], only: str | None) -> None:
        executed = {p.name: found for p in pages if (found := self._cache.get(p.key))}
        missing = [p for p in pages if p.name not in executed and only in {None, p.name}]
        if missing:
            executed |= await self._execute(missing)
        self._cache.note_latest({p.name: p.key for p in pages if p.name in executed})
        if only is not None:
            for one in pages:
                older = None if one.name in executed else self._cache.latest(one.name)
                if older is not None and fits(one.notebook, older):
                    executed[one.name] = older
        if only is None and not any(p.parameters for p in pages):
            check_claims(
                self._root / "data" / "claims.csv", {p.name: _with_outputs(p.notebook, executed[p.name]) for p in pages}
            )
        days = {n: e.day for n, e in executed.items()}
        facts = Facts.of(self._root, _data_sha256(self._root), days)
        terms = read_terms(self._root / "book" / "glossary.md")
        notebooks = {
            f"{p.name}.ipynb": staging.framed(_with_outputs(p.notebook, executed[p.name]), p.name, terms)
            if p.name in executed
            else staging.unexecuted(p.name)
            for p in pages
        }
        stage, html = self._output / "work" / "stage", self._output / "html"
        staging.stage_sources(self._root, stage, notebooks)
        own = fingerprint.files_sha256(stage, Path(__file__).parent)
        built = fingerprint.sha256_of(own, repr((facts, self._pdf)))
        if _built(html) == built:
            self._progress.say("  Nothing changed: the book is up to date.")
            return
        self._progress.say("  rendering")
        rendered = await render(stage, self._output / "work" / "sphinx", self._output / "build.log")
        new = self._output / ".html.new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(rendered, new)
        parameters = {p.name: p.parameters for p in pages}
        private = [str(self._root), str(self._output), os.environ.get("STEPCAL_DATA") or str(self._root)]
        finish(new, staging.read_toc(self._root), notebooks, parameters, facts, private)
        if self._pdf:
            self._progress.say("  printing")
            await print_book(new)
        (new / _BUILT).write_text(json.dumps({"built": built}), encoding="utf-8")
        take_place(new, html)
        self._cache.forget_before(UNUSED_DAYS)

    async def _execute(self, pages: Sequence[Page]) -> dict[str, Executed]:
        output = self._output
        kernels = install_kernel(output / "work" / "jupyter")
        free = asyncio.Semaphore(self._jobs)
        source = next((str(p.parameters["source"]) for p in pages if "source" in p.parameters), MEASURED)
        # Without traces a study is a file to read, and a page alone computes what it shows by itself.
        together = len(pages) > 1 and (source != MEASURED or have_traces())
        wanted = [n for n in STUDIES if any(n in p.studies for p in pages)] if together else []
        ready = {name: asyncio.Event() for name in wanted}
        executed: dict[str, Executed] = {}

        async def study(name: str) -> None:
            async with free:
                self._progress.started(f"study {name}")
                await run_attached("study", name, source)
                self._progress.ended(f"study {name}")
            ready[name].set()

        async def page(one: Page) -> None:
            for name in one.studies:
                if name in ready:
                    await ready[name].wait()
            async with free:
                self._progress.started(one.name)
                executed[one.name] = await execute(one.path, one.parameters, kernels)
                self._cache.put(one.key, executed[one.name])
                self._progress.ended(one.name)

        names = [f"study {n}" for n in wanted] + [p.name for p in pages]
        with self._progress.over(names):
            async with asyncio.TaskGroup() as group:
                for name in wanted:
                    group.create_task(study(name))
                for one in pages:
                    group.create_task(page(one))
        self._cache.note_seconds(self._progress.seconds)
        return executed


def _cancel_when_stopped() -> asyncio.Event:
    """Let Ctrl-C and a termination cancel this task, so that it ends what it started; the event says that they did."""
    stopped = asyncio.Event()
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    if task is not None and threading.current_thread() is threading.main_thread():

        def stop() -> None:
            stopped.set()
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        # What a cancelled kernel's sockets complain of is no news.
        loop.set_exception_handler(lambda *_: None)
        # nbclient would put handlers in their place that stop one kernel and let the build go on.
        loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
        loop.remove_signal_handler = lambda sig: False  # type: ignore[method-assign]
    return stopped


def _data_sha256(root: Path) -> str:
    """Return a hash of all that pages read: the tables of facts, the frozen hypotheses, what was accepted, the traces."""
    traces = [Path(p) for p in [os.environ.get("STEPCAL_DATA", "")] if p and Path(p).is_dir()]
    facts = [root / "data", root / "book" / "preregistrations", root / "tests" / "acceptance.csv", *traces]
    return fingerprint.files_sha256(*[f for f in facts if f.exists()])


def _built(html: Path) -> str:
    try:
        return str(json.loads((html / _BUILT).read_text(encoding="utf-8"))["built"])
    except (OSError, ValueError, KeyError):
        return ""


def _first(group: BaseExceptionGroup[ReportError]) -> ReportError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
