"""What the label says about KV offloading: where ``schedule()`` jumps, by how much, and whether the step waits for it.

The pool of the 16 servers holds ``P`` blocks; a step with ``R`` running requests costs the scheduler ``t R + k X P``, where
``X`` requests are rejected (`stepcal.specs.kv_offloading.rejected_requests`), once the blocks in use pass ``P``.
Pure functions on
tables: traces, published test rows, and what the real scheduler did on our CPU (``tools/time_vllm_offloading.py``).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd

from stepcal.datasets.splits import temporal_split
from stepcal.reconstruction.checks import blocks_in_use
from stepcal.reconstruction.labels import step_intervals
from stepcal.reconstruction.timeline import DECODING, PREFILLING, WAITING, Timeline, build_timeline, request_lives
from stepcal.specs.architecture import load_architecture
from stepcal.specs.kv_offloading import offload_blocks, rejected_requests
from stepcal.studies.diagnosis.offload_pool import N_DRAWS, N_PIECES, architecture_of, fit_pool, with_held_blocks
from stepcal.studies.diagnosis.pool_hits import pool_hits
from stepcal.studies.published_runs import STUDY_OFFLOAD_GIB, load_experiments
from stepcal.studies.results.records import read_recorded
from stepcal.units import PERCENT, FloatArray

Tables = dict[str, pd.DataFrame]

TIMING = "offload_timing"
"""Recording of the real scheduler on a CPU."""
NONE, STOCK, SMALLER, OUTPUTS = "none", "stock", "smaller", "outputs"
"""Offloading off; as released; as released with a smaller pool; with the blocks of generated tokens stored too."""
OVERLOADED = "reasoning"
HELD_BIN_BLOCKS = 200
MIN_STEPS = 20
MIN_CALLS = 100
SMOOTHING_SAMPLES = 9
LARGE_PREFILL_TOKENS = 64
LATE_BIN_US = 40e6
GRID_US = 1e6
LATE_SHARE = 0.8
"""The published test rows are the last fifth of a run's sampled steps."""


def run_offloading(
    steps: pd.DataFrame,
    requests: pd.DataFrame,
    predictions: pd.DataFrame,
    experiments: pd.DataFrame,
    *,
    pool_gib: float = STUDY_OFFLOAD_GIB,
) -> tuple[Tables, dict[str, str]]:
    """Put together what speaks for a full offload pool as the cause of the label's milliseconds.

    Parameters
    ----------
    steps, requests, predictions : DataFrame
        The public step traces, the measured requests, and the published test rows of all runs.
    experiments : DataFrame
        ``experiments.csv``.
    pool_gib : float
        Size of the pool that the label is put against; the fit of the pool itself knows nothing of it.

    Returns
    -------
    tables : dict
        ``by_held``, ``pool_fit``, ``pool_profile``, ``slopes``, ``labels``, ``late``, ``pool_hits``; see the functions of
        this module and of `pool_hits`.
    texts : dict
        Empty.
    """
    timing = read_recorded(TIMING).tables["timing"]
    prompt_tokens = requests.groupby("experiment_id", observed=True)["prompt_tokens"].median()
    fits, profile = fit_pool(temporal_split(steps).train, experiments, prompt_tokens)
    return {
        "by_held": label_by_held(steps, gib=pool_gib),
        "pool_fit": fits,
        "pool_profile": profile,
        "slopes": interval_slopes(steps, gib=pool_gib),
        "labels": predicted_labels(predictions, requests, experiments, timing, gib=pool_gib),
        "late": late_intervals(predictions, requests, experiments),
        "pool_hits": pool_hits(load_experiments()),
    }, {}


