"""The report's figures: tables in, matplotlib figures out. Colours are the colour-blind palette throughout."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepcal.evaluation.step_errors import POOLED, TOTAL
from stepcal.units import US_PER_MS

PALETTE = "colorblind"
WIDE = (8.5, 4.2)
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


def use_style() -> None:
    """Set the look of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE)
    plt.rcParams.update(
        {"figure.dpi": 110, "savefig.bbox": "tight", "axes.titlesize": "medium", "legend.frameon": False}
    )


def short_name(experiment_id: str) -> str:
    """Return an experiment's name without its date: ``llama-2-70b general``."""
    _, _, rest = experiment_id.split("-", 2) if experiment_id[:8].isdigit() else ("", "", experiment_id)
    words = [w for w in rest.split("-") if not (w.startswith("tp") and w[2:].isdigit())]
    return f"{'-'.join(words[:-1])} {words[-1]}".replace("mixtral-8x7b-v0-1", "mixtral-8x7b")


def label_against_batch(label_by_batch: pd.DataFrame) -> Figure:
    """Median and 10-90% band of the label against the number of decoding requests, an experiment a colour."""
    figure, axes = plt.subplots(figsize=WIDE)
    for (experiment, group), colour in zip(
        label_by_batch.groupby("experiment_id"), sns.color_palette(PALETTE), strict=False
    ):
        enough = group[group["n_steps"] >= 3]
        axes.fill_between(enough["decode_tokens"], enough["p10_us"], enough["p90_us"], color=colour, alpha=0.18, lw=0)
        axes.plot(enough["decode_tokens"], enough["median_us"], color=colour, label=short_name(str(experiment)))
    axes.set(
        yscale="log", xlabel="decoding requests in the batch", ylabel="step.duration_us (median, 10-90%)",
        title="The label rises by two orders of magnitude with the batch (steps without prefill)",
    )  # fmt: skip
    axes.legend(title=None)
    return _finished(figure)


def correlations(table: pd.DataFrame, bounds: Sequence[float]) -> Figure:
    """Pearson r of each component, pooled and per experiment, with intervals and the pre-registered bounds."""
    subsets = [s for s in ("all", "pure_decode", "mixed") if s in set(table["subset"])]
    figure, panels = plt.subplots(1, len(subsets), figsize=(10, 4.2), sharey=True)
    scopes = sorted(table["scope"].unique(), key=lambda s: (s != POOLED, s))
    names = [c for c in COMPONENT_NAMES if c != "decode_attn"]
    for axes, subset in zip(np.atleast_1d(panels), subsets, strict=True):
        here = table[(table["subset"] == subset) & table["r"].notna()]
        for i, (scope, colour) in enumerate(zip(scopes, sns.color_palette(PALETTE), strict=False)):
            own = here[here["scope"] == scope].set_index("component").reindex(names)
            offset = (i - (len(scopes) - 1) / 2) * 0.16
            y = np.arange(len(names)) + offset
            error = np.abs(np.vstack([own["r"] - own["low"], own["high"] - own["r"]]))
            label = POOLED if scope == POOLED else short_name(scope)
            axes.errorbar(own["r"], y, xerr=error, fmt="o", ms=4, color=colour, capsize=2, label=label)
        for bound in bounds:
            axes.axvline(bound, color="0.4", ls="--", lw=1)
        axes.set(title=subset.replace("_", " "), xlabel="Pearson r", xlim=(-0.25, 1.02))
    first = np.atleast_1d(panels)[0]
    first.set_yticks(range(len(names)), [COMPONENT_NAMES[n] for n in names])
    first.invert_yaxis()
    _legend_outside(np.atleast_1d(panels)[-1])
    figure.tight_layout()
    return _finished(figure)


