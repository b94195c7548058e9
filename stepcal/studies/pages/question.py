"""What the page on question and data cites: the 16 runs as measured, and our copy beside the study's own figures."""

from __future__ import annotations

import pandas as pd

from stepcal.datasets import experiments, measured, published_h2, published_xgboost
from stepcal.studies.study import Study

WHOLE_RUN = -1
"""Stage of figures of a whole run in the table of measured figures."""


def measured_runs() -> pd.DataFrame:
    """Return the 16 experiments with their measured figures of the whole run, a column a metric and statistic.

    Returns
    -------
    DataFrame
        The columns of `stepcal.datasets.experiments`, and ``e2e_mean``, ``e2e_p99``, ``ttft_mean`` and so on (ms).
    """
    table = measured()
    whole = table[table["stage"] == WHOLE_RUN]
    wide = whole.assign(key=whole["metric"] + "_" + whole["statistic"]).pivot(
        index="experiment_id", columns="key", values="value"
    )
    return experiments().merge(wide.reset_index(), on="experiment_id")


def regression_anchors(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the regression's MAPE on each experiment, ours and as published.

    Parameters
    ----------
    scores : DataFrame
        Table ``scores`` of the study ``h2``.

    Returns
    -------
    DataFrame
        `experiment_id`, `ours`, `published` (%), and `relative_difference`.
    """
    published = published_h2().set_index("experiment_id")["blackbox_mape_percent"]
    chosen = (scores["variant"] == "blackbox") & (scores["metric"] == "mape_percent")
    ours = scores[chosen].set_index("experiment_id")["value"]
    table = ours.rename("ours").to_frame().join(published.rename("published")).reset_index()
    return table.assign(relative_difference=(table["ours"] / table["published"] - 1).abs())


def rescored_predictions(study: Study) -> pd.DataFrame:
    """Return the published XGBoost predictions as scored here (study ``published_predictions``) and as published."""
    published = published_xgboost()[["experiment_id", "test_mape_percent"]]
    return study["rescored"].merge(published, on="experiment_id")


def question_numbers(runs: pd.DataFrame, anchors: pd.DataFrame, rescored: pd.DataFrame) -> dict[str, object]:
    """Return what the page cites.

    Parameters
    ----------
    runs, anchors, rescored : DataFrame
        Of `measured_runs`, `regression_anchors` and `rescored_predictions`.
    """
    return {
        "n_overloaded": int(runs["overloaded"].sum()),
        "n_requests": int(runs["requests_requested"].sum()),
        "n_failed": int((runs["requests_requested"] - runs["requests_completed"]).sum()),
        "anchor_worst": float(anchors["relative_difference"].max()),
        "n_anchors": len(anchors),
        "xgboost_mean": float(rescored["mape_percent"].mean()),
        "xgboost_worst": float((rescored["mape_percent"] - rescored["test_mape_percent"]).abs().max()),
        "xgboost_steps": int(rescored["n_steps"].sum()),
        "n_rescored": len(rescored),
    }
