"""How the simulator's functions are compiled."""

from typing import Any

from numba import njit

# None of them allocates, so none needs numba's reference counts, which are atomic and cost more than all the rest
# together.
_OPTIONS: dict[str, Any] = {"_nrt": False, "error_model": "numpy"}

# Functions that are called once or rarely.
compiled = njit(**_OPTIONS)

# Functions of the hot path become part of their callers: passing all the arrays of a run costs more than what most of
# them do.
inlined = njit(forceinline=True, **_OPTIONS)

# The entry point, cached on disk. It touches nothing but the arrays of one run, so it needs no lock of Python's: runs
# in several threads are simulated side by side.
cached = njit(cache=True, nogil=True, **_OPTIONS)
