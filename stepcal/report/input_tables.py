"""The tables of the page on inputs, written from the code that reads them: ``python -m stepcal.report.input_tables``.

The page keeps its prose; what stands between two markers is replaced. A test holds the page and the code together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stepcal.datasets.request_traces import DATE_TIME, FORMATS
from stepcal.experiments.vllm_flags import ACTING, NOTED, REFUSED
from stepcal.simulator.load.inference_perf_fields import FIELDS, FIXED
from stepcal.specs.config_keys import MUST_BE_OFF, REFUSED_TYPES
from stepcal.specs.model_types import MODEL_TYPES, MULTIMODAL_TYPES

PAGE = Path("book") / "inputs.md"
_UNITS = {1e-3: "ns", 1.0: "µs", 1e3: "ms", 1e6: "s", DATE_TIME: "date"}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def models() -> str:
    """Which model types are accepted, and with what to know."""
    rows = []
    for name, kind in MODEL_TYPES.items():
        notes = []
        if kind.window:
            notes.append(
                "windows, where the file has one" if kind.window == "all" else "windows of the layers that it names"
            )
        if kind.mixture is not None:
            notes.append("mixture of experts")
        rows.append((kind.family, f"`{name}`", "; ".join(notes) or "full attention"))
    rows += [
        (family, f"`{name}`", "the vision tower is left out, and a note says so")
        for name, (family, _) in MULTIMODAL_TYPES.items()
    ]
    return table(("family", "`model_type`", "accepted"), sorted(rows, key=lambda row: row[0].lower()))


def refused_models() -> str:
    """Which model types are refused, and why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED_TYPES.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    for key, reason in MUST_BE_OFF.items():
        by_reason.setdefault(reason, []).append(f"`{key}`")
    return table(
        ("why", "`model_type`, or a key that has a value"), ((why, ", ".join(n)) for why, n in by_reason.items())
    )


def inference_perf() -> str:
    """What the fields of inference-perf mean, since which release, and what is done with each."""
    rows = []
    for field in FIELDS:
        name = f"{field.section}.{field.name}" if field.section else field.name
        allowed = ", ".join(f"`{value}`" for value in field.values)
        treatment = (
            f"null{f', {allowed}' if allowed else ''}; else refused" if field.treatment == FIXED else field.treatment
        )
        rows.append((f"`{name}`", field.since, field.meaning, treatment))
    return table(("field", "since", "meaning", "what we do"), rows)


def flags() -> str:
    """Which flags of vLLM act, which are refused, which are noted."""
    rows = [(f"`{name}`", "acts", "") for name in sorted(ACTING)]
    rows += [(f"`{name}`", "refused unless off", what) for name, (_, what) in REFUSED.items()]
    rows += [(f"`{name}`", "noted", what) for name, (_, what) in NOTED.items()]
    return table(("flag", "what we do", "why"), rows)


def traces() -> str:
    """Formats of traces, and the columns by which they are known."""
    rows = []
    for name, known in FORMATS.items():
        arrivals = ", ".join(f"`{column}` ({_UNITS[unit]})" for column, unit in known.arrival.items())
        lengths = " and ".join(" or ".join(f"`{c}`" for c in names) for names in (known.prompt, known.output))
        rows.append((f"`{name}`", arrivals, lengths, f"`{known.blocks}`" if known.blocks else ""))
    return table(("`--format`", "arrival", "prompt and output tokens", "shared prefixes"), rows)


TABLES = {
    "models": models,
    "refused models": refused_models,
    "inference-perf": inference_perf,
    "flags": flags,
    "traces": traces,
}


def with_tables(page: str) -> str:
    """Return the page with its tables as the code has them now."""
    return filled(page, TABLES)


def filled(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return a page with some tables, by their names, between their markers."""
    for name, make in tables.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
        page = marked.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[3]}", page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
