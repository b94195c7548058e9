"""Work on several threads, for what releases Python's lock, as the simulator's loop does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int = 1) -> list[Result]:
    """Apply a function to all items.

    Parameters
    ----------
    function : callable
        Called from several threads at a time; it changes nothing that others see.
    items : iterable
    workers : int
        Threads; 1 stays in this one.

    Returns
    -------
    list
        Results in the order of the items, whichever was done first.

    Raises
    ------
    Exception
        Whatever the function raises first, in the order of the items.
    """
    if workers <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
