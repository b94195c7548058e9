"""Figures of the book about one's own server: tables in, figures at two widths out."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from stepcal.report.figures.theme import COLOURS, FAINT, categories, drawn_twice, legend_above, panels


@drawn_twice
def signed_errors(narrow: bool, table: pd.DataFrame, columns: Sequence[str], *, limit_percent: float = 10.0) -> Figure:
    """Signed errors by run, a bar a statistic, with the limit within which they count as good.

    Parameters
    ----------
    narrow : bool
    table : DataFrame
        `run`, and the columns to draw (%).
    columns : sequence of str
    limit_percent : float
    """
    figure, (axes,) = panels(narrow, 0.45 * max(len(table), 2) + 1.0)
    height = 0.8 / len(columns)
    for i, (column, colour) in enumerate(zip(columns, COLOURS, strict=False)):
        place = [row + (i - (len(columns) - 1) / 2) * height for row in range(len(table))]
        axes.barh(place, table[column], height=height, color=colour, label=column)
    axes.axvline(0.0, color=FAINT, lw=1)
    for side in (-limit_percent, limit_percent):
        axes.axvline(side, color=FAINT, ls="--", lw=1)
    categories(axes, [str(run) for run in table["run"]])
    axes.set(xlabel=f"signed error (%); dashed: {limit_percent:g}%")
    legend_above(axes, columns=len(columns))
    return figure