def mixed_residual(table: pd.DataFrame) -> Figure:
    """Residual of mixed steps against their prefill tokens, beside what the analytical prefill term would add."""
    figure, axes = plt.subplots(figsize=WIDE)
    bins = list(dict.fromkeys(table["prefill_tokens"]))
    for (experiment, group), colour in zip(table.groupby("experiment_id"), sns.color_palette(PALETTE), strict=False):
        x = [bins.index(b) for b in group["prefill_tokens"]]
        middle, low, high = (group[c] / US_PER_MS for c in ("median_residual_us", "p10_us", "p90_us"))
        error = np.abs(np.vstack([middle - low, high - middle]))
        axes.errorbar(
            x, middle, yerr=error, fmt="o-", ms=4, capsize=2, color=colour,
            label=short_name(str(experiment)),
        )  # fmt: skip
    analytical = table.groupby("prefill_tokens", sort=False)["analytical_us"].median().reindex(bins) / US_PER_MS
    axes.plot(range(len(bins)), analytical, "k--", lw=1, label="analytical prefill time")
    axes.set_xticks(range(len(bins)), bins)
    axes.set(
        xlabel="prefill tokens in the step", ylabel="label minus line of decode-only steps (ms)",
        title="The label does not grow as the analytical prefill time does (median, 10-90%)",
    )  # fmt: skip
    axes.legend(fontsize="small")
    return _finished(figure)


def scores(table: pd.DataFrame, metric: str, xlabel: str) -> Figure:
    """One metric of every variant, an experiment a colour, with bootstrap intervals."""
    here = table[(table["metric"] == metric) & table["value"].notna()]
    variants = [v for v in VARIANT_NAMES if v in set(here["variant"])]
    figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(variants) + 1.2))
    experiments = sorted(here["experiment_id"].unique())
    for i, (experiment, colour) in enumerate(
        zip(experiments, sns.color_palette(PALETTE, len(experiments)), strict=True)
    ):
        own = here[here["experiment_id"] == experiment].set_index("variant").reindex(variants)
        y = np.arange(len(variants)) + (i - (len(experiments) - 1) / 2) * min(0.2, 0.8 / len(experiments))
        error = np.abs(np.vstack([own["value"] - own["low"], own["high"] - own["value"]]))
        axes.errorbar(own["value"], y, xerr=error, fmt="o", ms=4, capsize=2, color=colour, label=short_name(experiment))
    axes.set_yticks(range(len(variants)), [VARIANT_NAMES[v] for v in variants])
    axes.invert_yaxis()
    axes.set(xlabel=xlabel)
    _legend_outside(axes)
    return _finished(figure)


def bias(table: pd.DataFrame, by: str, xlabel: str) -> Figure:
    """Mean signed error of each variant by one grouping, with intervals and the 5% band of the study."""
    here = table[table["by"] == by]
    groups = list(dict.fromkeys(here["group"]))
    variants = [v for v in VARIANT_NAMES if v in set(here["variant"])]
    figure, axes = plt.subplots(figsize=WIDE)
    for i, (variant, colour) in enumerate(zip(variants, sns.color_palette(PALETTE), strict=False)):
        own = here[here["variant"] == variant].set_index("group").reindex(groups)
        x = np.arange(len(groups)) + (i - (len(variants) - 1) / 2) * 0.15
        error = np.abs(np.vstack([own["mspe_percent"] - own["low"], own["high"] - own["mspe_percent"]]))
        axes.errorbar(
            x, own["mspe_percent"], yerr=error, fmt="o", ms=4, capsize=2, color=colour, label=VARIANT_NAMES[variant]
        )
    axes.axhspan(-5, 5, color="0.85", zorder=0)
    axes.axhline(0, color="0.4", lw=1)
    axes.set_xticks(range(len(groups)), groups, rotation=0 if len(groups) < 7 else 30)
    axes.set(xlabel=xlabel, ylabel="mean signed error (%)")
    axes.set_yscale("symlog", linthresh=100)
    _legend_outside(axes)
    return _finished(figure)


