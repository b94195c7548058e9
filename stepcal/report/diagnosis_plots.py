"""Figures of the diagnosis: what label and physics contribute, and what single faults do. Tables in, figures out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stepcal.report.plots import PALETTE, WIDE, _finished, _legend_outside
from stepcal.studies.attribution import CORRECTED, FOLDS, PUBLISHED, REQUEST, STEP, VARIANTS
from stepcal.studies.controlled import LIMIT_PERCENT

FOLD_NAMES = {
    "within": "later, same run",
    "rate": "another rate",
    "workload": "another workload",
    "model": "another model",
}
VARIANT_WORDS = {
    "constant": "constant",
    "blackbox": "blackbox",
    "components": "four components",
    "physical_terms": "physical terms, no priors",
    "physical": "physical, with priors",
}
FAULT_NAMES = {
    "none": "no fault",
    "wrong_label": "wrong label",
    "no_decode_attention": "no decode attention",
    "kv_sums_only": "KV: sums only",
    "kv_hidden": "KV: hidden",
    "sampling": "10% sampled",
    "noise": "20% noise",
    "as_the_study": "the study's three",
}


def attribution(summary: pd.DataFrame) -> Figure:
    """Mean MAPE of each model by distance from its training, a panel for each level and label; runs without overload."""
    panels = ((STEP, PUBLISHED), (STEP, CORRECTED), (REQUEST, CORRECTED))
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.2), sharey=True)
    for panel, (level, label) in zip(axes, panels, strict=True):
        own = summary[(summary["level"] == level) & (summary["label"] == label) & ~summary["overloaded"]]
        for variant, colour in zip(VARIANTS, sns.color_palette(PALETTE), strict=False):
            line = own[own["variant"] == variant].set_index("fold")["mape_percent"].reindex(list(FOLDS))
            panel.plot(range(len(FOLDS)), line, "o-", ms=5, color=colour, label=VARIANT_WORDS[variant])
        panel.set_xticks(range(len(FOLDS)), [FOLD_NAMES[f] for f in FOLDS], rotation=30, ha="right")
        panel.set(yscale="log", title=f"{label} label, per {level}")
    axes[0].set_ylabel("MAPE (%), mean over runs")
    _legend_outside(axes[-1])
    figure.tight_layout()
    return _finished(figure)


def faults(table: pd.DataFrame) -> Figure:
    """Error of the numbers and of the mean E2E for each fault, with the study's limit."""
    own = table.iloc[::-1]
    y = np.arange(len(own))
    figure, axes = plt.subplots(figsize=WIDE)
    colours = sns.color_palette(PALETTE)
    for column, name, marker, colour in (
        ("parameter_error_percent", "learned numbers (median)", "s", colours[1]),
        ("step_mape_percent", "step time (MAPE)", "^", colours[2]),
        ("e2e_error_percent", "mean E2E, closed loop", "o", colours[0]),
    ):
        axes.plot(own[column], y, marker, ms=7, color=colour, label=name)
    axes.axvline(LIMIT_PERCENT, color="0.4", ls="--", lw=1)
    axes.set_yticks(y, [FAULT_NAMES[str(f)] for f in own["fault"]])
    axes.set(xscale="log", xlabel="error (%)")
    _legend_outside(axes)
    return _finished(figure)
