"""From result tables to the evidence that a pre-registration asks for: a value for each quantity, variant and unit.

What cannot be evaluated gets a row all the same, with NaN and the reason, so that a verdict can say what it lacks.
"""

from __future__ import annotations

import math

import pandas as pd

from stepcal.evaluation.step_errors import PHASE_OF_COMPONENT, POOLED
from stepcal.step_time.decomposition import STUDY_COMPONENTS

NO_FEATURES = "no public training features"
NO_SIMULATOR = "not evaluated: no end-to-end simulation was run"
NAN = float("nan")


def h1_evidence(correlations: pd.DataFrame, *, scope: str = POOLED) -> pd.DataFrame:
    """Evidence for H1: each component's r on the steps of its pure phase.

    Parameters
    ----------
    correlations : DataFrame
        From `stepcal.studies.h1.component_correlations`.
    scope : str
        ``pooled``, the pre-registered reading, or ``median``, the median over experiments that stands beside it.

    Returns
    -------
    DataFrame
        Columns of evidence, four rows.
    """
    rows = []
    for component in STUDY_COMPONENTS:
        own = correlations[
            (correlations["component"] == component) & (correlations["subset"] == PHASE_OF_COMPONENT[component])
        ]
        chosen = own[own["scope"] == POOLED] if scope == POOLED else own[own["scope"] != POOLED]
        value = float(chosen["r"].median()) if len(chosen) else NAN
        reasons = sorted(set(chosen.loc[chosen["r"].isna(), "reason"])) if len(chosen) else ["no steps of its phase"]
        reason = "" if not math.isnan(value) else f"{PHASE_OF_COMPONENT[component]}: {'; '.join(reasons)}"
        if "zero in every step" in reason:
            # The frozen reading: what is always zero follows nothing.
            value = 0.0
        rows.append(_row("r_pooled", "study_components", component, value, reason))
    return pd.DataFrame(rows)


def published_h1_evidence(published: pd.DataFrame) -> pd.DataFrame:
    """Evidence for H1 from the published pooled coefficients of all 16 experiments."""
    rows = []
    for component in STUDY_COMPONENTS:
        subset = PHASE_OF_COMPONENT[component]
        own = published[(published["component"] == component) & (published["subset"] == subset)]
        value, n = (float(own["pearson_r"].iloc[0]), int(own["n_steps"].iloc[0])) if len(own) else (NAN, 0)
        reason = "" if not math.isnan(value) else f"{subset}: {n} steps, r not published"
        if component == "decode_attn":
            value, reason = 0.0, "component is zero in every step"
        rows.append(_row("r_pooled", "study_components", component, value, reason))
    return pd.DataFrame(rows)


def h2_evidence(scores: pd.DataFrame, experiments: pd.Series, e2e_errors: pd.DataFrame | None = None) -> pd.DataFrame:
    """Evidence for H2 and H2-step from per-step scores, and end-to-end errors where they were computed.

    Parameters
    ----------
    scores : DataFrame
        `variant`, `experiment_id`, `metric`, `value` on the test split.
    experiments : Series of str
        All experiments that the hypothesis speaks of.
    e2e_errors : DataFrame, optional
        `variant`, `experiment_id`, `value` (percent), `reason`.

    Returns
    -------
    DataFrame
        Columns of evidence and `reason`.
    """
    table = scores.pivot_table(index="experiment_id", columns=["variant", "metric"], values="value", observed=True)
    return _h2_rows(table, experiments, NO_FEATURES, e2e_errors)


def published_h2_evidence(published: pd.DataFrame) -> pd.DataFrame:
    """Evidence for H2 and H2-step from the study's published table: per step only, for all 16 experiments."""
    table = pd.DataFrame(
        {
            (variant, metric): published[f"{variant}_{metric}"].to_numpy()
            for variant, metric in [
                ("blackbox", "mape_percent"),
                ("global9", "mape_percent"),
                ("global9", "mspe_percent"),
                ("model36", "mape_percent"),
                ("model36", "mspe_percent"),
            ]
        },
        index=published["experiment_id"],
    )
    return _h2_rows(table, published["experiment_id"], "not published", None)


def _h2_rows(
    table: pd.DataFrame, experiments: pd.Series, missing: str, e2e_errors: pd.DataFrame | None
) -> pd.DataFrame:
    def value(experiment: str, variant: str, metric: str) -> float:
        known = experiment in table.index and (variant, metric) in table.columns
        return float(table[variant, metric][experiment]) if known else NAN

    rows = []
    for experiment in sorted(experiments.astype(str)):
        quantities: list[tuple[str, str, float]] = []
        for variant in ("global9", "phase16", "model36"):
            quantities.append(("mspe_percent", variant, value(experiment, variant, "mspe_percent")))
            quantities.append(("mape_percent", variant, value(experiment, variant, "mape_percent")))
            excess = value(experiment, variant, "mape_percent") - value(experiment, "blackbox", "mape_percent")
            quantities.append(("mape_excess_over_blackbox_points", variant, excess))
        nine_over_36 = value(experiment, "global9", "mape_percent") - value(experiment, "model36", "mape_percent")
        quantities.append(("mape_excess_of_9_over_36_points", "global9", nine_over_36))
        rows += [_row(q, v, experiment, x, "" if not math.isnan(x) else missing) for q, v, x in quantities]
        if e2e_errors is None:
            rows.append(_row("e2e_error_percent", "model36", experiment, NAN, NO_SIMULATOR))
    evidence = pd.DataFrame(rows)
    if e2e_errors is not None:
        evidence = pd.concat(
            [evidence, e2e_errors.rename(columns={"experiment_id": "unit"}).assign(quantity="e2e_error_percent")]
        )
    return evidence.reset_index(drop=True)


def _row(quantity: str, variant: str, unit: str, value: float, reason: str) -> dict[str, str | float]:
    return {"quantity": quantity, "variant": variant, "unit": unit, "value": value, "reason": reason}
