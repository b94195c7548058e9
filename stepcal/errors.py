"""The errors that stepcal raises: each names the argument, the bad value, the bound, and the way out.

`InputError` is a `ValueError`, so that library users can catch it as they would expect to; the command line turns it
into exit status 2 with the message alone.
"""

from __future__ import annotations

import reprlib

_LONGEST_MESSAGE = 2_000


class StepcalError(Exception):
    """Base of every error that stepcal raises on purpose; no input can make its message long."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


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
_MOST_BITS = 14_000
"""Below 4,300 digits, which Python still writes out."""


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
        if value.bit_length() > _MOST_BITS:
            return "a whole number of thousands of digits"
        text = str(value)
        return f"{text[:_MOST_DIGITS]}... ({len(text.lstrip('-')):,} digits)"
    return _SHOWN.repr(value)
