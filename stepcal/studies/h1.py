"""H1: does a roofline component follow the label? And the published predictions, scored again."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.evaluation.step_errors import FEWEST_STEPS_FOR_R, POOLED, PREFILL_EDGES, TOTAL, _bin_names
from stepcal.metrics import BOOTSTRAP_RESAMPLES, block_bootstrap, pearson_r, relative_errors_percent
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.decomposition import STUDY_COMPONENTS, decompose, phase
from stepcal.studies.study import ACCELERATOR, Tables
from stepcal.units import FloatArray


def component_correlations(
    steps: pd.DataFrame, components: pd.DataFrame, *, n_resamples: int = BOOTSTRAP_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Pearson r of each component with the measured step time, pooled and per experiment, by phase.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows in time order within each experiment.
    components : DataFrame
        A column ``<component>_us`` each, indexed as `steps` (`stepcal.step_time.decomposition.decompose`).
    n_resamples, seed : int
        Of the block bootstrap.

    Returns
    -------
    DataFrame
        `subset` (``all`` or a phase), `scope` (``pooled`` or an experiment), `component` (one of the four or ``total``),
        `r`, `low`, `high`, `n_steps`, and `reason` where r is NaN: too few steps, or a component that does not vary.
    """
    total = components.sum(axis=1)
    columns = {**{name: components[f"{name}_us"] for name in STUDY_COMPONENTS}, TOTAL: total}
    phases = phase(steps)
    subsets = {"all": np.ones(len(steps), dtype=bool)}
    subsets |= {name: (phases == name).to_numpy() for name in ("pure_prefill", "pure_decode", "mixed")}
    scopes = {POOLED: np.ones(len(steps), dtype=bool)}
    scopes |= {e: (steps["experiment_id"] == e).to_numpy() for e in sorted(steps["experiment_id"].unique())}
    label = steps["duration_us"].to_numpy(dtype=float)
    rows = []
    for subset, in_subset in subsets.items():
        for scope, in_scope in scopes.items():
            chosen = in_subset & in_scope
            for name, values in columns.items():
                row = {"subset": subset, "scope": scope, "component": name, "n_steps": int(chosen.sum())}
                rows.append(row | _correlation(values.to_numpy()[chosen], label[chosen], n_resamples, seed))
    return pd.DataFrame(rows)


def label_by_batch(steps: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of the measured step time for each number of decode tokens, on steps without prefill.

    Returns
    -------
    DataFrame
        `experiment_id`, `decode_tokens`, `n_steps`, `p10_us`, `median_us`, `p90_us`.
    """
    decode = steps[steps["prefill_tokens"] == 0]
    grouped = decode.groupby(["experiment_id", "decode_tokens"], observed=True)["duration_us"]
    table = grouped.agg(
        n_steps="size",
        p10_us=lambda values: values.quantile(0.1),
        median_us="median",
        p90_us=lambda values: values.quantile(0.9),
    )
    return table.reset_index()


def mixed_batch_residual(steps: pd.DataFrame, components: pd.DataFrame) -> pd.DataFrame:
    """What steps with prefill take beyond a line in decode GEMM time that is fitted to steps without.

    If the prefill components described the label, the residual would grow with them. Fitted to each experiment by itself.

    Returns
    -------
    DataFrame
        `experiment_id`, `prefill_tokens` (bin), `n_steps`, `median_residual_us`, `p10_us`, `p90_us`, `analytical_us`
        (median analytical prefill time of the bin).
    """
    rows = []
    prefill_us = components["prefill_gemm_us"] + components["prefill_attn_us"]
    for experiment, here in steps.groupby("experiment_id", observed=True):
        gemm = components.loc[here.index, "decode_gemm_us"].to_numpy()
        label = here["duration_us"].to_numpy(dtype=float)
        pure = (here["prefill_tokens"] == 0).to_numpy()
        if pure.sum() < FEWEST_STEPS_FOR_R:
            continue
        slope, intercept = np.polyfit(gemm[pure], label[pure], 1)
        residual = label - (intercept + slope * gemm)
        bins = pd.cut(here["prefill_tokens"], [0, *PREFILL_EDGES], right=False, labels=_bin_names([0, *PREFILL_EDGES]))
        for name, members in pd.Series(residual, index=here.index).groupby(bins, observed=True):
            low, middle, high = np.quantile(members, [0.1, 0.5, 0.9])
            rows.append(
                {
                    "experiment_id": experiment,
                    "prefill_tokens": str(name),
                    "n_steps": len(members),
                    "median_residual_us": middle,
                    "p10_us": low,
                    "p90_us": high,
                    "analytical_us": float(prefill_us.loc[members.index].median()),
                }
            )
    return pd.DataFrame(rows)


def rescore_published_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    """MAPE and MSPE of the published XGBoost predictions, recomputed from the raw pairs.

    Parameters
    ----------
    predictions : DataFrame
        `experiment_id`, `model`, `workload`, `duration_us`, `predicted_us`.

    Returns
    -------
    DataFrame
        `experiment_id`, `model`, `workload`, `mape_percent`, `mspe_percent`, `n_steps`.
    """
    errors = relative_errors_percent(predictions["predicted_us"].to_numpy(), predictions["duration_us"].to_numpy())
    table = predictions[["experiment_id", "model", "workload"]].assign(error=errors, absolute=np.abs(errors))
    grouped = table.groupby(["experiment_id", "model", "workload"], observed=True)
    return grouped.agg(
        mape_percent=("absolute", "mean"), mspe_percent=("error", "mean"), n_steps=("error", "size")
    ).reset_index()


def _correlation(component: FloatArray, label: FloatArray, n_resamples: int, seed: int) -> dict[str, float | str]:
    nan = float("nan")
    if len(component) < FEWEST_STEPS_FOR_R:
        return {"r": nan, "low": nan, "high": nan, "reason": f"fewer than {FEWEST_STEPS_FOR_R} steps"}
    if np.ptp(component) == 0:
        reason = "component is zero in every step" if component[0] == 0 else "component does not vary"
        return {"r": nan, "low": nan, "high": nan, "reason": reason}
    r, low, high = block_bootstrap(pearson_r, component, label, n_resamples=n_resamples, seed=seed)
    return {"r": r, "low": low, "high": high, "reason": ""}


def run_h1(
    steps: pd.DataFrame, *, n_resamples: int = BOOTSTRAP_RESAMPLES, seed: int = 0
) -> tuple[Tables, dict[str, str]]:
    """Correlate the study's components with its label.

    Returns
    -------
    tables : dict
        ``correlations``, ``mixed_residual``, ``label_by_batch``.
    texts : dict
        Empty.
    """
    components = decompose(steps, load_accelerator(ACCELERATOR))
    tables = {
        "correlations": component_correlations(steps, components, n_resamples=n_resamples, seed=seed),
        "mixed_residual": mixed_batch_residual(steps, components),
        "label_by_batch": label_by_batch(steps),
    }
    return tables, {}


def run_rescored(predictions: pd.DataFrame) -> tuple[Tables, dict[str, str]]:
    """Re-score the published XGBoost predictions: table ``rescored``."""
    return {"rescored": rescore_published_predictions(predictions)}, {}
