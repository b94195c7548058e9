"""Errors of predicted latencies beside measured ones, and the two baselines that every table carries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from stepcal.datasets.splits import split_starts
from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.experiments.latencies import LATENCIES, WHOLE, measured_latencies
from stepcal.simulator import CompiledStepTime
from stepcal.units import MS_PER_S, PERCENT, US_PER_S

COMPLETED_WITHIN_PERCENT = 10.0
"""An overloaded run counts only if its number of completed requests is within this, as frozen for H2."""


def compare(predicted: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Put predictions beside measurements.

    Returns
    -------
    DataFrame
        `split`, `metric`, `statistic`, `predicted`, `measured`, and the signed `error_percent`; NaN where nothing was
        measured or predicted, which is not evaluable.
    """
    keys = ["split", "metric", "statistic"]
    table = predicted.rename(columns={"value": "predicted"}).merge(
        known.rename(columns={"value": "measured"}), on=keys, how="inner"
    )
    relative = (table["predicted"] - table["measured"]) / table["measured"]
    return table.assign(error_percent=PERCENT * relative.where(table["measured"] > 0))


def mean_errors(comparisons: pd.DataFrame, split: str = WHOLE) -> pd.DataFrame:
    """Return the error of each mean, an experiment and variant a row.

    Parameters
    ----------
    comparisons : DataFrame
        Of `compare`, with `experiment_id`, `variant` and `arrivals` added.
    split : str

    Returns
    -------
    DataFrame
        `experiment_id`, `variant`, `arrivals`, `e2e_error_percent`, `ttft_error_percent`, `tpot_error_percent`,
        `completed_error_percent`, all signed.
    """
    wanted = comparisons[(comparisons["split"] == split) & comparisons["statistic"].isin(["mean", "count"])]
    wanted = wanted[wanted["metric"].isin([*LATENCIES, "completed"])]
    wide = wanted.pivot_table(
        index=["experiment_id", "variant", "arrivals"],
        columns="metric",
        values="error_percent",
        dropna=False,
        observed=True,
        sort=False,
    )
    wide = wide.reindex(columns=[*LATENCIES, "completed"]).rename(columns=lambda m: f"{m}_error_percent")
    return wide.dropna(how="all").reset_index().rename_axis(columns=None)


def judged_error_percent(errors: pd.DataFrame, overloaded: Mapping[str, bool]) -> pd.Series:
    """Return the E2E error that a criterion sees: for an overloaded run no less than the error of its completions.

    A prediction in which nothing completes has no E2E error; for an overloaded run that is a miss, by its completions.
    """
    e2e, completed = errors["e2e_error_percent"].abs(), errors["completed_error_percent"].abs()
    is_overloaded = errors["experiment_id"].map(dict(overloaded)).astype(bool)
    return e2e.where(~is_overloaded, np.fmax(e2e, completed))


def training_mean(experiment: Experiment) -> pd.DataFrame:
    """Predict every mean of an experiment by the mean of its first 60% of arrivals: the least that a model must beat.

    Raises
    ------
    InputError
        If the measured requests are not at hand.
    """
    done = _first_completed(experiment)
    e2e, ttft = float(done["e2e_s"].mean()) * MS_PER_S, float(done["ttft_s"].mean()) * MS_PER_S
    tpot = (e2e - ttft) / max(experiment.workload.output_len - 1, 1)
    means = dict(zip(LATENCIES, (e2e, ttft, tpot), strict=True))
    known = measured_latencies(experiment)
    rows = known[(known["statistic"] == "mean") & known["metric"].isin(LATENCIES)]
    return rows.assign(value=rows["metric"].map(means))


def pace_step_time(experiment: Experiment) -> CompiledStepTime:
    """Return a constant step time: the mean time per output token of the first 60% of arrivals.

    Raises
    ------
    InputError
        If the measured requests are not at hand.
    """
    done = _first_completed(experiment)
    interval_s = (done["e2e_s"] - done["ttft_s"]) / max(experiment.workload.output_len - 1, 1)
    return CompiledStepTime(constant_us=float(interval_s.mean()) * US_PER_S)


def _first_completed(experiment: Experiment) -> pd.DataFrame:
    """Completed requests among the first 60% of arrivals."""
    if experiment.requests is None:
        raise InputError(
            f"The requests of `{experiment.experiment_id}` are not at hand. Set STEPCAL_DATA to a folder with them."
        )
    early = experiment.requests.iloc[: split_starts(len(experiment.requests))[0]]
    return early[~early["has_error"]]
