"""The errors that stepcal raises: each names the argument, the bad value, the bound, and the way out.

`InputError` is a `ValueError`, so that library users can catch it as they would expect to; the command line turns it
into exit status 2 with the message alone.
"""

from __future__ import annotations

import reprlib


class StepcalError(Exception):
    """Base of every error that stepcal raises on purpose."""


class InputError(StepcalError, ValueError):
    """An argument, a file or a row that cannot be used. Nothing was computed and nothing was written."""


class NotModelledError(InputError):
    """A server or model that asks for what the simulator does not model. Its message names the setting."""


class MissingDataError(StepcalError, FileNotFoundError):
    """A trace that is not shipped was not found. The message says where it was looked for and how to get it."""


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict, _SHOWN.maxtuple = 2, 4, 4, 4
_SHOWN.maxstring = _SHOWN.maxother = 80
_MOST_DIGITS = 30


def shown(value: object) -> str:
    """Return a value as an error shows it: its `repr`, cut so that no input can make a message long.

    Examples
    --------
    >>> shown("llama"), shown([0] * 1000)
    ("'llama'", '[0, 0, 0, 0, ...]')
    """
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():  # a NumPy scalar
        value = item()
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_MOST_DIGITS:
        return f"a whole number of more than {_MOST_DIGITS} digits"
    return _SHOWN.repr(value)
