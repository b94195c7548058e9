"""What the pages on models of the study's label cite: h1, h2_fits, baselines, bias, parsimony.

Errors are in percent; those without another word are MAPE of step time on the test split, mean over experiments.
"""

from __future__ import annotations

import math

import pandas as pd

from stepcal.datasets import published_h1, published_h1_per_experiment, published_h2, published_xgboost
from stepcal.evaluation.step_errors import POOLED, mean_over_experiments
from stepcal.evaluation.verdict import Verdict
from stepcal.studies.study import Study
from stepcal.units import US_PER_MS

POOLED_VARIANTS = ("global9", "phase16", "model36")
"""The study's models with learned factors."""
LARGE_PREFILLS = "65-2048"
"""Bin of prefill tokens whose steps should be long."""
FAR_PERCENT = 10.0
"""Bias of an experiment beyond which it counts as off on its own: the study's bound for E2E."""


def h1_numbers(study: Study, verdict: Verdict) -> dict[str, object]:
    """Return what the page of H1 cites.

    Parameters
    ----------
    study : Study
        ``h1``.
    verdict : Verdict
        On the same evidence.
    """
    decode = study["correlations"].query("subset == 'pure_decode' and component == 'decode_gemm'")
    pooled, within = (decode[(decode["scope"] == POOLED) == of_all] for of_all in (True, False))
    published = published_h1().query("subset == 'pure_decode' and component == 'decode_gemm'").iloc[0]
    residual = study["mixed_residual"]
    large = residual[residual["prefill_tokens"] == LARGE_PREFILLS]
    return {
        "h1_verdict": verdict.verdict,
        "pooled_r": float(pooled["r"].iloc[0]),
        "within_low": float(within["r"].min()),
        "within_high": float(within["r"].max()),
        "n_pure": int(pooled["n_steps"].iloc[0]),
        "n_scopes": len(within),
        "interval_low": float(within["low"].min()),
        "interval_high": float(within["high"].max()),
        "published_pooled_r": float(published["pearson_r"]),
        "published_pure": int(published["n_steps"]),
        "large_prefills": int(large["n_steps"].sum()),
        "large_residual_ms": float(large["median_residual_us"].median() / US_PER_MS),
        "large_analytical_ms": float(large["analytical_us"].median() / US_PER_MS),
    }


def beside_published_h1(correlations: pd.DataFrame) -> pd.DataFrame:
    """Return the correlations over all steps of an experiment beside the published ones.

    Returns
    -------
    DataFrame
        `experiment_id`, `component`, `n_steps`, `r`, `published`, `low`, `high`.
    """
    published = published_h1_per_experiment().rename(columns={"pearson_r": "published"})
    own = correlations.query("subset == 'all' and scope != 'pooled' and component in ['decode_gemm', 'total']")
    table = own.rename(columns={"scope": "experiment_id"}).merge(
        published, on=["experiment_id", "component"], suffixes=("", "_published")
    )
    return table[["experiment_id", "component", "n_steps", "r", "published", "low", "high"]]


def h2_numbers(study: Study) -> dict[str, object]:
    """Return what the page of H2's fits cites, from the study ``h2``."""
    scores = study["scores"]
    means = mean_over_experiments(scores).query("metric == 'mape_percent'").set_index("variant")
    published = published_h2()
    same = published[published["experiment_id"].isin(scores["experiment_id"])]
    determined = study["variants"].set_index("variant")["n_determined"]
    own = scores[(scores["metric"] == "mape_percent") & scores["variant"].isin(POOLED_VARIANTS)]
    return {
        "rank_global9": int(determined["global9"]),
        **{f"mape_{name}": float(means["value"][name]) for name in ("blackbox", *POOLED_VARIANTS)},
        "n_experiments": int(means["n_experiments"]["model36"]),
        "lowest_end": float(own["low"].min()),
        "highest_end": float(own["high"].max()),
        "n_test_steps": int(own.drop_duplicates("experiment_id")["n_steps"].sum()),
        "published_9": float(published["global9_mape_percent"].mean()),
        "published_36": float(published["model36_mape_percent"].mean()),
        "published_bb": float(published["blackbox_mape_percent"].mean()),
        "published_9_same": float(same["global9_mape_percent"].mean()),
        "published_36_same": float(same["model36_mape_percent"].mean()),
    }


