"""Figures of the pages on the 31 runs that nothing was fitted to: tables in, matplotlib figures out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stepcal.report.plots import PALETTE, _finished


def errors_by_group(table: pd.DataFrame, *, bound_percent: float = 10.0) -> Figure:
    """Signed error of each run's mean E2E, sorted within what the runs have in common.

    Parameters
    ----------
    table : DataFrame
        `experiment_id`, `group`, `e2e` (percent).
    bound_percent : float
        Drawn as two dashed lines.
    """
    order = table.groupby("group")["e2e"].mean().sort_values().index
    figure, axes = plt.subplots(figsize=(8.5, 6.5))
    position = 0
    ticks: list[int] = []
    labels: list[str] = []
    for group, colour in zip(order, sns.color_palette(PALETTE), strict=False):
        own = table[table["group"] == group].sort_values("e2e")
        rows = range(position, position + len(own))
        axes.barh(rows, own["e2e"], color=colour, label=f"{group} ({len(own)})")
        ticks += rows
        labels += list(own["experiment_id"])
        position += len(own)
    for bound in (-bound_percent, bound_percent):
        axes.axvline(bound, color="0.3", ls="--", lw=1)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set(xlabel="signed error of mean E2E (%), whole run", title="The errors have something in common")
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    return _finished(figure)
