"""Figures of the pages on the 31 runs that nothing was fitted to: tables in, figures at two widths out."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from stepcal.report.figures.theme import (
    COLOURS,
    FAINT,
    categories,
    drawn_twice,
    figure_legend,
    panels,
)


@drawn_twice
def errors_by_group(narrow: bool, table: pd.DataFrame, *, bound_percent: float = 10.0) -> Figure:
    """Signed error of each run's mean E2E, sorted within what the runs have in common.

    Parameters
    ----------
    narrow : bool
    table : DataFrame
        `experiment_id`, `group`, `e2e` (percent).
    bound_percent : float
        Drawn as two dashed lines.
    """
    order = table.groupby("group")["e2e"].mean().sort_values().index
    figure, (axes,) = panels(narrow, 0.2 * len(table) + 1.2)
    labels: list[str] = []
    for group, colour in zip(order, COLOURS, strict=False):
        own = table[table["group"] == group].sort_values("e2e")
        axes.barh(range(len(labels), len(labels) + len(own)), own["e2e"], color=colour, label=f"{group} ({len(own)})")
        labels += list(own["experiment_id"])
    for bound in (-bound_percent, bound_percent):
        axes.axvline(bound, color=FAINT, ls="--", lw=1)
    categories(axes, labels)
    axes.set(xlabel=f"signed error of mean E2E (%); dashed: {bound_percent:g}%")
    figure_legend(figure, axes, columns=1 if narrow else 2)
    return figure
