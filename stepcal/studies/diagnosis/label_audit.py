"""The study ``label_audit``: what the published label measures, beside the time that a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from stepcal.metrics import pearson_r
from stepcal.reconstruction.checks import (
    estimate_offset_us,
)
from stepcal.reconstruction.labels import EXCLUSIONS, stage_starts_ns, step_intervals
from stepcal.reconstruction.timeline import (
    build_timeline,
    decode_intervals,
    request_lives,
)
from stepcal.units import NS_PER_US, PERCENT, FloatArray

Tables = dict[str, pd.DataFrame]
LARGE_PREFILL_TOKENS = 64
"""Prefill tokens above which a step is visibly longer: most cached prompts leave at most one block of 16."""
LARGE_BATCH = 60
CONTENDED_US = 1_500.0
"""Label that no batch of 128 reaches at 8 to 9 µs a request; above it the call was held up. Few labels lie near it."""
BATCH_BINS = (0, 10, 20, 30, 40, 60, 80, 100, 128)


def run_label_audit(
    steps: pd.DataFrame,
    requests: pd.DataFrame,
    predictions: pd.DataFrame,
    experiments: pd.DataFrame,
    stages: pd.DataFrame,
) -> tuple[Tables, dict[str, str]]:
    """Compare the published label with the time that a step takes.

    Parameters
    ----------
    steps : DataFrame
        The public step traces.
    requests : DataFrame
        The measured requests of all runs.
    predictions : DataFrame
        The published test rows of all runs.
    experiments, stages : DataFrame
        ``experiments.csv`` and ``load_stages.csv``.

    Returns
    -------
    tables : dict
        ``label_vs_interval``, ``interval_error`` (uncertainty of the interval as a label), ``steps_per_token``,
        ``large_prefills`` (after which step the time of a prefill shows), ``by_running`` (label and interval against the
        batch), ``modes`` (fast and slow calls at large batches) and ``by_run`` (the label in all 16 runs).
    texts : dict
        Empty.
    """
    lives = lives_of_traced(steps, requests, experiments)
    offsets = {name: estimate_offset_us(rows_of(steps, name), build_timeline(own)) for name, own in lives.items()}
    intervals = step_intervals(steps, stage_starts_ns=stage_starts_ns(requests, stages, offsets))
    per_token = []
    for name, own in lives.items():
        counted = steps_per_token(rows_of(steps, name), own, offset_us=offsets[name])
        p1, median, p99 = np.percentile(counted, [1, 50, 99])
        error = float(np.abs(counted - 1).mean())
        row = {"experiment_id": name, "n_requests": counted.size, "p1": float(p1), "median": float(median)}
        per_token.append({**row, "p99": float(p99), "mean_abs_error_percent": PERCENT * error})
    tables = {
        "label_vs_interval": label_against_interval(intervals),
        "interval_error": _interval_error(intervals),
        "steps_per_token": pd.DataFrame(per_token),
        "large_prefills": large_prefills(steps, intervals),
        "by_running": _by_running(steps, intervals),
        "modes": label_modes(steps),
        "by_run": label_by_run(predictions, decode_intervals(requests, experiments), experiments),
    }
    return tables, {}


def large_prefills(steps: pd.DataFrame, intervals: pd.DataFrame) -> pd.DataFrame:
    """Return the sampled large prefills whose next step was sampled too: does the first or the second interval hold them?

    Parameters
    ----------
    steps : DataFrame
    intervals : DataFrame
        Of `stepcal.reconstruction.labels.step_intervals`, the same steps.

    Returns
    -------
    DataFrame
        `experiment_id`, `step_id`, `prefill_tokens`, `typical_us` (median interval of the run), `excess_own_us` (time
        above it until the next step was scheduled), `next_prefill_tokens`, `excess_next_us` (above it from there to the
        next sample).
    """
    both = intervals.merge(
        steps[["experiment_id", "step_id", "prefill_tokens"]], on=["experiment_id", "step_id"], validate="one_to_one"
    )
    typical = both["interval_us"].where(both["usable"]).groupby(both["experiment_id"]).transform("median")
    both["excess"] = (both["interval_us"] - typical) * both["gap_steps"]
    after = both.groupby("experiment_id")[["prefill_tokens", "excess"]].shift(-1)
    chosen = (both["prefill_tokens"] > LARGE_PREFILL_TOKENS) & (both["gap_steps"] == 1) & after["excess"].notna()
    return pd.DataFrame(
        {
            "experiment_id": both["experiment_id"],
            "step_id": both["step_id"],
            "prefill_tokens": both["prefill_tokens"],
            "typical_us": typical,
            "excess_own_us": both["excess"],
            "next_prefill_tokens": after["prefill_tokens"],
            "excess_next_us": after["excess"],
        }
    )[chosen].reset_index(drop=True)


def lives_of_traced(steps: pd.DataFrame, requests: pd.DataFrame, experiments: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return what happened to each request of every run that has steps too, by experiment (`request_lives`)."""
    names = sorted(set(steps["experiment_id"]) & set(requests["experiment_id"]))
    return {str(name): request_lives(rows_of(requests, name), experiments) for name in names}


