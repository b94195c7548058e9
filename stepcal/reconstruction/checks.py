"""How far the rebuilt batch is from the server's own record, on the three runs whose step traces are public.

The trace names, for a tenth of the steps, the requests scheduled, the running and waiting queue and the cache blocks in
use. Its clock is not the clients': one offset a run is estimated, the shift that makes the two batches agree best.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.metrics import pearson_r
from stepcal.reconstruction.prefix_cache import groups_seen
from stepcal.reconstruction.timeline import (
    DECODING,
    MID_STEP_TOKENS,
    PREFILLING,
    WAITING,
    Timeline,
    build_timeline,
    decode_intervals,
    request_lives,
)
from stepcal.units import NS_PER_US, PERCENT, FloatArray

OFFSET_SEARCH_US = 3e6
"""How far from the coincidence of first request and first step the offset is looked for. The agreement has one sharp
minimum: a batch is decorrelated after a request's life of 2 to 6 s, and starts empty."""
OFFSET_GRIDS_US = (20e3, 2e3, 200.0)
"""Spacing of the successive grids: about a step, a tenth, a hundredth."""
BLOCKS_FREED_AFTER_STEPS = 3.0
"""Steps after its last token for which a request still holds its blocks. Found on the traces (2 and 4 leave several times
the error), and longer than the one step that asynchronous scheduling explains; KV offloading to the CPU was on, and may hold
blocks until they are copied."""
SMALLEST_MEAN = 1.0
"""Mean below which an error in percent of it says nothing: these queues are empty nearly all the time."""
QUANTITIES = ("batch_requests", "running_depth", "waiting_depth", "kv_blocks")


