"""Figures of the page on KV offloading: tables in, figures at two widths out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from stepcal.report.figures.plots import short_name
from stepcal.report.figures.theme import (
    COLOURS,
    FAINT,
    INK,
    RULE,
    drawn_twice,
    figure_legend,
    legend_above,
    panels,
    plain_logarithm,
)
from stepcal.studies.diagnosis.kv_offloading import NONE, OUTPUTS, SMALLER, STOCK
from stepcal.studies.diagnosis.offload_pool import ALL, PROMPTS
from stepcal.studies.published_runs import STUDY_OFFLOAD_GIB
from stepcal.units import US_PER_MS

MODES = {NONE: "off", STOCK: "as released", SMALLER: "as released, 5.9 GiB", OUTPUTS: "outputs stored too"}
FEW_CALLS = 20


@drawn_twice
def knee(narrow: bool, by_held: pd.DataFrame, *, pool_gib: float = STUDY_OFFLOAD_GIB) -> Figure:
    """Label a running request against the KV cache in use, in blocks and in GiB, a traced run a colour."""
    figure, (left, right) = panels(narrow, 2.4 if narrow else 2.8, across=2, share_y=True)
    for (run, own), colour in zip(by_held.groupby("experiment_id"), COLOURS, strict=False):
        pool = own["pool_blocks"].iloc[0]
        left.plot(own["held_blocks"], own["per_request_us"], "o-", ms=4, color=colour, label=short_name(str(run)))
        left.axvline(pool, color=colour, ls=":", lw=1.2)
        right.plot(pool_gib * own["held_blocks"] / pool, own["per_request_us"], "o-", ms=4, color=colour)
    right.axvline(pool_gib, color=FAINT, ls=":", lw=1.2)
    left.set(yscale="log", ylabel="label a request (µs)", xlabel="KV blocks in use", title="in blocks")
    right.set(xlabel="KV cache in use (GiB)", title=f"the same in GiB; dotted: {pool_gib:g} GiB")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    figure_legend(figure, left, columns=1 if narrow else 3)
    return figure


@drawn_twice
def pool_profile(narrow: bool, profile: pd.DataFrame) -> Figure:
    """How well a pool of each size explains the label, a traced run a colour."""
    figure, (axes,) = panels(narrow, 3.0)
    for (run, own), colour in zip(profile.groupby("experiment_id"), COLOURS, strict=False):
        for stored, style in ((ALL, "-"), (PROMPTS, "--")):
            rows = own[own["stored"] == stored]
            name = short_name(str(run)) if stored == ALL else None
            axes.plot(rows["pool_gib"], rows["log_rms"], style, color=colour, label=name)
    axes.plot([], [], "--", color=FAINT, label="if prompts alone are stored")
    axes.axvline(STUDY_OFFLOAD_GIB, color=FAINT, ls=":", lw=1.2)
    axes.set(xlabel=f"pool (GiB; dotted: {STUDY_OFFLOAD_GIB:g})", ylabel="log error of the best fit (RMS)")
    legend_above(axes, columns=1 if narrow else 2)
    return figure


@drawn_twice
def ramps(narrow: bool, timing: pd.DataFrame, by_held: pd.DataFrame) -> Figure:
    """``schedule()`` of the real vLLM on our CPU while load rises, beside the public label at the same batch."""
    own = timing[(timing["workload"] == "general") & (timing["n_calls"] >= FEW_CALLS)]
    models = sorted(own["model"].unique())
    figure, axes = panels(narrow, 2.3 if narrow else 2.9, across=len(models), share_y=True, share_x=narrow)
    for panel, model in zip(axes, models, strict=True):
        for (mode, name), colour in zip(MODES.items(), COLOURS, strict=False):
            rows = own[(own["model"] == model) & (own["offload"] == mode)].sort_values("running")
            panel.plot(rows["running"], rows["p50_us"], "-", color=colour, label=f"ours, {name}")
        label = by_held[
            by_held["experiment_id"].str.contains(f"{model}-tp") & by_held["experiment_id"].str.endswith("general")
        ]
        panel.plot(label["running"], label["median_us"], "o", color=INK, ms=5, label="public label")
        panel.set(yscale="log", title=f"{model} general")
    for panel in axes[-1:] if narrow else axes:
        panel.set_xlabel("running requests")
    axes[0].set_ylabel("µs (median)")
    figure_legend(figure, axes[0], columns=1 if narrow else 3)
    return figure


@drawn_twice
def predicted_labels(narrow: bool, labels: pd.DataFrame) -> Figure:
    """Predicted against published label of the runs' last steps, with the pool and without it."""
    figure, (axes,) = panels(narrow, 3.4)
    full = labels["rejected"] > 0
    published = labels["label_us"] / US_PER_MS
    axes.plot(published[full], labels["without_pool_us"][full] / US_PER_MS, "x", color=FAINT, label="without the pool")
    for rows, colour, name in ((~full, COLOURS[0], "all blocks fit"), (full, COLOURS[1], "requests rejected")):
        axes.plot(published[rows], labels["predicted_us"][rows] / US_PER_MS, "o", color=colour, label=name)
    ends = np.array([published.min() / 2, published.max() * 2])
    axes.plot(ends, ends, color=FAINT, lw=1)
    axes.fill_between(ends, ends / 2, ends * 2, color=RULE, lw=0, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="published label (ms, median)", ylabel="predicted (ms)")
    plain_logarithm(axes)
    legend_above(axes, columns=1 if narrow else 3)
    return figure


@drawn_twice
def late(narrow: bool, table: pd.DataFrame) -> Figure:
    """Label and decode interval of the same minutes, in the overloaded run that still completes requests."""
    figure, (axes,) = panels(narrow, 2.6)
    for column, colour, name in (
        ("interval_us", COLOURS[0], "decode interval"),
        ("label_us", COLOURS[1], "the study's label"),
    ):
        axes.plot(table["time_s"], table[column] / US_PER_MS, "o-", color=colour, label=name)
    axes.set(xlabel="time (s)", ylabel="ms (median)", ylim=(0, None))
    legend_above(axes, columns=2)
    return figure