def beside_published_h2(scores: pd.DataFrame) -> pd.DataFrame:
    """Return each experiment's MAPE by variant, ours and as published; NaN where its training features are not public."""
    published = published_h2()
    ours = scores[scores["metric"] == "mape_percent"].pivot(index="experiment_id", columns="variant", values="value")
    table = pd.DataFrame({"experiment_id": published["experiment_id"]})
    for variant in ("blackbox", *POOLED_VARIANTS):
        table[variant] = table["experiment_id"].map(ours[variant])
        if f"{variant}_mape_percent" in published:
            table[f"{variant}_published"] = published[f"{variant}_mape_percent"]
    return table


def baselines_numbers(study: Study) -> dict[str, object]:
    """Return what the page of baselines cites, from the study ``h2``; `best` and `best_log` are variants."""
    means = mean_over_experiments(study["scores"])
    value = means.pivot(index="variant", columns="metric", values="value")
    mape, log_ratio = value["mape_percent"], value["log_accuracy_ratio"]
    best = str(mape.idxmin())
    scores = study["scores"].query("metric == 'mape_percent'")
    ends = scores[scores["variant"] == best]
    return {
        "best": best,
        "best_mape": float(mape[best]),
        "best_low": float(ends["low"].min()),
        "best_high": float(ends["high"].max()),
        "best_log": str(log_ratio.idxmin()),
        "lowest_end": float(scores["low"].min()),
        "constant_mape": float(mape["constant"]),
        "constant_factor": math.exp(log_ratio["constant"]),
        "blackbox_factor": math.exp(log_ratio["blackbox"]),
        "n_experiments": int(means["n_experiments"].max()),
        "published_xgboost": float(published_xgboost()["test_mape_percent"].mean()),
    }


def bias_numbers(bias: pd.DataFrame) -> dict[str, object]:
    """Return what the page of biases cites.

    Parameters
    ----------
    bias : DataFrame
        Table ``bias`` of the study ``h2``.
    """
    published = published_h2()["model36_mspe_percent"]
    groups = bias.drop_duplicates(["by", "group"])
    return {
        "published_mspe": float(published.mean()),
        "published_low": float(published.min()),
        "published_high": float(published.max()),
        "published_above": int((published.abs() > FAR_PERCENT).sum()),
        "n_published": len(published),
        "fewest_steps": int(groups["n_steps"].min()),
        "n_rows": len(bias),
        "n_clear": int(((bias["low"] > 0) | (bias["high"] < 0)).sum()),
    }


def bias_by_group(bias: pd.DataFrame) -> pd.DataFrame:
    """Return the mean signed error by group (`figure`, `n_steps`), a column a variant, in the groups' own order."""
    table = bias.assign(figure=bias["by"] + ": " + bias["group"].astype(str))
    wide = table.pivot(index="figure", columns="variant", values="mspe_percent")
    counts = table.drop_duplicates("figure").set_index("figure")["n_steps"]
    return wide.join(counts).loc[counts.index].reset_index()


def parsimony_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return error and number of parameters by variant, ours (study ``h2``) and as published."""
    means = mean_over_experiments(study["scores"]).query("metric == 'mape_percent'")
    ours = means.rename(columns={"value": "mape_percent"}).merge(study["variants"], on="variant")
    ours = ours[ours["variant"].isin(["raw", "constant", "blackbox", *POOLED_VARIANTS])]
    table, parameters = published_h2(), {"blackbox": 3, "global9": 9, "model36": 36}
    published = pd.DataFrame(
        [(name, n, table[f"{name}_mape_percent"].mean()) for name, n in parameters.items()],
        columns=["variant", "n_parameters", "mape_percent"],
    )
    return ours, published


def parsimony_numbers(study: Study) -> dict[str, object]:
    """Return what the page on numbers of parameters cites, from the study ``h2``."""
    ours, published = (t.set_index("variant") for t in parsimony_tables(study))
    determined = ours["n_determined"]
    scores = study["scores"].query("metric == 'mape_percent'")
    single = scores.pivot(index="experiment_id", columns="variant", values="value")
    gaps = single["global9"] - single["model36"]
    table = published_h2()
    published_gaps = table["global9_mape_percent"] - table["model36_mape_percent"]
    return {
        "gap": _difference(ours["mape_percent"]),
        "gap_low": float(gaps.min()),
        "gap_high": float(gaps.max()),
        "published_gap": _difference(published["mape_percent"]),
        "published_gap_low": float(published_gaps.min()),
        "published_gap_high": float(published_gaps.max()),
        "n_experiments": int(ours["n_experiments"]["global9"]),
        "n36": int(ours["n_parameters"]["model36"]),
        "d9": int(determined["global9"]),
        "d16": int(determined["phase16"]),
        "d36": int(determined["model36"]),
    }


def _difference(mape_percent: pd.Series) -> float:
    """Points that nine parameters are above 36."""
    return float(mape_percent["global9"] - mape_percent["model36"])
