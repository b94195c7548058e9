"""Figures that show what there is: the runs as measured, and how far recomputed results lie from recorded ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stepcal.report.figures.plots import short_name
from stepcal.report.figures.theme import (
    COLOURS,
    FAINT,
    categories,
    drawn_twice,
    figure_legend,
    panels,
    plain_logarithm,
)
from stepcal.units import MS_PER_S

SMALLEST_SHARE = 1e-12
"""Differences below are drawn here: a logarithmic axis has no zero."""


@drawn_twice
def measured_latencies(narrow: bool, runs: pd.DataFrame) -> Figure:
    """Measured mean and 99th percentile of E2E of every run, the overloaded ones told apart.

    Parameters
    ----------
    narrow : bool
    runs : DataFrame
        `experiment_id`, `overloaded`, `e2e_mean`, `e2e_p99` (ms).
    """
    own = runs.sort_values(["overloaded", "e2e_mean"]).reset_index(drop=True)
    figure, (axes,) = panels(narrow, 0.24 * len(own) + 1.2)
    for is_overloaded, name, colour, marker in (
        (False, "keeps up", COLOURS[0], "o"),
        (True, "overloaded", COLOURS[1], "D"),
    ):
        rows = own[own["overloaded"] == is_overloaded]
        mean, p99 = rows["e2e_mean"] / MS_PER_S, rows["e2e_p99"] / MS_PER_S
        axes.hlines(rows.index, mean, p99, color=colour, lw=1.4)
        axes.plot(mean, rows.index, marker, ms=5.5, color=colour, label=f"{name}: mean")
        axes.plot(p99, rows.index, "|", ms=9, mew=1.6, color=colour)
    axes.plot([], [], "|", ms=9, mew=1.6, color=FAINT, label="99th percentile")
    categories(axes, [short_name(str(name)) for name in own["experiment_id"]])
    axes.set(xscale="log", xlabel="measured E2E of completed requests (s)")
    plain_logarithm(axes)
    figure_legend(figure, axes, columns=1 if narrow else 3)
    return figure


@drawn_twice
def machine_differences(narrow: bool, machines: pd.DataFrame) -> Figure:
    """Largest difference from the recordings in each setting, in units of its tolerance, on a logarithmic axis.

    Parameters
    ----------
    narrow : bool
    machines : DataFrame
        Of `stepcal.studies.results.tolerances.machines_table`.
    """
    own = machines.reset_index(drop=True)
    figure, (axes,) = panels(narrow, 0.34 * len(own) + 0.9)
    size = np.maximum(own["largest_difference"], SMALLEST_SHARE)
    axes.hlines(own.index, SMALLEST_SHARE, size, color=COLOURS[0], lw=1.2)
    axes.plot(size, own.index, "o", ms=6, color=COLOURS[0])
    for i, difference in enumerate(own["largest_difference"]):
        text = f"{difference:.1g}" if difference else "none"
        axes.annotate(text, (max(difference, SMALLEST_SHARE), i), textcoords="offset points", xytext=(7, -3))
    axes.axvline(1.0, color=FAINT, ls="--", lw=1)
    rows = zip(own["setting"], own["studies"], strict=True)
    categories(axes, [f"{setting} ({len(str(studies).split())})" for setting, studies in rows])
    axes.set(xscale="log", xlim=(SMALLEST_SHARE / 2, 30), xlabel="difference / tolerance; dashed: the tolerance")
    axes.grid(axis="y", visible=False)
    return figure
