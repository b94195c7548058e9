"""The report's figures: tables in, figures at two widths out. The look is `stepcal.report.figures.theme`'s."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stepcal.evaluation.step_errors import POOLED, TOTAL
from stepcal.report.figures import theme
from stepcal.report.figures.theme import (
    COLOURS,
    FAINT,
    INK,
    RULE,
    categories,
    drawn_twice,
    figure_legend,
    legend_above,
    panels,
    plain_logarithm,
)
from stepcal.units import MS_PER_S, PERCENT, US_PER_MS

use_style = theme.use_style
"""Pages set the look of their figures through this module."""
VARIANT_NAMES = {
    "raw": "raw analytical",
    "constant": "constant",
    "bucket": "bucket ratio",
    "blackbox": "blackbox",
    "xgboost": "XGBoost",
    "global9": "9 global",
    "phase16": "16 per regime",
    "model36": "36 per model",
    "pace": "constant pace",
    "training_mean": "mean of first arrivals",
}
COMPONENT_NAMES = {
    "prefill_gemm": "prefill GEMM",
    "prefill_attn": "prefill attention",
    "decode_gemm": "decode GEMM",
    "decode_attn": "decode attention",
    TOTAL: "sum of the four",
}
MANY_MARKS = 300
"""Marks that a line of events shows at most."""
SUBSET_NAMES = {"all": "all steps", "pure_decode": "decode only", "mixed": "decode and prefill"}


def short_name(experiment_id: str) -> str:
    """Return an experiment's name without its date: ``llama-2-70b general``."""
    _, _, rest = experiment_id.split("-", 2) if experiment_id[:8].isdigit() else ("", "", experiment_id)
    words = [w for w in rest.split("-") if not (w.startswith("tp") and w[2:].isdigit())]
    return f"{'-'.join(words[:-1])} {words[-1]}".replace("mixtral-8x7b-v0-1", "mixtral-8x7b")


@drawn_twice
def label_against_batch(narrow: bool, label_by_batch: pd.DataFrame) -> Figure:
    """Median and 10-90% band of the label against the number of decoding requests, an experiment a colour."""
    figure, (axes,) = panels(narrow, 3.0)
    for (experiment, group), colour in zip(label_by_batch.groupby("experiment_id"), COLOURS, strict=False):
        enough = group[group["n_steps"] >= 3]
        axes.fill_between(enough["decode_tokens"], enough["p10_us"], enough["p90_us"], color=colour, alpha=0.18, lw=0)
        axes.plot(enough["decode_tokens"], enough["median_us"], color=colour, label=short_name(str(experiment)))
    axes.set(yscale="log", xlabel="decoding requests in the batch", ylabel="label (µs)")
    legend_above(axes, columns=1 if narrow else 3)
    return figure


@drawn_twice
def correlations(narrow: bool, table: pd.DataFrame, bounds: Sequence[float]) -> Figure:
    """Pearson r of each component, pooled and per experiment, with intervals and the pre-registered bounds."""
    subsets = [s for s in SUBSET_NAMES if s in set(table["subset"])]
    scopes = sorted(table["scope"].unique(), key=lambda s: (s != POOLED, s))
    names = [c for c in COMPONENT_NAMES if c != "decode_attn"]
    figure, axes = panels(narrow, 2.5 if narrow else 2.9, across=len(subsets), share_x=True, share_y=True)
    for panel, subset in zip(axes, subsets, strict=True):
        here = table[(table["subset"] == subset) & table["r"].notna()]
        for i, (scope, colour) in enumerate(zip(scopes, COLOURS, strict=False)):
            own = here[here["scope"] == scope].set_index("component").reindex(names)
            y = np.arange(len(names)) + _offset(i, len(scopes))
            label = POOLED if scope == POOLED else short_name(scope)
            panel.errorbar(own["r"], y, xerr=_error(own, "r"), fmt="o", ms=4, color=colour, capsize=0, label=label)
        for bound in bounds:
            panel.axvline(bound, color=FAINT, ls="--", lw=1)
        panel.set(title=SUBSET_NAMES[subset], xlim=(-0.25, 1.02))
    axes[-1].set_xlabel("Pearson r with the label" + (" (dashed: the bounds)" if narrow else ""))
    if not narrow:
        axes[0].set_xlabel("dashed: the bounds of H1")
    categories(axes[0], [COMPONENT_NAMES[n] for n in names])
    figure_legend(figure, axes[0], columns=1 if narrow else 4)
    return figure


