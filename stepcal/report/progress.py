"""How far a build is: names, what is done in the order in which it ended, and the time left by how long it took last."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

UNKNOWN_PAGE_S = 10.0
"""Taken for a page that was never executed here."""


class BuildProgress:
    """A bar on a terminal, a line an event elsewhere; everything goes to standard error."""

    def __init__(self, last_seconds: Mapping[str, float], jobs: int) -> None:
        self._last = last_seconds
        self._jobs = jobs
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._running: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._waiting: list[str] = []
        self._bar: Progress | None = None
        self._task = 0

    @contextmanager
    def over(self, names: list[str]) -> Iterator[None]:
        """Show the progress over some tasks while the block runs."""
        self._waiting = list(names)
        if not self._console.is_terminal or not names:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("starting", total=len(names))
            yield
        self._bar = None

    def started(self, name: str) -> None:
        """Note that a task began."""
        self._waiting.remove(name)
        self._running[name] = time.perf_counter()
        self._show()

    def ended(self, name: str) -> None:
        """Note that a task ended, and say so."""
        took = time.perf_counter() - self._running.pop(name)
        self.seconds[name] = took
        self.say(f"  {name}: {took:.1f} s" + ("" if self._bar else f" ({self._left()})"))
        if self._bar:
            self._bar.advance(self._task)  # type: ignore[arg-type]
        self._show()

    def say(self, text: str) -> None:
        """Print a line."""
        if self._bar:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _left(self) -> str:
        now = time.perf_counter()
        rest = sum(self._last.get(name, UNKNOWN_PAGE_S) for name in self._waiting)
        rest += sum(max(1.0, self._last.get(n, UNKNOWN_PAGE_S) - (now - t)) for n, t in self._running.items())
        return f"about {rest / self._jobs:.0f} s left" if rest else "all executed"

    def _show(self) -> None:
        if self._bar:
            names = ", ".join(self._running) or "rendering"
            self._bar.update(self._task, description=f"{names}; {self._left()}")  # type: ignore[arg-type]
