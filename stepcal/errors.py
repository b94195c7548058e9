"""The errors that stepcal raises: each names the argument, the bad value, the bound, and the way out.

`InputError` is a `ValueError`, so that library users can catch it as they would expect to; the command line turns it
into exit status 2 with the message alone.
"""

from __future__ import annotations


class StepcalError(Exception):
    """Base of every error that stepcal raises on purpose."""


class InputError(StepcalError, ValueError):
    """An argument, a file or a row that cannot be used. Nothing was computed and nothing was written."""


class NotModelledError(InputError):
    """A server or model that asks for what the simulator does not model. Its message names the setting."""


class MissingDataError(StepcalError, FileNotFoundError):
    """A trace that is not shipped was not found. The message says where it was looked for and how to get it."""
