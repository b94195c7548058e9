"""What all commands share: expected errors become one line and exit status 2, results become text and JSON."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from stepcal.errors import StepcalError
from stepcal.files import write_atomically

P = ParamSpec("P")
R = TypeVar("R")
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file, or `-` for standard output.")
]


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an expected error into its message and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except StepcalError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        except MemoryError as error:
            typer.echo(f"Error: not enough memory. {error}. Give smaller limits or fewer requests.", err=True)
            raise typer.Exit(2) from None

    return wrapped


def emit(result: dict[str, Any], json_out: str | None, text: str) -> None:
    """Print the text to standard error, and the JSON where it was asked for."""
    typer.echo(text, err=True)
    if json_out is None:
        return
    serialised = json.dumps(without_nan(result), indent=2, allow_nan=False) + "\n"
    if json_out == "-":
        typer.echo(serialised, nl=False)
    else:
        write_atomically(Path(json_out), serialised)


def without_nan(value: Any) -> Any:
    """Return a value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
