"""Figures of the label audit and of the rebuilt batches: tables in, matplotlib figures out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stepcal.report.plots import PALETTE, WIDE, _finished, _legend_outside, short_name
from stepcal.units import US_PER_MS, US_PER_S

POOLED = "pooled"
CONTENDED_FACTOR = 3.0
"""Times a run's smallest label a request above which a bin is left out: the offload pool is full there."""


def label_and_interval(by_running: pd.DataFrame) -> Figure:
    """Median and 10-90% band of the label and of the interval against the batch, a traced run a panel."""
    table = by_running[by_running["experiment_id"] != POOLED]
    runs = sorted(table["experiment_id"].unique())
    figure, panels = plt.subplots(1, len(runs), figsize=(10, 3.8), sharey=True, squeeze=False)
    for axes, run in zip(panels[0], runs, strict=True):
        for (quantity, name), colour in zip(
            {"interval": "interval between steps", "label": "step.duration_us"}.items(),
            sns.color_palette(PALETTE),
            strict=False,
        ):
            own = table[(table["experiment_id"] == run) & (table["quantity"] == quantity)].sort_values("requests")
            axes.fill_between(own["requests"], own["p10_us"], own["p90_us"], color=colour, alpha=0.2, lw=0)
            axes.plot(own["requests"], own["median_us"], "o-", ms=4, color=colour, label=name)
        axes.set(yscale="log", title=short_name(run), xlabel="requests in the batch")
    panels[0][0].set_ylabel("µs (median, 10-90%)")
    panels[0][-1].legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    return _finished(figure)


def schedule_timing(timing: pd.DataFrame, by_running: pd.DataFrame, *, at_most: float = 60) -> Figure:
    """``schedule()`` of the real vLLM, timed on a CPU, beside the median label of the public traces.

    Parameters
    ----------
    timing : DataFrame
        Recorded by ``tools/time_vllm_schedule.py``.
    by_running : DataFrame
        Of the label audit.
    at_most : float
        Requests up to which the label is shown; bins above `CONTENDED_FACTOR` are left out.
    """
    figure, axes = plt.subplots(figsize=WIDE)
    alone = timing[(timing["waiting"] == 0) & (timing["busy_threads"] == 0)]
    colours = sns.color_palette(PALETTE)
    for (function, own), colour in zip(alone.groupby("function", sort=True), (colours[0], colours[7]), strict=False):
        axes.fill_between(own["running"], own["p10_us"], own["p90_us"], color=colour, alpha=0.2, lw=0)
        axes.plot(own["running"], own["p50_us"], "-", color=colour, label=f"{function}(), our CPU, no GPU")
    labels = by_running[
        (by_running["quantity"] == "label")
        & (by_running["experiment_id"] != POOLED)
        & (by_running["requests"] <= at_most)
    ]
    for (run, own), colour, marker in zip(labels.groupby("experiment_id"), colours[1:], "os^", strict=False):
        quiet = own[own["per_request_us"] < CONTENDED_FACTOR * own["per_request_us"].min()]
        axes.plot(
            quiet["requests"],
            quiet["median_us"],
            marker,
            ms=7,
            color=colour,
            label=f"step.duration_us, {short_name(str(run))}",
        )
    axes.set(xlabel="running requests, all decoding", ylabel="µs (median, 10-90%)", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize="small")
    return _finished(figure)


def label_by_run(by_run: pd.DataFrame) -> Figure:
    """Label (median, 10-90%) and decode interval of all 16 runs."""
    table = by_run.sort_values(["overloaded", "label_median_us"], ascending=[True, True])
    y = np.arange(len(table))
    colours = sns.color_palette(PALETTE)
    figure, axes = plt.subplots(figsize=(8.5, 5.2))
    error = np.vstack(
        [table["label_median_us"] - table["label_p10_us"], table["label_p90_us"] - table["label_median_us"]]
    )
    axes.errorbar(
        table["label_median_us"] / US_PER_MS, y, xerr=error / US_PER_MS, fmt="o", ms=4, capsize=2, color=colours[1],
        label="step.duration_us (median, 10-90%)",
    )  # fmt: skip
    axes.plot(
        table["interval_median_us"] / US_PER_MS, y, "D", ms=5, color=colours[0], label="decode interval of requests"
    )
    names = [
        short_name(r) + (" (overloaded)" if o else "")
        for r, o in zip(table["experiment_id"], table["overloaded"], strict=True)
    ]
    axes.set_yticks(y, names)
    axes.set(xscale="log", xlabel="ms")
    axes.legend(fontsize="small", loc="upper left")
    return _finished(figure)


def rebuilt_window(window: pd.DataFrame) -> Figure:
    """Running queue around the change of load, as traced and as rebuilt from requests, a traced run a panel."""
    runs = sorted(window["experiment_id"].unique())
    figure, panels = plt.subplots(len(runs), 1, figsize=(9, 2.3 * len(runs)), sharex=False, squeeze=False)
    colours = sns.color_palette(PALETTE)
    for axes, run in zip(panels[:, 0], runs, strict=True):
        own = window[window["experiment_id"] == run]
        seconds = own["time_us"] / US_PER_S
        axes.step(
            seconds, own["running_depth_rebuilt"], where="post", lw=1, color=colours[0], label="rebuilt from requests"
        )
        axes.plot(seconds, own["running_depth_traced"], ".", ms=4, color=colours[1], label="traced by the server")
        axes.set(title=short_name(run), ylabel="running requests")
    panels[0][0].legend(fontsize="small", loc="upper left")
    panels[-1][0].set_xlabel("seconds since the first request")
    figure.tight_layout()
    return _finished(figure)


def rebuilt_blocks(scatter: pd.DataFrame) -> Figure:
    """Cache blocks in use, rebuilt against traced, a traced run a colour."""
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    for (run, own), colour in zip(scatter.groupby("experiment_id"), sns.color_palette(PALETTE), strict=False):
        axes.plot(
            own["kv_blocks_traced"], own["kv_blocks_rebuilt"], ".", ms=4, color=colour, label=short_name(str(run))
        )
    top = float(scatter["kv_blocks_traced"].max())
    axes.plot([0, top], [0, top], color="0.4", lw=1)
    axes.set(xlabel="blocks in use, traced", ylabel="blocks in use, rebuilt")
    axes.legend(fontsize="small")
    return _finished(figure)


def overload(table: pd.DataFrame) -> Figure:
    """Decoding and waiting requests of the overloaded runs over time; what rests on the assumption is dashed."""
    runs = sorted(table["experiment_id"].unique())
    figure, panels = plt.subplots(2, len(runs), figsize=(11, 4.6), sharex=True, sharey="row", squeeze=False)
    colours = sns.color_palette(PALETTE)
    for column, run in enumerate(runs):
        own = table[table["experiment_id"] == run]
        above, below = panels[:, column]
        above.plot(own["time_s"], own["decoding"], "--", color=colours[1], label="with failed requests, assumed")
        above.plot(own["time_s"], own["decoding_completed"], color=colours[0], label="completed requests")
        below.plot(own["time_s"], own["waiting"], color=colours[2])
        above.set_title(short_name(run), fontsize="small")
        below.set(xlabel="s")
    panels[0][0].set_ylabel("decoding requests")
    panels[1][0].set_ylabel("waiting requests")
    _legend_outside(panels[0][-1])
    figure.tight_layout()
    return _finished(figure)
