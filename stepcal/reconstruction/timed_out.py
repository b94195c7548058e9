"""What requests did that the client gave up on: assumed, since nothing about them was recorded but their arrival and end.

In the overloaded runs the server admits in order of arrival and keeps its slots full. So a failed request is taken to
have been admitted when a slot fell free after all that arrived before it, and to have decoded at the pace of the
requests around it until the client hung up; one that no slot was free for in time waited all the while.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right

import numpy as np
import pandas as pd

from stepcal.units import FloatArray

QUEUE_BUILT_US = 1e6
"""A completed request that queued for longer than this was admitted by a full server."""
LAST_COMPLETED = 100
"""Completed requests whose mean pace goes on after the last of them ended."""


def fill_in_failed(lives: pd.DataFrame, max_num_seqs: FloatArray, output_tokens: FloatArray) -> pd.DataFrame:
    """Give failed requests the times at which they would have been admitted and decoded.

    Parameters
    ----------
    lives : DataFrame
        Of `stepcal.reconstruction.timeline.request_lives`, sorted by experiment and arrival, failed requests waiting
        to their end.
    max_num_seqs : ndarray, shape (n_requests,)
        Slots of each request's server.
    output_tokens : ndarray, shape (n_requests,)
        Tokens that each request would have generated.

    Returns
    -------
    DataFrame
        The same rows; runs without a completed request are left as they were, for want of a pace.
    """
    lives = lives.reset_index(drop=True).copy()
    columns = ["admitted_us", "prefill_us", "first_token_us", "output_tokens", "interval_us"]
    for _, own in lives.groupby("experiment_id", sort=False):
        done = own[own["completed"]]
        if len(done) == len(own) or done.empty:
            continue
        failed = own[~own["completed"]]
        slots = full_server(done, float(max_num_seqs[own.index[0]]))
        admitted, end = np.array(_admissions(failed, done, slots)), failed["end_us"].to_numpy()
        interval = _pace(done, admitted)
        first = admitted + interval
        n = np.minimum(output_tokens[failed.index], 1.0 + (end - first) / interval)
        ran = first < end
        values = np.column_stack([admitted, admitted, first, n, interval])
        lives.loc[failed.index[ran], columns] = values[ran]
        lives.loc[failed.index[ran], "ran"] = True
    return lives


def full_server(done: pd.DataFrame, max_num_seqs: float) -> int:
    """Requests that a full server runs: `max_num_seqs`, or fewer where the KV cache holds no more.

    The mean number of requests between first and last token, from the first admission out of a queue until the last.
    Preempted requests count as running, because from outside they look so.
    """
    queued = done["admitted_us"].to_numpy() - done["arrival_us"].to_numpy() > QUEUE_BUILT_US
    if not queued.any():
        return int(max_num_seqs)
    start, end = (done["first_token_us"].to_numpy()[queued].min(), done["first_token_us"].to_numpy()[queued].max())
    first, last = done["first_token_us"].to_numpy(), done["end_us"].to_numpy()
    busy = np.maximum(np.minimum(last, end) - np.maximum(first, start), 0.0).sum()
    return int(min(max_num_seqs, max(np.rint(busy / max(end - start, 1.0)), 1)))


def _admissions(failed: pd.DataFrame, done: pd.DataFrame, slots: int) -> list[float]:
    """Time at which a slot is free for each failed request, in order of arrival; no earlier than its end if none is."""
    starts, ends = sorted(done["prefill_us"].tolist()), sorted(done["end_us"].tolist())
    # The last admission among the completed requests that arrived before each of them.
    arrivals, latest = done["arrival_us"].to_numpy(), np.maximum.accumulate(done["prefill_us"].to_numpy())
    before = np.searchsorted(arrivals, failed["arrival_us"].to_numpy(), side="right") - 1
    not_before = np.where(before >= 0, latest[np.maximum(before, 0)], 0.0).tolist()
    running: list[float] = []
    admitted, now = [], 0.0
    for arrival, end, predecessor in zip(
        failed["arrival_us"].tolist(), failed["end_us"].tolist(), not_before, strict=True
    ):
        now = max(now, arrival, predecessor)
        while now < end:
            while running and running[0] <= now:
                heapq.heappop(running)
            n_ended = bisect_right(ends, now)
            if bisect_right(starts, now) - n_ended + len(running) < slots:
                heapq.heappush(running, end)
                break
            now = min(running[0] if running else np.inf, ends[n_ended] if n_ended < len(ends) else np.inf)
        admitted.append(now)
    return admitted


def _pace(done: pd.DataFrame, times: FloatArray) -> FloatArray:
    """Mean microseconds a token of the completed requests that decode at some times, or of the last that did."""
    first, end, interval = (done[c].to_numpy() for c in ("first_token_us", "end_us", "interval_us"))
    by_first, by_end = np.argsort(first), np.argsort(end)
    n_first = np.searchsorted(first[by_first], times, side="right")
    n_ended = np.searchsorted(end[by_end], times, side="right")
    begun, gone = (np.concatenate([[0.0], np.cumsum(interval[order])]) for order in (by_first, by_end))
    n_here = n_first - n_ended
    last = float(interval[by_end][-LAST_COMPLETED:].mean())
    return np.where(n_here > 0, (begun[n_first] - gone[n_ended]) / np.maximum(n_here, 1), last)