def parameters_against_error(ours: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Mean step MAPE against the number of parameters, ours and as published.

    Parameters
    ----------
    ours, published : DataFrame
        `variant`, `n_parameters`, `mape_percent`.
    """
    figure, axes = plt.subplots(figsize=WIDE)
    for table, marker, label in ((ours, "o", "ours"), (published, "s", "published, 16 experiments")):
        axes.plot(table["n_parameters"] + 1, table["mape_percent"], marker, ms=7, label=label, alpha=0.8)
        for variant, n, error in zip(table["variant"], table["n_parameters"], table["mape_percent"], strict=True):
            axes.annotate(
                VARIANT_NAMES.get(variant, variant),
                (n + 1, error),
                textcoords="offset points",
                xytext=(7, 3),
                fontsize="small",
            )
    axes.set_xscale("log")
    ticks = [0, 1, 3, 9, 16, 36]
    axes.set_xticks([t + 1 for t in ticks], [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="parameters (a model; an experiment for baselines)", ylabel="mean step MAPE (%)", ylim=(0, None))
    axes.legend(loc="lower left")
    return _finished(figure)


def end_to_end_errors(errors: pd.DataFrame) -> Figure:
    """Absolute error of mean E2E, a dot an experiment, on a logarithmic axis; the study's bound is marked."""
    variants = [v for v in VARIANT_NAMES if v in set(errors["variant"])]
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(variants) + 1.2))
    smallest = 0.05
    for i, variant in enumerate(variants):
        size = errors.loc[errors["variant"] == variant, "e2e_error_percent"].abs().clip(lower=smallest)
        spread = np.linspace(-0.2, 0.2, len(size))
        axes.plot(np.sort(size), i + spread, "o", ms=4, alpha=0.7, color=sns.color_palette(PALETTE)[0])
    axes.axvline(10, color="0.4", ls="--", lw=1)
    axes.text(10, -0.7, " 10% ", color="0.4", fontsize="small", ha="right")
    axes.set_yticks(range(len(variants)), [VARIANT_NAMES[v] for v in variants])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="|error of mean E2E| (%), an experiment a dot", xlim=(smallest * 0.8, 150))
    return _finished(figure)


def server_over_time(steps: pd.DataFrame) -> Figure:
    """Running and waiting requests, and KV blocks in use, against time."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.5, 4.6), sharex=True)
    minutes = steps["ts_start_ns"] / 60e9
    every = max(1, len(steps) // 4000)
    for column, label in (("waiting_depth", "waiting"), ("running_depth", "running")):
        above.plot(minutes[::every], steps[column][::every], lw=1, label=label)
    above.set(ylabel="requests", yscale="symlog")
    above.legend(loc="upper left")
    in_use = 1 - steps["kv_blocks_free"] / steps["kv_blocks_total"]
    below.plot(minutes[::every], 100 * in_use[::every], lw=1, color=sns.color_palette(PALETTE)[2])
    below.set(ylabel="KV blocks in use (%)", xlabel="minutes", ylim=(0, 105))
    return _finished(figure)


def singular_values(table: pd.DataFrame, tolerance: float) -> Figure:
    """Singular values of each variant's relative Jacobian: those at the floor are directions no data can see."""
    figure, axes = plt.subplots(figsize=WIDE)
    for (variant, group), colour in zip(table.groupby("variant", sort=False), sns.color_palette(PALETTE), strict=False):
        relative = np.maximum(group["singular_value"] / group["singular_value"].max(), 1e-20)
        axes.semilogy(group["rank"], relative, "o-", ms=4, color=colour, label=VARIANT_NAMES[str(variant)])
    axes.axhline(tolerance, color="0.4", ls="--", lw=1)
    axes.text(axes.get_xlim()[1], tolerance, "counts as zero ", ha="right", va="top", fontsize="small", color="0.4")
    axes.set(xlabel="direction", ylabel="singular value (largest = 1)")
    axes.legend()
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    """Take the figure from pyplot's hands, so that a notebook shows it once: where a cell returns it."""
    plt.close(figure)
    return figure


def _legend_outside(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