@drawn_twice
def mixed_residual(narrow: bool, table: pd.DataFrame) -> Figure:
    """Residual of mixed steps against their prefill tokens, beside what the analytical prefill term would add."""
    figure, (axes,) = panels(narrow, 3.0)
    bins = list(dict.fromkeys(table["prefill_tokens"]))
    for i, ((experiment, group), colour) in enumerate(zip(table.groupby("experiment_id"), COLOURS, strict=False)):
        x = np.array([bins.index(b) for b in group["prefill_tokens"]]) + _offset(i, 3)
        middle, low, high = (group[c] / US_PER_MS for c in ("median_residual_us", "p10_us", "p90_us"))
        error = np.abs(np.vstack([middle - low, high - middle]))
        axes.errorbar(x, middle, yerr=error, fmt="o-", ms=4, color=colour, label=short_name(str(experiment)))
    analytical = table.groupby("prefill_tokens", sort=False)["analytical_us"].median().reindex(bins) / US_PER_MS
    axes.plot(range(len(bins)), analytical, "--", color=FAINT, label="what FLOPs over peak would add")
    axes.set_xticks(range(len(bins)), bins)
    axes.set(xlabel="prefill tokens in the step", ylabel="label above decode-only line (ms)")
    legend_above(axes, columns=1 if narrow else 2)
    return figure


@drawn_twice
def scores(narrow: bool, table: pd.DataFrame, metric: str, xlabel: str) -> Figure:
    """One metric of every variant, an experiment a colour, with bootstrap intervals."""
    here = table[(table["metric"] == metric) & table["value"].notna()]
    variants = [v for v in VARIANT_NAMES if v in set(here["variant"])]
    figure, (axes,) = panels(narrow, 0.42 * len(variants) + 1.1)
    experiments = sorted(here["experiment_id"].unique())
    many = len(experiments) > len(COLOURS)
    for i, experiment in enumerate(experiments):
        own = here[here["experiment_id"] == experiment].set_index("variant").reindex(variants)
        y = np.arange(len(variants)) + _offset(i, len(experiments))
        colour = COLOURS[0] if many else COLOURS[i]
        label = None if many else short_name(experiment)
        axes.errorbar(own["value"], y, xerr=_error(own, "value"), fmt="o", ms=3.5, color=colour, label=label)
    categories(axes, [VARIANT_NAMES[v] for v in variants])
    axes.set(xlabel=xlabel, xlim=(0, None))
    if not many:
        legend_above(axes, columns=1 if narrow else 3)
    return figure


