"""The parameters of all pages: one name, one type, one meaning and one check, whichever page takes it.

A page's first cell assigns its defaults; papermill, or ``stepcal report --set``, replaces them. The next cell calls
`check_parameters` with the page's names, before anything is computed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from stepcal.errors import InputError

MEASURED_OR_SIMULATED = ("measured", "simulated")
_NOT_PARAMETERS = {"In", "Out", "exit", "quit", "open", "get_ipython"}
"""What IPython itself puts into the namespace of a notebook."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of pages.

    Attributes
    ----------
    type : str
        As papermill's ``--help-notebook`` shows it.
    meaning : str
        With its unit and its bounds.
    problem : callable
        Takes a value, returns what is wrong with it, or an empty string.
    """

    type: str
    meaning: str
    problem: Callable[[object], str]


def _whole(low: int, high: int, *, none: bool = False) -> Callable[[object], str]:
    def problem(value: object) -> str:
        if none and value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, int):
            return f"is not a whole number{' or None' if none else ''}"
        return "" if low <= value <= high else f"lies outside of {low:,} to {high:,}"

    return problem


def _number(low: float, high: float, *, none: bool = False) -> Callable[[object], str]:
    def problem(value: object) -> str:
        if none and value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "is not a number"
        return "" if low < value < high else f"is not between {low:g} and {high:g}, both excluded"

    return problem


def _choice(names: Callable[[], tuple[str, ...]], *, none: bool = False) -> Callable[[object], str]:
    def problem(value: object) -> str:
        if none and value is None:
            return ""
        known = names()
        if value in known:
            return ""
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        return f"is unknown{f'; did you mean `{near[0]}`?' if near else ''} (one of {', '.join(known)})"

    return problem


def _text(value: object) -> str:
    return "" if isinstance(value, str) and value else "is not a text"


def _folder(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | Path):
        return "is not a path"
    return "" if Path(value).expanduser().is_dir() else "is not a folder that exists"


def _experiments(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return "is not a text; separate experiments by commas"
    problems = (_choice(_experiment_ids)(name.strip()) for name in value.split(","))
    return next((p for p in problems if p), "")


def _experiment_ids() -> tuple[str, ...]:
    from stepcal.datasets import experiments

    return tuple(experiments()["experiment_id"])


def _accelerators() -> tuple[str, ...]:
    from stepcal.specs.hardware import accelerators

    return tuple(accelerators())


PARAMETERS: dict[str, Parameter] = {
    "source": Parameter(
        "str",
        "measured, or simulated: invented rows that exercise the page and say so",
        _choice(lambda: MEASURED_OR_SIMULATED),
    ),
    "data": Parameter("str", "folder with the traces; None takes STEPCAL_DATA", _folder),
    "folder": Parameter("str", "folder that `stepcal ingest` wrote, with an exp-config.yaml", _folder),
    "coefficients": Parameter("str", "coefficients by name, or a coefficient file", _text),
    "seed": Parameter("int", "of everything random on the page; 0 to 4,294,967,295", _whole(0, 2**32 - 1)),
    "n_resamples": Parameter("int", "of the block bootstrap; 20 to 100,000", _whole(20, 100_000)),
    "n_seeds": Parameter("int", "simulated servers of each kind; 2 to 200", _whole(2, 200)),
    "train_share": Parameter("float", "share of each run that trains, first in time", _number(0, 1)),
    "valid_share": Parameter("float", "share that validates, next in time; the rest tests", _number(0, 1)),
    "only_experiments": Parameter("str", "experiments by name, separated by commas; None takes all", _experiments),
    "experiment_id": Parameter("str", "one of the 16 experiments", _choice(_experiment_ids)),
    "experiments": Parameter("str", "folder of new experiments; None has none", _folder),
    "kv_blocks": Parameter(
        "int", "KV blocks of the server; None takes the experiment's own", _whole(2, 10**8, none=True)
    ),
    "pool_gib": Parameter("float", "offload pool in CPU memory (GiB)", _number(0, 10_000)),
    "limit_percent": Parameter("float", "error that counts as good (%), drawn and counted", _number(0, 1000)),
    "accelerator": Parameter("str", "GPU of experiments that do not name theirs", _choice(_accelerators, none=True)),
}
"""Every parameter of every page."""


def check_parameters(namespace: Mapping[str, object], *names: str) -> dict[str, object]:
    """Check a page's parameters, and that nothing else was passed.

    Parameters
    ----------
    namespace : mapping
        The notebook's ``globals()``, right after its parameters and imports.
    *names : str
        The parameters that the page takes.

    Returns
    -------
    dict
        The values by name.

    Raises
    ------
    InputError
        If a value is out of bounds, shares leave no test split, or a parameter was passed that the page does not take.

    Examples
    --------
    >>> check_parameters({"seed": 3}, "seed")
    {'seed': 3}
    >>> check_parameters({"seed": 0, "sede": 3}, "seed")
    Traceback (most recent call last):
    stepcal.errors.InputError: This page takes no parameter `sede`; did you mean `seed`? It takes: seed.
    """
    for name in _passed(namespace):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else "."
            raise InputError(f"This page takes no parameter `{name}`{hint} It takes: {', '.join(names)}.")
    values = {name: namespace[name] for name in names}
    for name, value in values.items():
        check_value(name, value)
    shares = [v for n, v in values.items() if n in {"train_share", "valid_share"} and isinstance(v, int | float)]
    if sum(shares) >= 1:
        raise InputError(
            f"`train_share` + `valid_share` = {sum(shares):g} leaves nothing to test on. Their sum must be below 1."
        )
    return values


def experiment_names(only_experiments: str | None) -> tuple[str, ...]:
    """Return the experiments that a page's `only_experiments` names, which is empty for all of them.

    Examples
    --------
    >>> experiment_names("a, b")
    ('a', 'b')
    >>> experiment_names(None)
    ()
    """
    return tuple(name.strip() for name in only_experiments.split(",")) if only_experiments else ()


def check_value(name: str, value: object) -> None:
    """Check one value.

    Raises
    ------
    InputError
        If the parameter is unknown to all pages, or the value is out of its bounds.
    """
    if name not in PARAMETERS:
        near = difflib.get_close_matches(name, PARAMETERS, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else "."
        raise InputError(f"No page takes a parameter `{name}`{hint} Parameters: {', '.join(PARAMETERS)}.")
    problem = PARAMETERS[name].problem(value)
    if problem:
        raise InputError(f"`{name}={value!r}` {problem}. It is {PARAMETERS[name].meaning}.")


def parse_setting(text: str) -> tuple[str, object]:
    """Read ``name=value`` as the command line passes it, by the parameter's type.

    Raises
    ------
    InputError
        If there is no ``=``, the name is unknown, or the value does not fit.

    Examples
    --------
    >>> parse_setting("seed=3")
    ('seed', 3)
    """
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals:
        raise InputError(f"`--set {text}` is no setting: write name=value, such as `--set seed=1`.")
    parsed: object = value
    kind = PARAMETERS[name].type if name in PARAMETERS else "str"
    if value == "None":
        parsed = None
    elif kind in {"int", "float"}:
        try:
            parsed = int(value) if kind == "int" else float(value)
        except ValueError:
            parsed = value
    check_value(name, parsed)
    return name, parsed


def _passed(namespace: Mapping[str, object]) -> list[str]:
    """Return the names that may be parameters: not IPython's own, no constants, and nothing that was imported."""
    return [
        name
        for name, value in namespace.items()
        if not (name.startswith("_") or name.isupper() or name in _NOT_PARAMETERS)
        and not (isinstance(value, ModuleType) or callable(value))
    ]
