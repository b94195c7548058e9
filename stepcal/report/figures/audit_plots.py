"""Figures of the label audit and of the rebuilt batches: tables in, figures at two widths out."""

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
    legend_above,
    panels,
    plain_logarithm,
)
from stepcal.units import US_PER_MS

US_PER_S = 1e6
POOLED = "pooled"
CONTENDED_FACTOR = 3.0
"""Times a run's smallest label a request above which a bin is left out: the offload pool is full there."""
MANY_POINTS = 400
"""A scatter shows every n-th point beyond so many: a vector figure keeps each of them."""


@drawn_twice
def label_and_interval(narrow: bool, by_running: pd.DataFrame) -> Figure:
    """Median and 10-90% band of the label and of the interval against the batch, a traced run a panel."""
    table = by_running[by_running["experiment_id"] != POOLED]
    runs = sorted(table["experiment_id"].unique())
    figure, axes = panels(narrow, 2.0 if narrow else 2.7, across=len(runs), share_y=True, share_x=narrow)
    for panel, run in zip(axes, runs, strict=True):
        for (quantity, name), colour in zip(
            {"interval": "interval between steps", "label": "the study's label"}.items(), COLOURS, strict=False
        ):
            own = table[(table["experiment_id"] == run) & (table["quantity"] == quantity)].sort_values("requests")
            panel.fill_between(own["requests"], own["p10_us"], own["p90_us"], color=colour, alpha=0.2, lw=0)
            panel.plot(own["requests"], own["median_us"], "o-", ms=4, color=colour, label=name)
        panel.set(yscale="log", title=short_name(run))
    for panel in axes[-1:] if narrow else axes:
        panel.set_xlabel("requests in the batch")
    axes[0].set_ylabel("µs")
    figure_legend(figure, axes[0], columns=1 if narrow else 2)
    return figure


@drawn_twice
def schedule_timing(narrow: bool, timing: pd.DataFrame, by_running: pd.DataFrame, *, at_most: float = 60) -> Figure:
    """``schedule()`` of the real vLLM, timed on a CPU, beside the median label of the public traces.

    Parameters
    ----------
    narrow : bool
    timing : DataFrame
        Recorded by ``tools/time_vllm_schedule.py``.
    by_running : DataFrame
        Of the label audit.
    at_most : float
        Requests up to which the label is shown; bins above `CONTENDED_FACTOR` are left out.
    """
    figure, (axes,) = panels(narrow, 3.2)
    alone = timing[(timing["waiting"] == 0) & (timing["busy_threads"] == 0)]
    for (function, own), colour in zip(alone.groupby("function", sort=True), (COLOURS[0], FAINT), strict=False):
        axes.fill_between(own["running"], own["p10_us"], own["p90_us"], color=colour, alpha=0.2, lw=0)
        axes.plot(own["running"], own["p50_us"], "-", color=colour, label=f"{function}(), our CPU, no GPU")
    labels = by_running[
        (by_running["quantity"] == "label")
        & (by_running["experiment_id"] != POOLED)
        & (by_running["requests"] <= at_most)
    ]
    for (run, own), colour, marker in zip(labels.groupby("experiment_id"), COLOURS[1:], "os^", strict=False):
        quiet = own[own["per_request_us"] < CONTENDED_FACTOR * own["per_request_us"].min()]
        name = f"label, {short_name(str(run))}"
        axes.plot(quiet["requests"], quiet["median_us"], marker, ms=6, color=colour, label=name)
    axes.set(xlabel="running requests, all decoding", ylabel="µs", xlim=(0, None), ylim=(0, None))
    legend_above(axes, columns=1 if narrow else 2)
    return figure