def rows_of(table: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Return the rows of one experiment."""
    return table[table["experiment_id"] == experiment]


def _interval_error(intervals: pd.DataFrame) -> pd.DataFrame:
    usable = intervals[intervals["usable"]]
    usable = usable.assign(sd_percent=PERCENT * usable["interval_sd_us"] / usable["interval_us"])
    grouped = usable.groupby("experiment_id", sort=True)
    return pd.DataFrame(
        {
            "n_usable": grouped.size(),
            "gap_median_steps": grouped["gap_steps"].median(),
            "gap_longest_steps": grouped["gap_steps"].max(),
            "sd_median_us": grouped["interval_sd_us"].median(),
            "sd_median_percent": grouped["sd_percent"].median(),
            "sd_p99_percent": grouped["sd_percent"].quantile(0.99),
        }
    ).reset_index()


def _by_running(steps: pd.DataFrame, intervals: pd.DataFrame) -> pd.DataFrame:
    keys = ["experiment_id", "step_id"]
    known = steps.merge(intervals.loc[intervals["usable"], [*keys, "interval_us"]], on=keys, validate="one_to_one")
    label = label_by_running(known).assign(quantity="label")
    interval = label_by_running(known, column="interval_us").assign(quantity="interval")
    return pd.concat([label, interval], ignore_index=True)


def label_against_interval(intervals: pd.DataFrame) -> pd.DataFrame:
    """Compare the published label with the interval, per experiment.

    Parameters
    ----------
    intervals : DataFrame
        Of `step_intervals`.

    Returns
    -------
    DataFrame
        `experiment_id`, `n_steps`, `n_usable`, a column ``n_<rule>`` for each of `EXCLUSIONS`, `label_median_us`,
        `interval_median_us`, `ratio_median` (median of interval over label), `wall_share_percent` (label times gap, summed,
        over the time between first and last sample), `spearman` (usable intervals), `pearson_raw` (every interval),
        `pearson_usable`.
    """
    rows = []
    for experiment, own in intervals.groupby("experiment_id", sort=True):
        known, usable = own[own["gap_steps"] > 0], own[own["usable"]]
        counts = {f"n_{rule.replace(' ', '_')}": int((own["exclusion"] == rule).sum()) for rule in EXCLUSIONS}
        spent = float((known["label_us"] * known["gap_steps"]).sum())
        rows.append(
            {
                "experiment_id": experiment,
                "n_steps": len(own),
                "n_usable": len(usable),
                **counts,
                "label_median_us": float(usable["label_us"].median()),
                "interval_median_us": float(usable["interval_us"].median()),
                "ratio_median": float((usable["interval_us"] / usable["label_us"]).median()),
                "wall_share_percent": PERCENT * spent / float((known["interval_us"] * known["gap_steps"]).sum()),
                "spearman": pearson_r(usable["label_us"].rank(), usable["interval_us"].rank()),
                "pearson_raw": pearson_r(known["label_us"], known["interval_us"]),
                "pearson_usable": pearson_r(usable["label_us"], usable["interval_us"]),
            }
        )
    return pd.DataFrame(rows)


def steps_per_token(steps: pd.DataFrame, lives: pd.DataFrame, *, offset_us: float) -> FloatArray:
    """Steps that the trace counts in each completed request's decode life, over the tokens that it generated in it.

    One, if a step makes one token a request and the interval is a step's time. Step numbers between samples are
    interpolated in time.

    Parameters
    ----------
    steps : DataFrame
        Step rows of one experiment.
    lives : DataFrame
        Of `stepcal.reconstruction.timeline.request_lives`, the same experiment.
    offset_us : float
        The trace's clock minus the clients' (`stepcal.reconstruction.checks.estimate_offset_us`).

    Returns
    -------
    ndarray of float
        For completed requests that decode wholly between the first and the last sample.
    """
    ordered = steps.sort_values("step_id")
    time, number = ordered["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US - offset_us, ordered["step_id"].to_numpy()
    own = lives[lives["completed"] & (lives["first_token_us"] >= time[0]) & (lives["end_us"] <= time[-1])]
    counted = np.interp(own["end_us"], time, number) - np.interp(own["first_token_us"], time, number)
    return np.asarray(counted / (own["output_tokens"].to_numpy() - 1), dtype=float)


def label_by_running(
    steps: pd.DataFrame, *, column: str = "duration_us", bins: Sequence[float] = BATCH_BINS
) -> pd.DataFrame:
    """Return a label of decode-only steps against the requests in the batch, in bins, per experiment and pooled.

    Parameters
    ----------
    steps : DataFrame
    column : str
        The label, microseconds.
    bins : sequence of float
        Edges; a bin excludes its lower and includes its upper one.

    Returns
    -------
    DataFrame
        `experiment_id` (``pooled`` too), `bin`, `requests` (median), `n_steps`, `p10_us`, `median_us`, `p90_us`,
        `per_request_us` (median of label over requests).
    """
    decode = steps[(steps["prefill_tokens"] == 0) & (steps["num_decode_reqs"] > 0)]
    both = pd.concat([decode, decode.assign(experiment_id="pooled")], ignore_index=True)
    requests = both["num_decode_reqs"]
    names = [f"{int(low) + 1}-{int(high)}" for low, high in pairwise(bins)]
    both = both.assign(bin=pd.cut(requests, list(bins), labels=names), per_request=both[column] / requests)
    rows = []
    for (experiment, name), own in both.groupby(["experiment_id", "bin"], observed=True, sort=True):
        p10, median, p90 = np.percentile(own[column], [10, 50, 90])
        rows.append(
            {
                "experiment_id": experiment,
                "bin": str(name),
                "requests": float(own["num_decode_reqs"].median()),
                "n_steps": len(own),
                "p10_us": float(p10),
                "median_us": float(median),
                "p90_us": float(p90),
                "per_request_us": float(own["per_request"].median()),
            }
        )
    return pd.DataFrame(rows)


def label_modes(steps: pd.DataFrame) -> pd.DataFrame:
    """Split the label of decode-only steps with a large batch at `CONTENDED_US`: a fast kind of call and a slow one.

    Returns
    -------
    DataFrame
        `experiment_id`, `n_steps`, `slow_percent` (of the steps), `fast_median_us`, `slow_median_us`, `fast_per_request_us`;
        steps of at least `LARGE_BATCH` requests, a run that has some a row.
    """
    large = steps[(steps["prefill_tokens"] == 0) & (steps["num_decode_reqs"] >= LARGE_BATCH)]
    rows = []
    for experiment, own in large.groupby("experiment_id", sort=True):
        is_slow = own["duration_us"] > CONTENDED_US
        fast, slow = own[~is_slow], own[is_slow]
        rows.append(
            {
                "experiment_id": experiment,
                "n_steps": len(own),
                "slow_percent": PERCENT * float(is_slow.mean()),
                "fast_median_us": float(fast["duration_us"].median()),
                "slow_median_us": float(slow["duration_us"].median()),
                "fast_per_request_us": float((fast["duration_us"] / fast["num_decode_reqs"]).median()),
            }
        )
    return pd.DataFrame(rows)


def label_by_run(predictions: pd.DataFrame, decode: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    """Return the label of the published test rows of every run beside what its requests say a step takes.

    Parameters
    ----------
    predictions : DataFrame
        The published test rows (`stepcal.datasets.load_xgboost_predictions`), all 16 runs.
    decode : DataFrame
        Of `stepcal.reconstruction.timeline.decode_intervals`.
    experiments : DataFrame
        Rows of ``experiments.csv``.

    Returns
    -------
    DataFrame
        `experiment_id`, `overloaded`, `n_steps`, `label_p10_us`, `label_median_us`, `label_p90_us`, and over the completed
        requests that arrived last (a fifth of them): `batch`, `waiting` (means), `interval_median_us`, and
        `label_share_percent`, label over interval, of the medians. In overloaded runs the two are not of the same minutes:
        the test rows are of the run's end, when nothing completes any more.
    """
    rows = []
    overloaded = experiments.set_index("experiment_id")["overloaded"]
    for experiment, own in predictions.groupby("experiment_id", sort=True):
        label = own["duration_us"].to_numpy(dtype=float)
        p10, median, p90 = np.percentile(label, [10, 50, 90])
        served = decode[decode["experiment_id"] == experiment].sort_values("arrival_us")
        late = served.iloc[-max(len(served) // 5, 1) :]
        interval = float(late["interval_us"].median())
        rows.append(
            {
                "experiment_id": experiment,
                "overloaded": bool(overloaded[experiment]),
                "n_steps": len(own),
                "label_p10_us": float(p10),
                "label_median_us": float(median),
                "label_p90_us": float(p90),
                "batch": float(late["batch"].mean()),
                "waiting": float(late["waiting"].mean()),
                "interval_median_us": interval,
                "label_share_percent": PERCENT * float(median) / interval,
            }
        )
    return pd.DataFrame(rows)