def label_by_held(steps: pd.DataFrame, *, gib: float = STUDY_OFFLOAD_GIB) -> pd.DataFrame:
    """Return the label of decode-only steps against the KV blocks in use, in bins of `HELD_BIN_BLOCKS`.

    Returns
    -------
    DataFrame
        `experiment_id`, `pool_blocks` (that `gib` hold), `held_blocks` and `running` (medians), `n_steps`, `p10_us`,
        `median_us`, `p90_us`, `per_request_us` (median of label over running requests).
    """
    decode = with_held_blocks(steps[(steps["prefill_tokens"] == 0) & (steps["running_depth"] > 0)])
    rows = []
    for experiment, run in decode.groupby("experiment_id", sort=True):
        pool = offload_blocks(architecture_of(run), gib)
        for _, own in run.groupby(run["held_blocks"] // HELD_BIN_BLOCKS, sort=True):
            if len(own) < MIN_STEPS:
                continue
            p10, median, p90 = np.percentile(own["duration_us"], [10, 50, 90])
            rows.append(
                {
                    "experiment_id": experiment,
                    "pool_blocks": pool,
                    "held_blocks": float(own["held_blocks"].median()),
                    "running": float(own["running_depth"].median()),
                    "n_steps": len(own),
                    "p10_us": float(p10),
                    "median_us": float(median),
                    "p90_us": float(p90),
                    "per_request_us": float((own["duration_us"] / own["running_depth"]).median()),
                }
            )
    return pd.DataFrame(rows)


def interval_slopes(steps: pd.DataFrame, *, gib: float = STUDY_OFFLOAD_GIB) -> pd.DataFrame:
    """Return by how much the interval between steps grows with the label at a fixed batch, where the pool rejects.

    Training and validation steps with more blocks in use than the pool has; both quantities as deviations from their mean
    at the same number of requests. A step that waits for the scheduler has slope one, one that overlaps with it zero.
    The label is of one step and the interval of all up to the next sample, so a label that varied from step to step would
    flatten the slope: `label_autocorrelation` says that it does not, and ``smoothed`` rows take running means of both.

    Returns
    -------
    DataFrame
        `experiment_id`, `smoothed`, `n_steps`, `label_p10_us`, `label_p90_us`, `interval_median_us`, `slope`, `low`, `high`
        (95%, contiguous pieces drawn anew), `label_autocorrelation` (of consecutive steps, where both were sampled).
    """
    split = temporal_split(steps)
    known = pd.concat([split.train, split.valid], ignore_index=True)
    intervals = step_intervals(known)
    table = with_held_blocks(known).merge(
        intervals[["experiment_id", "step_id", "gap_steps", "interval_us", "usable"]],
        on=["experiment_id", "step_id"],
        validate="one_to_one",
    )
    rows = []
    for experiment, run in table.groupby("experiment_id", sort=True):
        own = run.sort_values("step_id")
        is_above = own["held_blocks"] > offload_blocks(architecture_of(own), gib)
        chosen = is_above & own["usable"] & (own["prefill_tokens"] <= LARGE_PREFILL_TOKENS)
        follows = chosen & (own["gap_steps"] == 1)
        autocorrelation = float(own["duration_us"][follows].corr(own["duration_us"].shift(-1)[follows]))
        for smoothed in (False, True):
            values = own[["duration_us", "interval_us"]]
            if smoothed:
                values = values.rolling(SMOOTHING_SAMPLES, center=True).mean()
            values = values.assign(requests=own["num_prefill_reqs"] + own["num_decode_reqs"])[chosen].dropna()
            slope, low, high = _slope_at_fixed_batch(values)
            rows.append(
                {
                    "experiment_id": experiment,
                    "smoothed": smoothed,
                    "n_steps": len(values),
                    "label_p10_us": float(values["duration_us"].quantile(0.1)),
                    "label_p90_us": float(values["duration_us"].quantile(0.9)),
                    "interval_median_us": float(values["interval_us"].median()),
                    "slope": slope,
                    "low": low,
                    "high": high,
                    "label_autocorrelation": autocorrelation,
                }
            )
    return pd.DataFrame(rows)


def steady_timing(timing: pd.DataFrame) -> pd.DataFrame:
    """Return the overloaded rows of the CPU timing: most running requests with at least `MIN_CALLS` calls, a case a row.

    Returns
    -------
    DataFrame
        `model`, `offload`, `pool_blocks`, `running`, `held_blocks`, `output_tokens`, `rejected`, `p10_us`, `p50_us`,
        `p90_us`, `n_calls`, and `rejection_us`: median above that with offloading off, over the requests rejected (NaN
        where none is).
    """
    own = timing[(timing["workload"] == OVERLOADED) & (timing["n_calls"] >= MIN_CALLS)]
    fullest = own.loc[own.groupby(["model", "offload"], sort=True)["running"].idxmax()].reset_index(drop=True)
    off = fullest[fullest["offload"] == NONE].set_index("model")["p50_us"]
    more = fullest["p50_us"] - fullest["model"].map(off)
    fullest["rejection_us"] = (more / fullest["rejected"]).where(fullest["rejected"] > 1)
    columns = ["model", "offload", "pool_blocks", "running", "held_blocks", "output_tokens", "rejected"]
    return fullest[[*columns, "p10_us", "p50_us", "p90_us", "n_calls", "rejection_us"]]


def rejection_cost(timing: pd.DataFrame) -> tuple[float, float]:
    """Return what a rejection costs our CPU: microseconds whatever the pool, and microseconds a block of the pool.

    Least squares of relative errors over the steady cases in which requests are rejected.
    """
    rows = steady_timing(timing).dropna(subset=["rejection_us"])
    cost = rows["rejection_us"].to_numpy(dtype=float)
    design = np.column_stack([np.ones(len(rows)), rows["pool_blocks"].to_numpy(dtype=float)])
    constant, block = np.linalg.lstsq(design / cost[:, None], np.ones(len(rows)), rcond=None)[0]
    return float(constant), float(block)


def request_cost_us(timing: pd.DataFrame) -> float:
    """Return what a running request costs our CPU with offloading off, microseconds (median over the steady cases)."""
    rows = steady_timing(timing)
    off = rows[rows["offload"] == NONE]
    return float((off["p50_us"] / off["running"]).median())


def estimated_rejections(timing: pd.DataFrame) -> pd.DataFrame:
    """Put our estimate of rejected requests beside the real scheduler's, in the bins of the CPU timing.

    Returns
    -------
    DataFrame
        The rows in which generated tokens are stored too, and `estimated`.
    """
    own = timing[timing["offload"] == OUTPUTS].reset_index(drop=True)
    columns = ("running", "held_blocks", "output_tokens", "pool_blocks")
    values = zip(*(own[c].astype(float) for c in columns), strict=True)
    estimated = [rejected_requests(r, held, output, pool_blocks=int(pool))[0] for r, held, output, pool in values]
    return own.assign(estimated=estimated)


def predicted_labels(
    predictions: pd.DataFrame,
    requests: pd.DataFrame,
    experiments: pd.DataFrame,
    timing: pd.DataFrame,
    *,
    gib: float = STUDY_OFFLOAD_GIB,
) -> pd.DataFrame:
    """Predict the label of every run's published test rows from the CPU timing, with nothing fitted to a server.

    The batches are rebuilt from requests, the pool has `gib`, and a running request and a rejection cost what
    they cost our CPU.

    Returns
    -------
    DataFrame
        `experiment_id`, `overloaded`, `pool_blocks`, and over the last fifth of the run's steps (medians): `running`,
        `held_blocks`, `rejected`, `label_us` (published), `predicted_us`, `without_pool_us`, `ratio` (predicted over
        published).
    """
    constant, block = rejection_cost(timing)
    per_request = request_cost_us(timing)
    rows = []
    for _, run in experiments.iterrows():
        name = str(run["experiment_id"])
        published, own = (t[t["experiment_id"] == name] for t in (predictions, requests))
        if published.empty or own.empty:
            continue
        lives = request_lives(own, experiments)
        timeline = build_timeline(lives)
        times, done = _steps_over_time(timeline)
        late = np.interp(np.linspace(LATE_SHARE, 1.0, len(published)), done / done[-1], times)
        now = timeline.at(late)
        running = (now[DECODING] + now[PREFILLING]).to_numpy(dtype=float)
        held = blocks_in_use(lives, late, run)
        pool = offload_blocks(load_architecture(str(run["model"])), gib)
        rejected = rejected_requests(running, held, float(run["run_output_tokens"]), pool_blocks=pool)
        predicted = per_request * running + rejected * (constant + block * pool)
        label = float(published["duration_us"].median())
        rows.append(
            {
                "experiment_id": name,
                "overloaded": bool(run["overloaded"]),
                "pool_blocks": pool,
                "running": float(np.median(running)),
                "held_blocks": float(np.median(held)),
                "rejected": float(np.median(rejected)),
                "label_us": label,
                "predicted_us": float(np.median(predicted)),
                "without_pool_us": per_request * float(np.median(running)),
                "ratio": float(np.median(predicted)) / label,
            }
        )
    return pd.DataFrame(rows)


def late_intervals(predictions: pd.DataFrame, requests: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    """Put label and decode interval of the same time beside each other, where an overloaded run still completes requests.

    A published test row has a step number and no time: numbers become times through the steps that completed requests
    count, one for each token.

    Returns
    -------
    DataFrame
        `experiment_id`, `time_s`, `n_steps`, `label_us`, `interval_us` (medians), `running`, `waiting` (means),
        `share_percent` (label over interval), in bins of `LATE_BIN_US`.
    """
    rows = []
    for name in experiments.loc[experiments["overloaded"], "experiment_id"]:
        own = requests[requests["experiment_id"] == name]
        published = predictions[predictions["experiment_id"] == name].sort_values("step_id")
        if own.empty or published.empty:
            continue
        lives = request_lives(own, experiments)
        timeline, completed = build_timeline(lives), build_timeline(lives[lives["completed"]])
        times, done = _steps_over_time(timeline)
        at = np.interp(published["step_id"].to_numpy(dtype=float), done, times, right=np.nan)
        row = np.clip(np.searchsorted(completed.times_us, at, side="right") - 1, 0, None)
        with np.errstate(divide="ignore"):
            interval = np.where(completed.steps_per_us[row] > 0, 1.0 / completed.steps_per_us[row], np.nan)
        now = timeline.at(np.nan_to_num(at))
        table = pd.DataFrame(
            {
                "time_us": at,
                "label_us": published["duration_us"].to_numpy(dtype=float),
                "interval_us": interval,
                "running": (now[DECODING] + now[PREFILLING]).to_numpy(),
                "waiting": now[WAITING].to_numpy(),
            }
        ).dropna()
        for number, part in table.groupby(table["time_us"] // LATE_BIN_US):
            if len(part) < MIN_STEPS:
                continue
            label, typical = float(part["label_us"].median()), float(part["interval_us"].median())
            rows.append(
                {
                    "experiment_id": name,
                    "time_s": (cast("float", number) + 0.5) * LATE_BIN_US / 1e6,
                    "n_steps": len(part),
                    "label_us": label,
                    "interval_us": typical,
                    "running": float(part["running"].mean()),
                    "waiting": float(part["waiting"].mean()),
                    "share_percent": PERCENT * label / typical,
                }
            )
    return pd.DataFrame(rows)


def _slope_at_fixed_batch(values: pd.DataFrame) -> tuple[float, float, float]:
    """Slope of interval on label, both less their means at the same batch, and its 95% interval."""
    apart = values[["duration_us", "interval_us"]] - values.groupby("requests")[
        ["duration_us", "interval_us"]
    ].transform("mean")
    label, interval = (apart[c].to_numpy(dtype=float) for c in ("duration_us", "interval_us"))
    products = np.array(
        [
            [np.sum(a * b), np.sum(a * a)]
            for a, b in zip(np.array_split(label, N_PIECES), np.array_split(interval, N_PIECES), strict=True)
        ]
    )
    drawn = products[np.random.default_rng(0).integers(0, N_PIECES, size=(N_DRAWS, N_PIECES))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    total = products.sum(axis=0)
    return float(total[0] / total[1]), float(low), float(high)


def _steps_over_time(timeline: Timeline) -> tuple[FloatArray, FloatArray]:
    """Times of a grid, and the steps that the server has made by then."""
    times = np.arange(0.0, float(timeline.times_us[-1]) + GRID_US, GRID_US)
    pace = timeline.steps_per_us
    done = np.concatenate([[0.0], np.cumsum(pace[:-1] * np.diff(timeline.times_us))])
    return times, np.asarray(np.interp(times, timeline.times_us, done))
