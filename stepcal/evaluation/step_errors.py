"""Scores models on steps: correlations of components, errors of predictions, and where the errors lie.

Everything returns tidy tables, a figure a row, with its interval and its sample beside it; nothing here fits or plots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.metrics import BOOTSTRAP_RESAMPLES, STEP_METRICS, block_bootstrap, mspe_percent, relative_errors_percent
from stepcal.step_time.decomposition import phase
from stepcal.units import PERCENT, FloatArray

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


def share_percent(part: int, whole: int) -> float:
    """Return ``part / whole`` in percent."""
    return PERCENT * part / whole


def _bin_names(edges: Sequence[int]) -> list[str]:
    return [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


def _ordered(groups: pd.Series) -> list[object]:
    if isinstance(groups.dtype, pd.CategoricalDtype):
        present = set(groups.dropna().unique())
        return [c for c in groups.cat.categories if c in present]
    return sorted(groups.dropna().unique())