def estimate_offset_us(steps: pd.DataFrame, timeline: Timeline) -> float:
    """Return the trace's clock minus the clients', in microseconds.

    The shift that minimises the mean absolute difference between scheduled requests (prefill and decode) in the trace and
    requests between the start of their prefill and their end as rebuilt. It contains what cannot be told from it: that a
    step is scheduled about one step before it computes, and the time that a token takes to reach the client.

    Parameters
    ----------
    steps : DataFrame
        Step rows of one experiment.
    timeline : Timeline
        Of the same experiment.

    Raises
    ------
    InputError
        If the steps are of several experiments, or there are none.
    """
    if steps["experiment_id"].nunique() != 1:
        raise InputError(
            f"`steps` holds {steps['experiment_id'].nunique()} experiments; a clock offset is of one. Filter it first."
        )
    start = steps["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US
    scheduled = (steps["num_prefill_reqs"] + steps["num_decode_reqs"]).to_numpy(dtype=float)
    best, reach = float(start.min() - timeline.times_us[0]), OFFSET_SEARCH_US
    for spacing in OFFSET_GRIDS_US:
        shifts = best + np.arange(-reach, reach + spacing / 2, spacing)
        misfit = [np.abs(_batch(timeline, start - shift) - scheduled).mean() for shift in shifts]
        best, reach = float(shifts[int(np.argmin(misfit))]), 2 * spacing
    return best


def rebuilt_at_steps(steps: pd.DataFrame, lives: pd.DataFrame, run: pd.Series) -> pd.DataFrame:
    """Put what is rebuilt beside what the trace says, for each sampled step of one experiment.

    Parameters
    ----------
    steps : DataFrame
    lives : DataFrame
        Of `stepcal.reconstruction.timeline.request_lives`, the same experiment.
    run : Series
        The experiment's row of ``experiments.csv``.

    Returns
    -------
    DataFrame
        `step_id`, `time_us` (of the clients' clock), `offset_us`, and for each of `QUANTITIES` the columns ``_traced`` and
        ``_rebuilt``: requests in the batch; requests in the running queue, which a finished one leaves a step late;
        requests waiting; cache blocks in use, a shared prompt counted once.
    """
    timeline = build_timeline(lives)
    offset = estimate_offset_us(steps, timeline)
    times = steps["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US - offset
    now = timeline.at(times)
    batch = (now[DECODING] + now[PREFILLING]).to_numpy()
    interval = np.nanmedian(lives["interval_us"])
    return pd.DataFrame(
        {
            "step_id": steps["step_id"].to_numpy(),
            "time_us": times,
            "offset_us": offset,
            "batch_requests_traced": (steps["num_prefill_reqs"] + steps["num_decode_reqs"]).to_numpy(dtype=float),
            "batch_requests_rebuilt": batch,
            "running_depth_traced": steps["running_depth"].to_numpy(dtype=float),
            "running_depth_rebuilt": batch + _ended_within(lives, times, float(interval)),
            "waiting_depth_traced": steps["waiting_depth"].to_numpy(dtype=float),
            "waiting_depth_rebuilt": now[WAITING].to_numpy(),
            "kv_blocks_traced": (steps["kv_blocks_total"] - steps["kv_blocks_free"]).to_numpy(dtype=float),
            "kv_blocks_rebuilt": blocks_in_use(lives, times, run),
        }
    )


def validate_reconstruction(steps: pd.DataFrame, requests: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    """Return bias and error of the rebuilt batch, running and waiting queue and cache use, per experiment.

    Parameters
    ----------
    steps : DataFrame
        Step rows; only experiments that have some are compared.
    requests, experiments : DataFrame
        As for `stepcal.reconstruction.timeline.request_lives`.

    Returns
    -------
    DataFrame
        `experiment_id`, `quantity` (of `QUANTITIES`), `n_steps`, `offset_us`, `mean_traced`, `bias` (rebuilt minus
        traced), `mean_abs_error`, `p95_abs_error` (all in requests or blocks), `bias_percent` and `mean_abs_error_percent`
        (of the mean traced value, NaN where that is below `SMALLEST_MEAN`), `r`.
    """
    rows = []
    for experiment, own in steps.groupby("experiment_id", sort=True):
        lives = request_lives(requests[requests["experiment_id"] == experiment], experiments)
        run = experiments[experiments["experiment_id"] == experiment].iloc[0]
        table = rebuilt_at_steps(own, lives, run)
        for quantity in QUANTITIES:
            traced, rebuilt = (table[f"{quantity}_{kind}"].to_numpy() for kind in ("traced", "rebuilt"))
            error, mean = rebuilt - traced, float(traced.mean())
            percent = PERCENT / mean if mean >= SMALLEST_MEAN else float("nan")
            rows.append(
                {
                    "experiment_id": experiment,
                    "quantity": quantity,
                    "n_steps": len(own),
                    "offset_us": float(table["offset_us"].iloc[0]),
                    "mean_traced": mean,
                    "bias": float(error.mean()),
                    "mean_abs_error": float(np.abs(error).mean()),
                    "p95_abs_error": float(np.percentile(np.abs(error), 95)),
                    "bias_percent": percent * float(error.mean()),
                    "mean_abs_error_percent": percent * float(np.abs(error).mean()),
                    "r": pearson_r(rebuilt, traced),
                }
            )
    return pd.DataFrame(rows)


def blocks_in_use(lives: pd.DataFrame, times_us: FloatArray, run: pd.Series) -> FloatArray:
    """Return the cache blocks that running requests hold at some times, shape (n_times,).

    A request holds the blocks of its context until `BLOCKS_FREED_AFTER_STEPS` steps after its end. Full blocks of one
    prompt are the same blocks in every request with that prompt (prefix caching): they are counted once while any of them
    runs. Which prompts share a system prompt is not known, so the number of system prompts in use is an expectation.

    Parameters
    ----------
    lives : DataFrame
        Of `stepcal.reconstruction.timeline.request_lives`, one experiment.
    times_us : ndarray of float, shape (n_times,)
    run : Series
        The experiment's row of ``experiments.csv``.
    """
    ran = lives[lives["ran"]]
    block = float(run["block_size"])
    start, first, interval = (ran[c].to_numpy() for c in ("prefill_us", "first_token_us", "interval_us"))
    end = ran["end_us"].to_numpy() + BLOCKS_FREED_AFTER_STEPS * interval
    prompt = ran["prompt_tokens"].to_numpy()
    shared = np.floor((prompt - 1) / block)
    order = np.argsort(times_us, kind="stable")
    ordered = times_us[order]
    # A request adds one block each time that its context passes a multiple of the block size.
    first_block = np.ceil((prompt + MID_STEP_TOKENS) / block)
    last_block = np.ceil((prompt + ran["output_tokens"].to_numpy() - 1) / block)
    total = _count(ordered, start, end, first_block - shared)
    for extra in range(1, int((last_block - first_block).max(initial=0)) + 1):
        grows = last_block - first_block >= extra
        reached = first + interval * (block * (first_block + extra - 1) - prompt)
        total += _count(ordered, np.minimum(reached, end)[grows], end[grows], np.ones(int(grows.sum())))
    system_blocks = np.floor(float(run["run_system_prompt_tokens"]) / block)
    texts = np.zeros(times_us.size)
    for number in np.unique(ran["prompt"]):
        own = (ran["prompt"] == number).to_numpy()
        present = _count(ordered, start[own], end[own], np.ones(int(own.sum()))) > 0.5
        texts += present
        total += np.where(present, np.median(shared[own]) - system_blocks, 0.0)
    total += system_blocks * groups_seen(texts, run["run_groups"], run["run_prompts_per_group"])
    result = np.empty(times_us.size)
    result[order] = total
    return result


def failure_sensitivity(requests: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    """Return what the assumption about failed requests changes in the batches of completed ones.

    Both extremes are rebuilt: failed requests ran as soon as a slot was free, or waited until they were aborted.

    Returns
    -------
    DataFrame
        One row an experiment with failures: `experiment_id`, `n_failed`, `n_completed`, `n_affected` (completed requests
        whose mean batch differs by more than one request), and over those `batch_ran`, `batch_waited`, `kv_tokens_ran`,
        `kv_tokens_waited` (means).
    """
    failed = requests.groupby("experiment_id")["has_error"].sum()
    some = requests[requests["experiment_id"].isin(failed.index[failed > 0])]
    if some.empty:
        return pd.DataFrame(columns=["experiment_id", "n_failed", "n_completed", "n_affected"])
    ran, waited = (decode_intervals(some, experiments, failed_ran=choice) for choice in (True, False))
    both = ran.merge(waited, on=["experiment_id", "index"], suffixes=("_ran", "_waited"), validate="one_to_one")
    both["affected"] = (both["batch_ran"] - both["batch_waited"]).abs() > 1
    rows = []
    for experiment, own in both.groupby("experiment_id", sort=True):
        hit = own[own["affected"]]
        means = {c: float(hit[c].mean()) for c in ("batch_ran", "batch_waited", "kv_tokens_ran", "kv_tokens_waited")}
        counts = {"n_failed": int(failed[experiment]), "n_completed": len(own), "n_affected": len(hit)}
        rows.append({"experiment_id": experiment, **counts, **means})
    return pd.DataFrame(rows)


def _batch(timeline: Timeline, times: FloatArray) -> FloatArray:
    now = timeline.at(times)
    return (now[DECODING] + now[PREFILLING]).to_numpy()


def _ended_within(lives: pd.DataFrame, times: FloatArray, before_us: float) -> FloatArray:
    """Requests that ended less than a while before some times."""
    ends = np.sort(lives.loc[lives["ran"], "end_us"].to_numpy())
    return (np.searchsorted(ends, times, side="right") - np.searchsorted(ends, times - before_us, side="right")).astype(
        float
    )


def _count(times: FloatArray, start: FloatArray, end: FloatArray, amount: FloatArray) -> FloatArray:
    """Sum of the amounts present at sorted times."""
    change = np.zeros(times.size + 1)
    np.add.at(change, np.searchsorted(times, start), amount)
    np.add.at(change, np.searchsorted(times, end), -amount)
    return np.cumsum(change)[:-1]
