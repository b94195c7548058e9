"""What a step's label measures, and what to put in its place.

``step.duration_us`` is taken around ``schedule()`` alone: it is host time, and holds no GPU work. The time of a step is the
interval between two sampled steps, ``(start of j - start of i) / (j - i)``: what the server needed for each step from i to
j, whatever it was spent on. The decode interval of a request (`stepcal.reconstruction.decode_intervals`) is the same
quantity over a request's life, and is known for every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.errors import InputError
from stepcal.metrics import PERCENT, pearson_r

FloatArray = NDArray[np.float64]

NS_PER_US = 1e3
IDLE_DEPTH = 2
"""Running requests at an end of a gap up to which the server may have waited for work in between."""
IDLE_FACTOR = 3.0
"""Times the run's median interval above which such a gap counts as idle: the largest prefill step takes 2.5 times it."""
LONG_GAP_STEPS = 100
"""Steps between samples beyond which their mean says little about the first of them. The longest public gap is 94 steps."""
MAD_TO_SD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LARGE_BATCH = 60
CONTENDED_US = 1_500.0
"""Label that no batch of 128 reaches at 8 to 9 µs a request; above it the call was held up. Few labels lie near it."""
BATCH_BINS = (0, 10, 20, 30, 40, 60, 80, 100, 128)

LAST, STAGE_CHANGE, IDLE, LONG_GAP = "last sample", "stage change", "idle", "long gap"
EXCLUSIONS = (LAST, STAGE_CHANGE, IDLE, LONG_GAP)
"""Why a sampled step has no usable interval, in the order in which the rules are asked."""
STEP_COLUMNS = (
    "experiment_id",
    "step_id",
    "ts_start_ns",
    "duration_us",
    "running_depth",
    "num_prefill_reqs",
    "num_decode_reqs",
)


def step_intervals(
    steps: pd.DataFrame, *, stage_starts_ns: Mapping[str, Sequence[float]] | None = None
) -> pd.DataFrame:
    """Return the mean step time between each sampled step and the next.

    With asynchronous scheduling ``schedule()`` of step i + 1 runs while the GPU computes step i, and that of step i + 2 when
    it is done: the GPU time of step i lies in the interval *after* step i + 1. Between samples that are many steps apart it
    makes no difference; a single long step shows one interval late.

    Parameters
    ----------
    steps : DataFrame
        Step rows of one or more experiments.
    stage_starts_ns : mapping of str to sequence of float, optional
        When each further load stage of an experiment began, on the trace's clock. A gap that holds such a moment is
        excluded. Without it, only gaps that look idle are.

    Returns
    -------
    DataFrame
        One row a sampled step, in the order of `experiment_id`, `step_id`: `label_us` (the published label), `gap_steps`,
        `interval_us`, `interval_sd_us`, `batch_start`, `batch_end` (scheduled requests at both ends), `running_depth`,
        `exclusion` (empty or one of `EXCLUSIONS`), `usable`.

        `interval_sd_us` is the standard error of the interval as a label of the sampled step itself: of its `gap_steps`
        steps one is the sampled one, the others scatter (``s sqrt(1 - 1/gap_steps)``, with s from neighbouring samples) and
        drift with the batch (half the change of the batch times the time of a request). Infinite where there is none.

    Raises
    ------
    InputError
        If a column is missing, an id occurs twice in an experiment, or time does not grow with the id.
    """
    missing = [c for c in STEP_COLUMNS if c not in steps]
    if missing:
        raise InputError(f"`steps` lacks {', '.join(missing)}; it needs {', '.join(STEP_COLUMNS)}.")
    ordered = steps.sort_values(["experiment_id", "step_id"], kind="stable")
    starts = dict(stage_starts_ns or {})
    tables = [
        _intervals_of_run(own, np.asarray(starts.get(str(name), ()), dtype=float))
        for name, own in ordered.groupby("experiment_id", sort=True)
    ]
    return pd.concat(tables, ignore_index=True)


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
        Of `stepcal.reconstruction.request_lives`, the same experiment.
    offset_us : float
        The trace's clock minus the clients' (`stepcal.reconstruction_checks.estimate_offset_us`).

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
        Of `stepcal.reconstruction.decode_intervals`.
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


def _intervals_of_run(own: pd.DataFrame, stage_starts_ns: FloatArray) -> pd.DataFrame:
    number = own["step_id"].to_numpy(dtype=float)
    start_us = own["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US
    gap, elapsed = np.diff(number), np.diff(start_us)
    if np.any(gap <= 0) or np.any(elapsed <= 0):
        row = int(np.flatnonzero((gap <= 0) | (elapsed <= 0))[0])
        raise InputError(
            f"Steps {number[row]:.0f} and {number[row + 1]:.0f} of `{own['experiment_id'].iloc[0]}` start "
            f"{elapsed[row]:.0f} µs apart; ids must be distinct and time must grow with them. Are these rows of one server?"
        )
    gap, interval = np.append(gap, 0.0), np.append(elapsed / gap, np.nan)
    batch = (own["num_prefill_reqs"] + own["num_decode_reqs"]).to_numpy(dtype=float)
    batch_end = np.append(batch[1:], np.nan)
    depth = own["running_depth"].to_numpy(dtype=float)
    quiet = np.minimum(depth, np.append(depth[1:], np.inf)) <= IDLE_DEPTH
    begun = np.searchsorted(np.sort(stage_starts_ns), own["ts_start_ns"].to_numpy(dtype=float))
    rules = {
        LAST: gap == 0,
        STAGE_CHANGE: np.append(np.diff(begun) > 0, False),
        IDLE: quiet & (interval > IDLE_FACTOR * np.nanmedian(interval)) if len(own) > 1 else np.zeros(1, dtype=bool),
        LONG_GAP: gap > LONG_GAP_STEPS,
    }
    exclusion = np.select(list(rules.values()), list(rules), default="")
    usable = exclusion == ""
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = _standard_error(interval, gap, batch, batch_end, usable)
    return pd.DataFrame(
        {
            "experiment_id": own["experiment_id"].to_numpy(),
            "step_id": own["step_id"].to_numpy(),
            "label_us": own["duration_us"].to_numpy(dtype=float),
            "gap_steps": gap.astype(int),
            "interval_us": interval,
            "interval_sd_us": np.where(usable, sd, np.inf),
            "batch_start": batch,
            "batch_end": batch_end,
            "running_depth": depth.astype(int),
            "exclusion": exclusion,
            "usable": usable,
        }
    )


def _standard_error(
    interval: FloatArray, gap: FloatArray, batch: FloatArray, batch_end: FloatArray, usable: NDArray[np.bool_]
) -> FloatArray:
    """How far the mean over a gap may be from the time of its first step; see `step_intervals`."""
    if usable.sum() < 3:
        return np.full(interval.size, np.inf)
    slope, level = (
        np.polyfit(batch[usable], interval[usable], 1) if np.ptp(batch[usable]) else (0.0, interval[usable].mean())
    )
    single = usable & (gap == 1)
    chosen = single if single.sum() >= 3 else usable
    residual = interval[chosen] - (level + slope * batch[chosen])
    scatter = MAD_TO_SD * float(np.median(np.abs(residual - np.median(residual))))
    drift = slope * (batch_end - batch) / 2
    return np.sqrt(scatter**2 * np.maximum(1 - 1 / np.maximum(gap, 1), 0) + drift**2)
