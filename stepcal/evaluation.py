"""Scores models on steps: correlations of components, errors of predictions, and where the errors lie.

Everything returns tidy tables, a figure a row, with its interval and its sample beside it; nothing here fits or plots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.decomposition import STUDY_COMPONENTS, phase
from stepcal.errors import InputError
from stepcal.metrics import (
    BOOTSTRAP_RESAMPLES,
    PERCENT,
    STEP_METRICS,
    block_bootstrap,
    mspe_percent,
    pearson_r,
    relative_errors_percent,
)

FloatArray = NDArray[np.float64]

FEWEST_STEPS_FOR_R = 30
"""Steps below which a correlation is not reported, as frozen in the pre-registration of H1."""
POOLED = "pooled"
TOTAL = "total"
PHASE_OF_COMPONENT = {"prefill_gemm": "pure_prefill", "prefill_attn": "pure_prefill", "decode_gemm": "pure_decode"}
PHASE_OF_COMPONENT["decode_attn"] = "pure_decode"
BATCH_EDGES = (0, 1, 11, 21, 31, 41, 61, 81, 101, 129)
"""Bins of decode tokens in bias tables: about equal counts at the rates of the 16 experiments."""
PREFILL_EDGES = (1, 2, 17, 33, 65, 2049)
"""Bins of prefill tokens of mixed steps: one token is a cached prompt, 16 the block that an identical prompt recomputes."""
TIME_BINS = 10


def component_correlations(
    steps: pd.DataFrame, components: pd.DataFrame, *, n_resamples: int = BOOTSTRAP_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Pearson r of each component with the measured step time, pooled and per experiment, by phase.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows in time order within each experiment.
    components : DataFrame
        A column ``<component>_us`` each, indexed as `steps` (`stepcal.decomposition.decompose`).
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


def score_steps(
    predicted_us: FloatArray,
    steps: pd.DataFrame,
    *,
    n_resamples: int | None = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predictions by every step metric, for each experiment.

    Parameters
    ----------
    predicted_us : ndarray, shape (n_steps,)
    steps : DataFrame
        The test rows, in time order within each experiment.
    n_resamples : int or None
        Resamples of the block bootstrap; None leaves the intervals out.
    seed : int

    Returns
    -------
    DataFrame
        `experiment_id`, `metric`, `value`, `low`, `high`, `n_steps`.

    Raises
    ------
    InputError
        If there are no rows, or predictions are not finite.
    """
    if steps.empty:
        raise InputError("There are no test steps to score. Check the experiment filter and the split.")
    rows = []
    actual = steps["duration_us"].to_numpy(dtype=float)
    for experiment, positions in steps.groupby("experiment_id", observed=True).indices.items():
        for name, metric in STEP_METRICS.items():
            p, a = predicted_us[positions], actual[positions]
            if n_resamples is None:
                value, low, high = metric(p, a), float("nan"), float("nan")
            else:
                value, low, high = block_bootstrap(metric, p, a, n_resamples=n_resamples, seed=seed)
            rows.append(
                {
                    "experiment_id": experiment,
                    "metric": name,
                    "value": value,
                    "low": low,
                    "high": high,
                    "n_steps": len(a),
                }
            )
    return pd.DataFrame(rows)


def bias_table(
    predicted_us: FloatArray,
    steps: pd.DataFrame,
    *,
    n_resamples: int | None = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Signed error of predictions by phase, batch size, model, workload and time.

    Returns
    -------
    DataFrame
        `by`, `group`, `mspe_percent` with `low` and `high`, `median_percent` (of the signed errors), `n_steps`.
    """
    actual = steps["duration_us"].to_numpy(dtype=float)
    n = steps.groupby("experiment_id", observed=True)["step_id"].transform("size")
    order = steps.groupby("experiment_id", observed=True).cumcount()
    decile = np.minimum((order * TIME_BINS // n).to_numpy(), TIME_BINS - 1) + 1
    groupings: dict[str, pd.Series] = {
        "phase": phase(steps),
        "decode_tokens": pd.cut(steps["decode_tokens"], list(BATCH_EDGES), right=False, labels=_bin_names(BATCH_EDGES)),
        "model": steps["model"],
        "workload": steps["workload"],
        "time_decile": pd.Series(decile, index=steps.index),
    }
    rows = []
    for by, groups in groupings.items():
        for group in _ordered(groups):
            chosen = (groups == group).to_numpy()
            p, a = predicted_us[chosen], actual[chosen]
            if n_resamples is None:
                value, low, high = mspe_percent(p, a), float("nan"), float("nan")
            else:
                value, low, high = block_bootstrap(mspe_percent, p, a, n_resamples=n_resamples, seed=seed)
            median = float(np.median(relative_errors_percent(p, a)))
            rows.append(
                {
                    "by": by,
                    "group": str(group),
                    "mspe_percent": value,
                    "low": low,
                    "high": high,
                    "median_percent": median,
                    "n_steps": int(chosen.sum()),
                }
            )
    return pd.DataFrame(rows)


def mean_over_experiments(scores: pd.DataFrame, by: Sequence[str] = ("variant", "metric")) -> pd.DataFrame:
    """Average a score table over experiments, each experiment counting once.

    Returns
    -------
    DataFrame
        The columns of `by`, `value`, `n_experiments`, and `max_value` (the worst experiment).
    """
    grouped = scores.groupby(list(by), sort=False, observed=True)["value"]
    return grouped.agg(value="mean", max_value="max", n_experiments="size").reset_index()


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


def share_percent(part: int, whole: int) -> float:
    """Return ``part / whole`` in percent."""
    return PERCENT * part / whole


def _correlation(component: FloatArray, label: FloatArray, n_resamples: int, seed: int) -> dict[str, float | str]:
    nan = float("nan")
    if len(component) < FEWEST_STEPS_FOR_R:
        return {"r": nan, "low": nan, "high": nan, "reason": f"fewer than {FEWEST_STEPS_FOR_R} steps"}
    if np.ptp(component) == 0:
        reason = "component is zero in every step" if component[0] == 0 else "component does not vary"
        return {"r": nan, "low": nan, "high": nan, "reason": reason}
    r, low, high = block_bootstrap(pearson_r, component, label, n_resamples=n_resamples, seed=seed)
    return {"r": r, "low": low, "high": high, "reason": ""}


def _bin_names(edges: Sequence[int]) -> list[str]:
    return [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


def _ordered(groups: pd.Series) -> list[object]:
    if isinstance(groups.dtype, pd.CategoricalDtype):
        present = set(groups.dropna().unique())
        return [c for c in groups.cat.categories if c in present]
    return sorted(groups.dropna().unique())
