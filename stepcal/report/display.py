"""How tables, verdicts and provenance look on a page: HTML that a notebook displays, and the numbers that prose cites."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from myst_nb import glue
from pandas.io.formats.style import Styler

from stepcal.evaluation.preregistration import PreRegistration
from stepcal.evaluation.verdict import Verdict
from stepcal.studies.provenance import MEASURED, SIMULATED, Provenance
from stepcal.studies.study import Study

WORDS = {
    "success": {True: "met", False: "not met", None: "not evaluable"},
    "refuted_if": {True: "holds", False: "does not hold", None: "not evaluable"},
    "choice": {True: "yes", False: "no", None: "not evaluable"},
}


def provenance_note(provenance: Provenance) -> HTML:
    """Return the box that tells whether a page shows measured, recorded or simulated data."""
    kind = {MEASURED: "note", SIMULATED: "simulated"}.get(provenance.kind, "recorded")
    return HTML(
        f'<div class="provenance provenance-{kind}"><strong>{html.escape(provenance.kind.capitalize())}.</strong> '
        f"{html.escape(provenance.sentence())}</div>"
    )


def simulated_note(text: str) -> HTML:
    """Return the box that marks a figure as simulated."""
    return HTML(f'<div class="provenance provenance-simulated"><strong>Simulated:</strong> {html.escape(text)}</div>')


def show_table(
    table: pd.DataFrame,
    caption: str,
    *,
    formats: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> Styler:
    """Return a table with a caption, without its index, with named columns and formatted numbers.

    Parameters
    ----------
    table : DataFrame
    caption : str
    formats : mapping, optional
        Format of each column by its name in `table`, such as ``"{:.1f}"``. Missing values show as a dash.
    names : mapping, optional
        Headings to show in place of column names.
    """
    shown = table.rename(columns=dict(names or {}))
    renamed: Any = {(names or {}).get(column, column): f for column, f in (formats or {}).items() if column in table}
    style = shown.style.format(renamed, na_rep="–").hide(axis="index").set_caption(caption)
    words = [column for column in shown if not pd.api.types.is_numeric_dtype(shown[column])]
    style = style.set_properties(subset=words, **{"text-align": "left"})
    style = style.apply_index(lambda names: ["text-align: left" if n in words else "" for n in names], axis="columns")
    return style.set_table_attributes('class="dataframe stepcal-table"')


def estimates_table(study: Study, variant: str) -> Styler:
    """Return what a variant learned: each parameter with its interval or the reason why it has none, then the quotients."""

    def interval(row: pd.Series) -> str:
        return f"{row['low']:.3g} to {row['high']:.3g}" if pd.notna(row["low"]) else "–"

    parameters, combinations = (t[t["variant"] == variant] for t in (study["parameters"], study["combinations"]))
    rows = pd.concat([parameters, combinations[combinations["identified"]]])
    value = rows["value"].map("{:.4g}".format).where(rows["identified"], "–")
    table = pd.DataFrame(
        {
            "parameter": rows["name"],
            "unit": rows["unit"].replace({"us": "µs", "1": ""}),
            "value": value,
            "95% interval": rows.apply(interval, axis=1),
            "note": rows["reason"].where(rows["identified"], "not identified: " + rows["reason"].astype(str)),
        }
    )
    return show_table(table, f"{variant}: parameters, then the combinations that the data determine")


def standing(p: PreRegistration) -> str:
    """Return what a hypothesis can show: its status, and who set what, when.

    A hypothesis that is older than the day its file was frozen had its thresholds set by others; our readings came later.
    """
    if p.status == "confirmatory" and p.date < p.frozen:
        return "the study's thresholds, our readings, after exploration"
    return p.status


def verdict_card(verdict: Verdict, provenance: Provenance) -> HTML:
    """Return a verdict with its criteria, evidence and pre-registration as a card."""
    p = verdict.preregistration
    css = verdict.verdict.lower().replace(" ", "-")
    rows = "".join(
        f"<tr><td>{'Refuted if ' if r.role == 'refuted_if' else ''}{html.escape(r.criterion.statement)}</td>"
        f"<td><strong>{WORDS[r.role][r.met]}</strong></td><td>{html.escape(r.evidence)}</td></tr>"
        for r in verdict.criteria
    )
    possible = (
        f"<p>The missing values could still make it: {', '.join(verdict.possible)}.</p>"
        if len(verdict.possible) > 1
        else ""
    )
    return HTML(
        f'<div class="verdict-card"><p><span class="verdict verdict-{css}">{verdict.verdict}</span> '
        f"<strong>{p.id.upper()}</strong> {html.escape(p.title)}</p>"
        f'<table class="dataframe stepcal-table"><thead><tr><th>Criterion</th><th>Outcome</th><th>Evidence</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>{possible}"
        f"<p class='fine-print'>{html.escape(_capitalised(standing(p)))}. {html.escape(p.status_note)} "
        f"Pre-registration {p.sha256[:12]}, frozen {p.frozen}. Evidence: {html.escape(provenance.brief())}.</p></div>"
    )


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def glue_numbers(numbers: Mapping[str, object]) -> None:
    """Give numbers and words to the prose, which cites them by name; nothing is displayed."""
    for name, value in numbers.items():
        # numpy scalars print as `np.float64(1.0)`, which prose cannot format.
        glue(name, value.item() if isinstance(value, np.generic) else value, display=False)
