"""What a step's label measures, and what to put in its place.

``step.duration_us`` is taken around ``schedule()`` alone: it is host time, and holds no GPU work. The time of a step is the
interval between two sampled steps, ``(start of j - start of i) / (j - i)``: what the server needed for each step from i to
j, whatever it was spent on. The decode interval of a request (`stepcal.reconstruction.timeline.decode_intervals`) is
the same quantity over a request's life, and is known for every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.units import NS_PER_US, BoolArray, FloatArray

IDLE_DEPTH = 2
"""Running requests at an end of a gap up to which the server may have waited for work in between."""
IDLE_FACTOR = 3.0
"""Times the run's median interval above which such a gap counts as idle: the largest prefill step takes 2.5 times it."""
LONG_GAP_STEPS = 100
"""Steps between samples beyond which their mean says little about the first of them. The longest public gap is 94 steps."""
MAD_TO_SD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
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
    interval: FloatArray, gap: FloatArray, batch: FloatArray, batch_end: FloatArray, usable: BoolArray
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


def stage_starts_ns(
    requests: pd.DataFrame, stages: pd.DataFrame, offsets_us: dict[str, float]
) -> dict[str, list[float]]:
    """Return when each further load stage began on the trace's clock: the arrival of its first request.

    Parameters
    ----------
    requests : DataFrame
        Measured requests.
    stages : DataFrame
        ``load_stages.csv``.
    offsets_us : dict of str to float
        Clock offset of each traced experiment.
    """
    starts = {}
    for name, offset in offsets_us.items():
        sent = stages[stages["experiment_id"] == name].sort_values("stage")["requests"].cumsum().to_numpy()[:-1]
        arrivals = np.sort(requests.loc[requests["experiment_id"] == name, "arrival_time_us"].to_numpy(dtype=float))
        starts[name] = [float((arrivals[n] + offset) * NS_PER_US) for n in sent if n < arrivals.size]
    return starts
