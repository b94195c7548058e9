"""What all commands share: errors become one line and an exit status, results become text and JSON.

Exit status 0 done, 1 a finding, 2 bad input, 70 a bug of stepcal (``EX_SOFTWARE`` of sysexits.h), 130 interrupted.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from stepcal.errors import InputError, StepcalError
from stepcal.files import write_atomically

P = ParamSpec("P")
R = TypeVar("R")
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file, or `-` for standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No tables, notes or progress bars: errors only.")]

FOUND, BAD_INPUT, BUG, INTERRUPTED = 1, 2, 70, 130
TRACEBACK_VARIABLE = "STEPCAL_TRACEBACK"
SHOW_BAR_AFTER_S = 2.0
"""Work below this needs no progress bar."""
_LONGEST_MESSAGE = 2_000
_state = {"quiet": False}


def reports_errors(command: Callable[P, R]) -> Callable[..., R]:
    """Turn every error into its message and exit status, and give the command the option ``--quiet``."""

    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool = False, **kwargs: Any) -> R:
        _state["quiet"] = quiet
        if quiet:
            logging.getLogger("stepcal").setLevel(logging.WARNING)
        try:
            return command(*args, **kwargs)
        except StepcalError as error:
            _fail(str(error), BAD_INPUT)
        except MemoryError as error:
            _fail(f"not enough memory. {error}. Give smaller limits or fewer requests.", BAD_INPUT)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written.", INTERRUPTED)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}. Check the path and its permissions.", BAD_INPUT)
        except Exception as error:
            if isinstance(error, typer.Exit) or type(error).__module__.startswith(("click", "typer")):
                raise  # what the command line itself says, such as an unknown option
            _fail(_bug_report(error), BUG)
        finally:
            _state["quiet"] = False
        raise AssertionError("unreachable")

    signature = inspect.signature(command, eval_str=True)
    switch = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    parameters = [*signature.parameters.values(), switch]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def is_quiet() -> bool:
    """Whether the running command was asked to say nothing but errors."""
    return _state["quiet"]


def say(text: str) -> None:
    """Print to standard error, unless the command is quiet."""
    if text and not is_quiet():
        typer.echo(text, err=True)


def progress_options() -> dict[str, Any]:
    """Options of a tqdm bar: on standard error of a terminal only, once work lasts, and never if quiet."""
    is_hidden = is_quiet() or not sys.stderr.isatty()
    return {"disable": is_hidden, "delay": SHOW_BAR_AFTER_S, "leave": False, "file": sys.stderr}


def emit(result: dict[str, Any], json_out: str | None, text: str) -> None:
    """Print the text to standard error, and the JSON where it was asked for."""
    say(text)
    if json_out is None:
        return
    serialised = json.dumps(without_nan(result), indent=2, allow_nan=False) + "\n"
    if json_out != "-":
        write_atomically(Path(json_out), serialised)
        return
    try:
        sys.stdout.write(serialised)
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered cannot be written either; without this the interpreter complains once more at its end.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise InputError(f"Cannot write to standard output: {error.strerror}.") from None


def aligned(rows: Sequence[Sequence[str]], *, n_left: int = 1) -> list[str]:
    """Return lines of a table whose columns are as wide as their widest cell.

    Parameters
    ----------
    rows : sequence of sequences of str
        Of equal length.
    n_left : int
        Columns that are flush left; the others are flush right, two spaces apart.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < n_left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def without_nan(value: Any) -> Any:
    """Return a value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(message: str, status: int) -> None:
    """Print one error and leave."""
    cut = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(f"{typer.style('Error:', fg='red') if coloured else 'Error:'} {cut}", err=True)
    raise typer.Exit(status) from None


def _bug_report(error: Exception) -> str:
    """What to say of an error that nobody foresaw, and where it came from."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{os.sep}stepcal{os.sep}" in f.filename and f.filename != __file__] or frames
    place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else "an unknown place"
    said = " ".join(str(error).split())[:300]
    return (
        f"this is a bug of stepcal: {type(error).__name__} in {place}: {said}. Nothing was written. Please report it to the "
        f"authors with the command and its input ({TRACEBACK_VARIABLE}=1 shows where it happened)."
    )