@drawn_twice
def label_by_run(narrow: bool, by_run: pd.DataFrame) -> Figure:
    """Label (median, 10-90%) and decode interval of all 16 runs."""
    table = by_run.sort_values(["overloaded", "label_median_us"], ascending=[True, True])
    y = np.arange(len(table))
    figure, (axes,) = panels(narrow, 4.4)
    error = np.vstack(
        [table["label_median_us"] - table["label_p10_us"], table["label_p90_us"] - table["label_median_us"]]
    )
    median, interval = table["label_median_us"] / US_PER_MS, table["interval_median_us"] / US_PER_MS
    axes.errorbar(median, y, xerr=error / US_PER_MS, fmt="o", ms=4, color=COLOURS[1], label="label (median, 10-90%)")
    axes.plot(interval, y, "D", ms=5, color=COLOURS[0], label="decode interval of requests")
    categories(
        axes,
        [short_name(r) + (" *" if o else "") for r, o in zip(table["experiment_id"], table["overloaded"], strict=True)],
    )
    axes.set(xscale="log", xlabel="ms (* overloaded)")
    plain_logarithm(axes)
    figure_legend(figure, axes, columns=1 if narrow else 2)
    return figure


@drawn_twice
def rebuilt_window(narrow: bool, window: pd.DataFrame) -> Figure:
    """Running queue around the change of load, as traced and as rebuilt from requests, a traced run a panel."""
    runs = sorted(window["experiment_id"].unique())
    figure, axes = panels(narrow, 1.7, down=len(runs))
    for panel, run in zip(axes, runs, strict=True):
        own = window[window["experiment_id"] == run]
        seconds = own["time_us"] / US_PER_S
        rebuilt = own["running_depth_rebuilt"]
        panel.step(seconds, rebuilt, where="post", lw=1, color=COLOURS[0], label="rebuilt from requests")
        panel.plot(seconds, own["running_depth_traced"], ".", ms=4, color=COLOURS[1], label="traced by the server")
        panel.set(title=short_name(run), ylabel="running")
    figure_legend(figure, axes[0], columns=1 if narrow else 2)
    axes[-1].set_xlabel("seconds since the first request")
    return figure


@drawn_twice
def rebuilt_blocks(narrow: bool, scatter: pd.DataFrame) -> Figure:
    """Cache blocks in use, rebuilt against traced, a traced run a colour."""
    figure, (axes,) = panels(narrow, 3.3)
    for (run, own), colour in zip(scatter.groupby("experiment_id"), COLOURS, strict=False):
        few = own.iloc[:: max(1, len(own) // MANY_POINTS)]
        name = short_name(str(run))
        axes.plot(few["kv_blocks_traced"], few["kv_blocks_rebuilt"], ".", ms=4, color=colour, label=name)
    top = float(scatter["kv_blocks_traced"].max())
    axes.plot([0, top], [0, top], color=FAINT, lw=1)
    axes.set(xlabel="KV blocks in use, traced", ylabel="rebuilt")
    legend_above(axes, columns=1 if narrow else 3)
    return figure


@drawn_twice
def overload(narrow: bool, table: pd.DataFrame) -> Figure:
    """Decoding and waiting requests of the overloaded runs over time; what rests on the assumption is dashed."""
    runs = sorted(table["experiment_id"].unique())
    figure, axes = panels(narrow, 1.9, across=2, down=(len(runs) + 1) // 2, share_y=True)
    for panel, run in zip(axes, runs, strict=False):
        own = table[table["experiment_id"] == run]
        panel.plot(own["time_s"], own["waiting"], color=COLOURS[2], label="waiting")
        panel.plot(own["time_s"], own["decoding_completed"], color=COLOURS[0], label="decoding, completed later")
        panel.plot(own["time_s"], own["decoding"], "--", color=COLOURS[1], label="decoding, with failed (assumed)")
        panel.set(title=short_name(run), yscale="symlog", ylim=(0, None))
    for panel in axes[len(runs) :]:
        panel.set_visible(False)
    for panel in axes[-1:] if narrow else axes[-2:]:
        panel.set_xlabel("seconds")
    axes[0].set_ylabel("requests")
    figure_legend(figure, axes[0], columns=1 if narrow else 3)
    return figure
