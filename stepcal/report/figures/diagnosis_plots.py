"""Figures of the diagnosis: what label and physics contribute, and what single faults do. Tables in, figures out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stepcal.report.figures.theme import (
    COLOURS,
    FAINT,
    categories,
    drawn_twice,
    figure_legend,
    panels,
    plain_logarithm,
)
from stepcal.studies.diagnosis.attribution import CORRECTED, FOLDS, PUBLISHED, REQUEST, STEP, VARIANTS
from stepcal.studies.diagnosis.controlled import LIMIT_PERCENT

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


@drawn_twice
def attribution(narrow: bool, summary: pd.DataFrame) -> Figure:
    """Mean MAPE of each model by distance from its training, a panel for each level and label; runs without overload."""
    shown = ((STEP, PUBLISHED), (STEP, CORRECTED), (REQUEST, CORRECTED))
    figure, axes = panels(narrow, 2.2 if narrow else 3.0, across=len(shown), share_y=True, share_x=True)
    for panel, (level, label) in zip(axes, shown, strict=True):
        own = summary[(summary["level"] == level) & (summary["label"] == label) & ~summary["overloaded"]]
        for variant, colour in zip(VARIANTS, COLOURS, strict=False):
            line = own[own["variant"] == variant].set_index("fold")["mape_percent"].reindex(list(FOLDS))
            panel.plot(range(len(FOLDS)), line, "o-", ms=5, color=colour, label=VARIANT_WORDS[variant])
        title = f"{label} label, per {level}"
        panel.set(yscale="log", title=title if narrow else title.replace(", ", ",\n"))
        panel.set_xticks(
            range(len(FOLDS)), [FOLD_NAMES[f].replace(", ", ",\n") for f in FOLDS], rotation=35, ha="right"
        )
        plain_logarithm(panel)
    axes[0].set_ylabel("MAPE (%), mean over runs")
    figure_legend(figure, axes[0], columns=1 if narrow else 3)
    return figure


@drawn_twice
def faults(narrow: bool, table: pd.DataFrame) -> Figure:
    """Error of the parameters and of the mean E2E for each fault, with the study's limit."""
    figure, axes = panels(narrow, 2.7, across=2, share_y=not narrow)
    y = np.arange(len(table))
    for panel, column, title in zip(
        axes,
        ("parameter_error_percent", "e2e_error_percent"),
        ("error of the parameters (%, median)", "error of mean E2E (%, mean)"),
        strict=True,
    ):
        panel.hlines(y, table[column].clip(lower=0.01).min() / 2, table[column], color=COLOURS[0], lw=1.2)
        panel.plot(table[column], y, "o", color=COLOURS[0])
        panel.set(xscale="log", xlabel=title)
        categories(panel, [FAULT_NAMES[f] for f in table["fault"]])
        plain_logarithm(panel)
        panel.grid(axis="y", visible=False)
    axes[1].axvline(LIMIT_PERCENT, color=FAINT, ls="--", lw=1)
    return figure
