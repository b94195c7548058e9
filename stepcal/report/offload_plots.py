"""Figures of the page on KV offloading: tables in, matplotlib figures out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from stepcal.report.plots import PALETTE, WIDE, _finished, short_name
from stepcal.studies.kv_offloading import ALL, NONE, OUTPUTS, PROMPTS, SMALLER, STOCK
from stepcal.studies.published_runs import STUDY_OFFLOAD_GIB
from stepcal.units import US_PER_MS

MODES = {NONE: "off", STOCK: "as released", SMALLER: "as released, 5.9 GiB", OUTPUTS: "outputs stored too"}
FEW_CALLS = 20


def knee(by_held: pd.DataFrame) -> Figure:
    """Label a running request against the KV cache in use, in blocks and in GiB, a traced run a colour."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for (run, own), colour in zip(by_held.groupby("experiment_id"), sns.color_palette(PALETTE), strict=False):
        pool = own["pool_blocks"].iloc[0]
        left.plot(own["held_blocks"], own["per_request_us"], "o-", ms=4, color=colour, label=short_name(str(run)))
        left.axvline(pool, color=colour, ls=":", lw=1)
        right.plot(STUDY_OFFLOAD_GIB * own["held_blocks"] / pool, own["per_request_us"], "o-", ms=4, color=colour)
    right.axvline(STUDY_OFFLOAD_GIB, color="0.3", ls=":", lw=1)
    left.set(yscale="log", ylabel="label a running request (µs, median)", xlabel="KV blocks in use", title="in blocks")
    right.set(xlabel="KV cache in use (GiB)", title="the same in GiB; dotted: 8 GiB")
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(ScalarFormatter())
    figure.legend(*left.get_legend_handles_labels(), fontsize="small", loc="center right", bbox_to_anchor=(0.97, 0.3))
    figure.tight_layout()
    return _finished(figure)


def pool_profile(profile: pd.DataFrame) -> Figure:
    """How well a pool of each size explains the label, a traced run a colour."""
    figure, axes = plt.subplots(figsize=WIDE)
    for (run, own), colour in zip(profile.groupby("experiment_id"), sns.color_palette(PALETTE), strict=False):
        for stored, style in ((ALL, "-"), (PROMPTS, "--")):
            rows = own[own["stored"] == stored]
            name = short_name(str(run)) + (", prompts only" if stored == PROMPTS else "")
            axes.plot(rows["pool_gib"], rows["log_rms"], style, color=colour, label=name)
    axes.axvline(STUDY_OFFLOAD_GIB, color="0.3", ls=":", lw=1)
    axes.set(
        xlabel="pool (GiB)", ylabel="root mean square of log ratios",
        title="Best fit of the label with a pool of each size (training steps)",
    )  # fmt: skip
    axes.legend(fontsize="small")
    return _finished(figure)


def ramps(timing: pd.DataFrame, by_held: pd.DataFrame) -> Figure:
    """``schedule()`` of the real vLLM on our CPU while load rises, beside the public label at the same batch."""
    own = timing[(timing["workload"] == "general") & (timing["n_calls"] >= FEW_CALLS)]
    models = sorted(own["model"].unique())
    figure, panels = plt.subplots(1, len(models), figsize=(10, 4), sharey=True, squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        for (mode, name), colour in zip(MODES.items(), sns.color_palette(PALETTE), strict=False):
            rows = own[(own["model"] == model) & (own["offload"] == mode)].sort_values("running")
            axes.plot(rows["running"], rows["p50_us"], "-", color=colour, label=f"ours, {name}")
        label = by_held[
            by_held["experiment_id"].str.contains(f"{model}-tp") & by_held["experiment_id"].str.endswith("general")
        ]
        axes.plot(label["running"], label["median_us"], "ko", ms=5, label="public label")
        axes.set(yscale="log", xlabel="running requests", title=f"{model} general")
    panels[0][0].set_ylabel("µs (median)")
    panels[0][-1].legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    return _finished(figure)


def predicted_labels(labels: pd.DataFrame) -> Figure:
    """Predicted against published label of the runs' last steps, with the pool and without it."""
    figure, axes = plt.subplots(figsize=(6, 5))
    full = labels["rejected"] > 0
    published = labels["label_us"] / US_PER_MS
    colours = sns.color_palette(PALETTE)
    axes.plot(published[full], labels["without_pool_us"][full] / US_PER_MS, "x", color="0.5", label="without the pool")
    for rows, colour, name in ((~full, colours[0], "all blocks fit"), (full, colours[3], "requests rejected")):
        axes.plot(published[rows], labels["predicted_us"][rows] / US_PER_MS, "o", color=colour, label=name)
    ends = np.array([published.min() / 2, published.max() * 2])
    axes.plot(ends, ends, color="0.3", lw=1)
    axes.fill_between(ends, ends / 2, ends * 2, color="0.5", alpha=0.12, lw=0)
    axes.set(
        xscale="log", yscale="log", xlabel="published label (ms, median)", ylabel="predicted (ms)",
        title="16 runs, costs from our CPU; band: a factor of two",
    )  # fmt: skip
    axes.legend(fontsize="small")
    return _finished(figure)


def late(table: pd.DataFrame) -> Figure:
    """Label and decode interval of the same minutes, in the overloaded run that still completes requests."""
    figure, axes = plt.subplots(figsize=WIDE)
    colours = sns.color_palette(PALETTE)
    axes.plot(table["time_s"], table["interval_us"] / US_PER_MS, "o-", color=colours[0], label="decode interval")
    axes.plot(table["time_s"], table["label_us"] / US_PER_MS, "o-", color=colours[1], label="step.duration_us")
    axes.set(xlabel="time (s)", ylabel="ms (median)", ylim=(0, None))
    axes.set_title(", ".join(short_name(str(run)) for run in table["experiment_id"].unique()))
    axes.legend(loc="lower left")
    return _finished(figure)