@drawn_twice
def bias(narrow: bool, table: pd.DataFrame, by: Sequence[tuple[str, str]]) -> Figure:
    """Mean signed error of each variant by some groupings, a panel each, with intervals and the study's band of 5%.

    Parameters
    ----------
    narrow : bool
    table : DataFrame
    by : sequence of (str, str)
        Column value of `by`, and the title of its panel.
    """
    heights = [max(1.6, 0.36 * table.loc[table["by"] == key, "group"].nunique() + 0.5) for key, _ in by]
    figure, axes = panels(narrow, sum(heights) / len(heights), down=len(by), share_x=True)
    variants = [v for v in VARIANT_NAMES if v in set(table["variant"])]
    for panel, (key, title) in zip(axes, by, strict=True):
        here = table[table["by"] == key]
        groups = list(dict.fromkeys(here["group"]))
        for i, (variant, colour) in enumerate(zip(variants, COLOURS, strict=False)):
            own = here[here["variant"] == variant].set_index("group").reindex(groups)
            y = np.arange(len(groups)) + _offset(i, len(variants))
            error = _error(own, "mspe_percent")
            panel.errorbar(
                own["mspe_percent"], y, xerr=error, fmt="o", ms=4, color=colour, label=VARIANT_NAMES[variant]
            )
        panel.axvspan(-5, 5, color=RULE, zorder=0)
        panel.axvline(0, color=FAINT, lw=1)
        panel.set(title=title)
        categories(panel, [str(g) for g in groups])
        panel.set_xscale("symlog", linthresh=100)
        panel.xaxis.set_major_locator(FixedLocator([-100, -50, 0, 50, 100, 1000]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+,.0f}" if x else "0"))
    axes[-1].set_xlabel("mean signed error (%)" if narrow else "mean signed error (%); linear to 100, then logarithmic")
    figure_legend(figure, axes[0], columns=2 if narrow else 4)
    return figure


@drawn_twice
def parameters_against_error(narrow: bool, ours: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Mean step MAPE against the number of parameters, ours and as published.

    Parameters
    ----------
    narrow : bool
    ours, published : DataFrame
        `variant`, `n_parameters`, `mape_percent`.
    """
    figure, (axes,) = panels(narrow, 3.2)
    last = {v for t in (ours, published) for v in t["variant"]}
    for table, marker, label, colour in (
        (ours, "o", "ours, 3 experiments", COLOURS[0]),
        (published, "s", "published, 16 experiments", COLOURS[1]),
    ):
        axes.plot(table["n_parameters"] + 1, table["mape_percent"], marker, ms=7, label=label, color=colour)
    # One name a variant, beside the upper of its two marks.
    for variant in last:
        marks = [
            (float(t.loc[t["variant"] == variant, "n_parameters"].iloc[0]) + 1, float(e))
            for t in (ours, published)
            for e in t.loc[t["variant"] == variant, "mape_percent"]
        ]
        x, y = max(marks, key=lambda m: m[1])
        axes.annotate(
            VARIANT_NAMES.get(str(variant), str(variant)),
            (x, y),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
        )
    axes.set_xscale("log")
    ticks = [0, 1, 3, 9, 16, 36]
    axes.set_xticks([t + 1 for t in ticks], [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(xlim=(0.7, 55), ylim=(0, None), xlabel="parameters", ylabel="mean step MAPE (%)")
    axes.margins(y=0.15)
    legend_above(axes, columns=1 if narrow else 2)
    return figure


@drawn_twice
def end_to_end_errors(narrow: bool, errors: pd.DataFrame, limit_percent: float = 10) -> Figure:
    """Absolute error of mean E2E, a dot an experiment, on a logarithmic axis; the study's bound is marked."""
    variants = [v for v in VARIANT_NAMES if v in set(errors["variant"])]
    figure, (axes,) = panels(narrow, 0.36 * len(variants) + 1.0)
    smallest = 0.05
    for i, variant in enumerate(variants):
        size = errors.loc[errors["variant"] == variant, "e2e_error_percent"].abs().clip(lower=smallest)
        spread = np.linspace(-0.22, 0.22, len(size))
        axes.plot(np.sort(size), i + spread, "o", ms=4, alpha=0.75, color=COLOURS[0])
    axes.axvline(limit_percent, color=FAINT, ls="--", lw=1)
    categories(axes, [VARIANT_NAMES[v] for v in variants])
    axes.set(xscale="log", xlabel=f"|error of mean E2E| (%); dashed: {limit_percent:g}%", xlim=(smallest * 0.8, 200))
    plain_logarithm(axes)
    return figure


@drawn_twice
def server_over_time(narrow: bool, steps: pd.DataFrame) -> Figure:
    """Running and waiting requests, KV blocks in use and preemptions against time."""
    figure, (above, below) = panels(narrow, 1.9, down=2, share_x=True)
    minutes = steps["ts_start_ns"] / 60e9
    every = max(1, len(steps) // (700 if narrow else 1500))
    for column, label, colour in (
        ("waiting_depth", "waiting", COLOURS[1]),
        ("running_depth", "running", COLOURS[0]),
    ):
        above.plot(minutes[::every], steps[column][::every], lw=1.2, label=label, color=colour)
    above.set(ylabel="requests", yscale="symlog", ylim=(0, None))
    legend_above(above, columns=2)
    in_use = 1 - steps["kv_blocks_free"] / steps["kv_blocks_total"]
    below.plot(minutes[::every], 100 * in_use[::every], lw=1.2, color=COLOURS[2], label="KV blocks in use (%)")
    at = minutes[steps["num_preempted"] > 0]
    if len(at):
        at = at[:: max(1, len(at) // MANY_MARKS)]
        below.plot(at, np.full(len(at), 104), "|", ms=7, color=COLOURS[3], label="steps that preempt")
    below.set(ylabel="KV blocks (%)", xlabel="minutes", ylim=(0, 112))
    legend_above(below, columns=1 if narrow else 2)
    return figure


@drawn_twice
def singular_values(narrow: bool, table: pd.DataFrame, tolerance: float) -> Figure:
    """Singular values of each variant's relative Jacobian: those at the floor are directions no data can see."""
    figure, (axes,) = panels(narrow, 3.0)
    for (variant, group), colour in zip(table.groupby("variant", sort=False), COLOURS, strict=False):
        relative = np.maximum(group["singular_value"] / group["singular_value"].max(), 1e-20)
        axes.semilogy(group["rank"], relative, "o-", ms=4, color=colour, label=VARIANT_NAMES[str(variant)])
    axes.axhline(tolerance, color=FAINT, ls="--", lw=1)
    axes.text(axes.get_xlim()[1], tolerance, "below: no data can see it ", ha="right", va="top", color=FAINT)
    axes.set(xlabel="direction in parameter space", ylabel="singular value (largest = 1)")
    legend_above(axes, columns=2 if narrow else 3)
    return figure


@drawn_twice
def predicted_against_measured(narrow: bool, runs: pd.DataFrame, limit_percent: float = 10) -> Figure:
    """Predicted against measured mean E2E of every run, in and out of sample told apart, with a band.

    Parameters
    ----------
    narrow : bool
    runs : DataFrame
        `name`, `measured_ms`, `predicted_ms`, `sample`; also `low_ms` and `high_ms` where a prediction has an interval. The
        marks carry the names, which the page shows when one is pointed at.
    limit_percent : float
        Half the width of the band.
    """
    figure, (axes,) = panels(narrow, 3.2 if narrow else 2.9)
    share = limit_percent / PERCENT
    axes.axhspan(1 - share, 1 + share, color=RULE, lw=0, zorder=0)
    axes.axhline(1, color=FAINT, lw=1)
    for (sample, own), colour, marker in zip(runs.groupby("sample", sort=False), COLOURS, "osD^v", strict=False):
        if {"low_ms", "high_ms"} <= set(own):
            known = own.dropna(subset=["low_ms", "high_ms"])
            low, high = known["low_ms"] / known["measured_ms"], known["high_ms"] / known["measured_ms"]
            axes.vlines(known["measured_ms"] / MS_PER_S, low, high, color=colour, lw=1.2)
        for row in own.to_dict("records"):
            ratio, seconds = row["predicted_ms"] / row["measured_ms"], row["measured_ms"] / MS_PER_S
            (mark,) = axes.plot(seconds, ratio, marker, ms=5.5, color=colour, alpha=0.85)
            times = f"{row['predicted_ms'] / MS_PER_S:.2f} s predicted, {seconds:.2f} s measured"
            mark.set_gid(f"tip:{row['name']}: {times}, {PERCENT * (ratio - 1):+.1f}% ({sample})")
        axes.plot([], [], marker, color=colour, label=f"{sample} ({len(own)})")
    axes.set(xscale="log", xlabel="measured mean E2E (s)", ylabel="predicted / measured")
    plain_logarithm(axes)
    legend_above(axes, columns=1 if narrow else 2)
    return figure


@drawn_twice
def step_by_component(narrow: bool, components: pd.DataFrame, measured_ms: pd.Series) -> Figure:
    """Predicted time of a step by component, stacked, a run a bar, with the measured step as a mark.

    Parameters
    ----------
    narrow : bool
    components : DataFrame
        A row a run (index: its name), a column a component (ms).
    measured_ms : Series
        Measured time of a decode step, by run.
    """
    figure, (axes,) = panels(narrow, 0.27 * len(components) + 1.2)
    y, left = np.arange(len(components)), np.zeros(len(components))
    for (name, part), colour in zip(components.items(), COLOURS, strict=False):
        axes.barh(y, part, left=left, height=0.62, color=colour, label=str(name), lw=0)
        left += part.to_numpy()
    measured = measured_ms.reindex(components.index)
    axes.plot(measured, y, "D", ms=5, color="none", markeredgecolor=INK, markeredgewidth=1.4, label="measured")
    categories(axes, [short_name(str(name)) for name in components.index])
    axes.set(xlabel="time of a decode step (ms)", xlim=(0, None))
    figure_legend(figure, axes, columns=2 if narrow else 4)
    return figure


@drawn_twice
def errors_by_method(narrow: bool, methods: pd.DataFrame) -> Figure:
    """Error of mean E2E of some methods, smallest first, ours in colour.

    Parameters
    ----------
    narrow : bool
    methods : DataFrame
        `method`, `e2e` (%), `ours` (bool).
    """
    own = methods.dropna(subset=["e2e"]).sort_values("e2e").reset_index(drop=True)
    figure, (axes,) = panels(narrow, 0.3 * len(own) + 0.9)
    for is_ours, colour in ((False, FAINT), (True, COLOURS[0])):
        rows = own[own["ours"] == is_ours]
        axes.hlines(rows.index, 0, rows["e2e"], color=colour, lw=1.2)
        axes.plot(rows["e2e"], rows.index, "o", ms=6, color=colour)
    for row in own.itertuples():
        axes.annotate(f"{row.e2e:.2g}", (row.e2e, row.Index), textcoords="offset points", xytext=(7, -3))
    categories(axes, ["\n".join(textwrap.wrap(str(m), 26 if narrow else 46)) for m in own["method"]])
    axes.set(xlabel="mean |error of mean E2E| (%)", xlim=(0, own["e2e"].max() * 1.15))
    axes.grid(axis="y", visible=False)
    return figure


def _offset(i: int, n: int) -> float:
    """Return how far the i-th of n marks stands from the middle of its category."""
    return (i - (n - 1) / 2) * min(0.2, 0.7 / max(n, 1))


def _error(own: pd.DataFrame, value: str) -> np.ndarray:
    return np.abs(np.vstack([own[value] - own["low"], own["high"] - own[value]]))
