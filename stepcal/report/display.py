"""How tables, verdicts and provenance look on a page: HTML that a notebook displays, and the numbers that prose cites."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from myst_nb import glue

from stepcal.errors import InputError
from stepcal.evaluation.verdict import Verdict
from stepcal.report.figures.plots import short_name
from stepcal.report.figures.theme import Drawn, to_svg
from stepcal.studies.results.provenance import MEASURED, SIMULATED, Provenance
from stepcal.studies.study import Study
from stepcal.studies.summary import Badge

WORDS = {
    "success": {True: "met", False: "not met", None: "not evaluable"},
    "refuted_if": {True: "holds", False: "does not hold", None: "not evaluable"},
    "choice": {True: "yes", False: "no", None: "not evaluable"},
}
LONGEST_NAME = 40
"""Characters of a row's first cell up to which it stays on one line."""
FOLD_ROWS = 12
"""A longer table is folded: it is looked up, not read."""
HEADING_UNITS = {
    "_percent": "%",
    "_us": "µs",
    "_ms": "ms",
    "_gib": "GiB",
    "_nats": "nats",
    "_tokens": "tokens",
    "_steps": "steps",
    "_s": "s",
}
ABBREVIATIONS = {"e2e": "E2E", "ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "kv": "KV", "mape": "MAPE", "mspe": "MSPE"}
STUDY_TITLES = {
    "h1": "correlations of the components with the label",
    "h2": "fits to the label",
    "published_predictions": "published XGBoost predictions, scored again",
    "end_to_end": "latencies of all variants in the simulator",
    "label_audit": "the label against the clock",
    "reconstruction": "rebuilt batches",
    "offloading": "labels and an offload pool",
    "attribution": "labels crossed with models",
    "physical_model": "the physical model, calibrated and cross-validated",
    "physical_evidence": "evidence on the physical model's components",
    "ablations": "other data, more parameters, other forms",
    "transfer": "31 runs that nothing was fitted to",
}
"""What each study is about, for the line that says where a page's numbers come from."""


def provenance_note(*shown: Study | Provenance) -> HTML:
    """Return the line that says where a page's numbers come from, study by study; hashes are one click away.

    Parameters
    ----------
    *shown : Study or Provenance
        Everything that the page shows, in order.
    """
    boxes = []
    for one in shown:
        provenance, name = (one.provenance, one.name) if isinstance(one, Study) else (one, "")
        kind = {MEASURED: "note", SIMULATED: "simulated"}.get(provenance.kind, "recorded")
        what = f" {html.escape(STUDY_TITLES.get(name, name.replace('_', ' ')))}:" if name else ""
        boxes.append(
            f'<details class="provenance provenance-{kind}"><summary><strong>{html.escape(_capitalised(provenance.kind))}'
            f".</strong>{what} {html.escape(provenance.size())}</summary>"
            f"<p>{html.escape(provenance.sentence())}</p></details>"
        )
    return HTML("".join(boxes))


def simulated_note(text: str) -> HTML:
    """Return the box that marks a figure as simulated."""
    return HTML(f'<div class="provenance provenance-simulated"><strong>Simulated:</strong> {html.escape(text)}</div>')


def show_figure(figure: Drawn | Figure, caption: str, alt: str) -> HTML:
    """Return a figure for a page.

    Parameters
    ----------
    figure : Drawn or Figure
        At both widths, from a function of `stepcal.report.figures.plots`; a plain figure is shown at one.
    caption : str
        What to see in it.
    alt : str
        What is seen, for those who cannot: axes, marks, and what they do.
    """
    drawn = figure if isinstance(figure, Drawn) else Drawn(*[to_svg(figure)] * 2)
    return HTML(drawn.html(caption, alt))


def show_table(
    table: pd.DataFrame,
    caption: str,
    *,
    columns: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    fold: bool | None = None,
) -> HTML:
    """Return a table with a caption, without its index, with named columns and formatted numbers.

    Wide tables scroll below their caption and keep their first column. Long ones are folded to one line.

    Parameters
    ----------
    table : DataFrame
        Rows that hold nothing but missing numbers are left out.
    caption : str
    columns : mapping, optional
        What to show, in order: a column's name, and its heading and format in one text, such as ``"E2E (ms) {:,.0f}"``.
        Either may be left out. By default all columns. `experiment_id` shows experiments by their short names.
    formats : mapping, optional
        Format of each column by its name in `table`, such as ``"{:.1f}"``. Missing values show as a dash.
    names : mapping, optional
        Headings to show in place of column names; without one a name is spelled out with its unit.
    fold : bool, optional
        By default tables of more than `FOLD_ROWS` rows.
    """
    if columns is not None:
        table, formats, names = _chosen(table, columns)
    numeric = [c for c in table if pd.api.types.is_numeric_dtype(table[c]) and not pd.api.types.is_bool_dtype(table[c])]
    shown = table.dropna(how="all", subset=numeric) if numeric else table
    headings = {c: (names or {}).get(str(c), heading(str(c))) for c in table}
    head = "".join(f'<th scope="col"{_kind(c in numeric)}>{html.escape(headings[c])}</th>' for c in table)
    body = "".join(
        "<tr>"
        + "".join(
            _cell(row[i], (formats or {}).get(str(c)), numeric=c in numeric, first=i == 0) for i, c in enumerate(table)
        )
        + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    text = html.escape(caption)
    content = (
        f'<div class="table-scroll" role="region" aria-label="{text}"><table class="dataframe stepcal-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if len(shown) > FOLD_ROWS if fold is None else fold:
        return HTML(
            f'<details class="stepcal-fold"><summary>{text} <span class="fine-print">({len(shown)} rows)</span></summary>'
            f"{content}</details>"
        )
    return HTML(f'<figure class="stepcal-table-figure"><figcaption>{text}</figcaption>{content}</figure>')


def _chosen(table: pd.DataFrame, columns: Mapping[str, str]) -> tuple[pd.DataFrame, dict[str, str], dict[str, str]]:
    """Return the columns that were asked for, their formats and their headings."""
    missing = [c for c in columns if c not in table]
    if missing:
        raise InputError(f"`columns` names `{missing[0]}`; the table has {', '.join(map(str, table))}.")
    formats, names = {}, {}
    for column, text in columns.items():
        name, brace, pattern = text.partition("{")
        if name.strip():
            names[column] = name.strip()
        if brace:
            formats[column] = brace + pattern
    chosen = table[list(columns)]
    if "experiment_id" in chosen:
        chosen = chosen.assign(experiment_id=chosen["experiment_id"].map(short_name))
    return chosen, formats, names


def heading(name: str) -> str:
    """Return a column's name as a heading: words, and its unit in brackets.

    Examples
    --------
    >>> heading("e2e_error_percent")
    'E2E error (%)'
    """
    ending = next((e for e in HEADING_UNITS if name.endswith(e) and name != e.strip("_")), "")
    unit = f" ({HEADING_UNITS[ending]})" if ending else ""
    name = name.removesuffix(ending)
    words = [ABBREVIATIONS.get(word, word) for word in name.removesuffix("_id").split("_")]
    if words[0] == "n" and len(words) > 1:
        words = words[1:]
    return " ".join(words) + unit


def _cell(value: object, pattern: str | None, *, numeric: bool, first: bool) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    if missing:
        text = "–"
    elif isinstance(value, bool | np.bool_):
        text = "yes" if value else "no"
    else:
        text = html.escape(pattern.format(value) if pattern else str(value))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    if first and len(text) > LONGEST_NAME:  # a sentence, which wraps
        return f'<th scope="row" class="text">{text}</th>'
    return f'<th scope="row">{text}</th>' if first else f"<td{_kind(numeric)}>{text}</td>"


def _kind(numeric: bool) -> str:
    return ' class="number"' if numeric else ' class="text"'


def estimates_table(study: Study, variant: str) -> HTML:
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
        f'<div class="table-scroll" role="region" aria-label="Criteria of {p.id.upper()}">'
        f'<table class="dataframe stepcal-table"><thead><tr><th>Criterion</th><th>Outcome</th><th>Evidence</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{possible}"
        f"<details class='fine-print'><summary>{html.escape(f'{_capitalised(p.standing)}. {p.status_note}')}</summary>"
        f"Pre-registration {p.sha256[:12]}, frozen {p.frozen}. Evidence: {html.escape(provenance.brief())}.</details></div>"
    )


def badges_row(badges: Sequence[Badge]) -> HTML:
    """Return the verdicts of the first page, a badge each with what it can show."""
    items = "".join(
        f'<li><span class="verdict verdict-{b.verdict.lower().replace(" ", "-")}">{b.id}: {html.escape(b.verdict)}</span> '
        f"{html.escape(b.words)}<small>{html.escape(b.status)}</small></li>"
        for b in badges
    )
    return HTML(f'<ul class="badges">{items}</ul>')


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def glue_numbers(numbers: Mapping[str, object]) -> None:
    """Give numbers and words to the prose, which cites them by name; nothing is displayed."""
    for name, value in numbers.items():
        # numpy scalars print as `np.float64(1.0)`, which prose cannot format.
        glue(name, value.item() if isinstance(value, np.generic) else value, display=False)
