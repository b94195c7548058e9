"""Figures of the pages on measured kernels: tables in, figures at two widths out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stepcal.report.figures.theme import (
    COLOURS,
    FAINT,
    RULE,
    categories,
    drawn_twice,
    figure_legend,
    panels,
    plain_logarithm,
)
from stepcal.units import PERCENT

KERNEL_NAMES = {
    "gemm": "matrix products",
    "experts": "grouped experts",
    "decode_attention": "decode attention",
    "prefill_attention": "prefill attention",
}
SHOWN_GPUS = ("h100-sxm", "a100-80gb", "l40s", "b200")


@drawn_twice
def tables_against_fits(narrow: bool, samples: pd.DataFrame, *, precision: str = "bf16") -> Figure:
    """Measured against fitted times of each kernel, a GPU a colour.

    Parameters
    ----------
    narrow : bool
    samples : DataFrame
        Of `stepcal.studies.kernels.kernel_tables.samples`.
    precision : str
    """
    figure, rows = panels(narrow, 2.9, across=2, down=2)
    for axes, (kernel, name) in zip(rows, KERNEL_NAMES.items(), strict=True):
        own = samples[(samples["kernel"] == kernel) & (samples["precision"] == precision)]
        for gpu, colour in zip(SHOWN_GPUS, COLOURS, strict=False):
            here = own[own["gpu"] == gpu]
            axes.plot(here["fitted_us"], here["measured_us"], "o", ms=3, alpha=0.7, color=colour, label=gpu)
        ends = np.array([own["fitted_us"].min(), own["fitted_us"].max()])
        axes.plot(ends, ends, color=FAINT, lw=1)
        axes.set(xscale="log", yscale="log", xlabel="fitted (µs)", ylabel="measured (µs)", title=name)
        plain_logarithm(axes)
    figure_legend(figure, rows[0], columns=2 if narrow else 4)
    return figure


@drawn_twice
def intervals(narrow: bool, table: pd.DataFrame) -> Figure:
    """Predicted intervals of each run's mean E2E over the measurement, sorted by sample and group."""
    own = table.sort_values(["sample", "group", "experiment_id"]).reset_index(drop=True)
    figure, (axes,) = panels(narrow, 0.18 * len(own) + 1.2)
    for group, colour in zip(own["group"].unique(), COLOURS, strict=False):
        here = own[own["group"] == group]
        ratio, low, high = (here[c] / here["measured_ms"] for c in ("predicted_ms", "low_ms", "high_ms"))
        error = [ratio - low, high - ratio]
        axes.errorbar(ratio, here.index, xerr=error, fmt="o", ms=3, lw=1.2, color=colour, label=group)
    axes.axvline(1.0, color=FAINT, lw=1)
    categories(axes, list(own["experiment_id"]))
    axes.set(xlabel="predicted / measured mean E2E, with 95% interval")
    figure_legend(figure, axes, columns=2)
    return figure


@drawn_twice
def errors_of_rows(narrow: bool, rows: pd.DataFrame, *, band_percent: float = 10.0) -> Figure:
    """Predicted over measured TPOT and TTFT of benchmark rows, a dot a row, by model, GPU and precision.

    Parameters
    ----------
    narrow : bool
    rows : DataFrame
        Of the study ``silicon``: `model`, `gpu`, `precision`, `tpot_error_percent`, `ttft_error_percent`.
    band_percent : float
        Half the width of the band about one.
    """
    groups = list(rows.groupby(["model", "gpu", "precision"]))
    between = "\n" if narrow else ", "
    names = [f"{model}{between}{str(gpu).split('-')[0].upper()}, {precision}" for (model, gpu, precision), _ in groups]
    figure, both = panels(narrow, 0.42 * len(groups) + 0.9, across=2, share_x=True, share_y=True)
    for axes, metric in zip(both, ("tpot", "ttft"), strict=True):
        axes.axvspan(1 - band_percent / PERCENT, 1 + band_percent / PERCENT, color=RULE, lw=0, zorder=0)
        axes.axvline(1.0, color=FAINT, lw=1)
        for i, (_, own) in enumerate(groups):
            ratio = np.sort(1 + own[f"{metric}_error_percent"].dropna() / PERCENT)
            axes.plot(ratio, i + np.linspace(-0.25, 0.25, len(ratio)), "o", ms=3, alpha=0.6, color=COLOURS[0])
        axes.set(xscale="log", title=metric.upper(), xlabel="predicted / measured")
        plain_logarithm(axes)
        categories(axes, names)
    return figure
