"""Who was in the batch, rebuilt from what clients saw: arrival, first token and end of every request.

Between its first token and its last a request takes part in every step and its context grows by one token a step, so at
time ``t`` it holds ``prompt + 1/2 + (output - 1) (t - first token) / (end - first token)`` tokens. Sums of that over
requests are piecewise linear in time; means over a request's life are differences of their prefix integrals.

A batch rebuilt from measured latencies is circular: a longer step makes a longer life makes a larger batch. It serves to
fit and to diagnose; no verdict may rest on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from stepcal.datasets.splits import split_starts
from stepcal.errors import InputError
from stepcal.reconstruction.prefix_cache import known_or_typical_length, prefill_tokens, text_of_request
from stepcal.reconstruction.timed_out import fill_in_failed
from stepcal.units import US_PER_S, FloatArray

REQUIRED_REQUEST_COLUMNS = (
    "experiment_id",
    "index",
    "arrival_time_us",
    "prompt_tokens",
    "has_error",
    "e2e_s",
    "ttft_s",
)
REQUIRED_RUN_COLUMNS = (
    "experiment_id",
    "run_output_tokens",
    "run_system_prompt_tokens",
    "run_groups",
    "run_prompts_per_group",
    "block_size",
    "max_num_seqs",
)

UNQUEUED_STEPS = 2.5
"""Steps that a request spends before its first token with no queue: half a step until the scheduler looks, one that is
already scheduled ahead, one that computes (asynchronous scheduling of vLLM 0.15.1)."""
UNQUEUED_US = 8_000.0
"""Time before the first token outside the engine (HTTP, tokenisation): 6-10 ms in the runs that are not overloaded."""
MID_STEP_TOKENS = 0.5
"""A context grows by whole tokens at the end of a step; halfway between is its mean."""

DECODING, KV_TOKENS, WAITING, PREFILLING = "decoding", "kv_tokens", "waiting", "prefilling"
SERIES = (DECODING, KV_TOKENS, WAITING, PREFILLING)
WEIGHTINGS = ("time", "step")
TRAIN, VALID, TEST, IN_FLIGHT = "train", "valid", "test", "in_flight"


@dataclass(frozen=True)
class Timeline:
    """Batch, context and queue of one server as functions of time.

    Between two breakpoints the counts are constant and the context grows linearly. Times are microseconds on the clients'
    clock, from the first arrival.

    Attributes
    ----------
    times_us : ndarray, shape (n,)
        Breakpoints, ascending.
    values : dict of ndarray, shape (n,)
        Value of each of `SERIES` right after each breakpoint.
    slope_per_us : ndarray, shape (n,)
        Growth of ``kv_tokens``, tokens per microsecond.
    steps_per_us : ndarray, shape (n,)
        Pace of the server: mean of 1 / decode interval over the requests that decode; zero where none does.
    """

    times_us: FloatArray
    values: dict[str, FloatArray]
    slope_per_us: FloatArray
    steps_per_us: FloatArray
    _integrals: dict[str, FloatArray]

    def at(self, times_us: ArrayLike) -> pd.DataFrame:
        """Return `SERIES` at some times; zero before the first arrival.

        Parameters
        ----------
        times_us : array_like of float, shape (n_times,)

        Returns
        -------
        DataFrame
            ``decoding``, ``waiting`` and ``prefilling`` requests, and ``kv_tokens`` of those that decode.
        """
        times = np.atleast_1d(np.asarray(times_us, dtype=float))
        row = np.searchsorted(self.times_us, times, side="right") - 1
        known, row = row >= 0, np.maximum(row, 0)
        table = {name: np.where(known, self.values[name][row], 0.0) for name in SERIES}
        table[KV_TOKENS] += np.where(known, self.slope_per_us[row] * (times - self.times_us[row]), 0.0)
        return pd.DataFrame(table)

    def means(self, start_us: ArrayLike, end_us: ArrayLike, *, weighting: str = "step") -> pd.DataFrame:
        """Return the means of `SERIES` over intervals of time.

        Parameters
        ----------
        start_us, end_us : array_like of float, shape (n_intervals,)
            With ``start_us < end_us``.
        weighting : str
            ``time``: every microsecond counts alike. ``step``: every step does, as in a mean of step times; long steps are
            then not counted for longer. It weights time by `steps_per_us`.

        Returns
        -------
        DataFrame

        Raises
        ------
        InputError
            If the weighting is unknown or an interval is empty.
        """
        if weighting not in WEIGHTINGS:
            raise InputError(f"`weighting={weighting!r}` is unknown; it is one of {', '.join(WEIGHTINGS)}.")
        start, end = np.atleast_1d(np.asarray(start_us, dtype=float)), np.atleast_1d(np.asarray(end_us, dtype=float))
        if not np.all(start < end):
            row = int(np.flatnonzero(~(start < end))[0])
            raise InputError(f"Interval {row} runs from {start[row]} to {end[row]} µs; it must end after it starts.")
        total = self._integral(f"{weighting}:one", end) - self._integral(f"{weighting}:one", start)
        with np.errstate(invalid="ignore", divide="ignore"):
            return pd.DataFrame(
                {
                    name: (self._integral(f"{weighting}:{name}", end) - self._integral(f"{weighting}:{name}", start))
                    / total
                    for name in SERIES
                }
            )

    def _integral(self, key: str, times: FloatArray) -> FloatArray:
        """Integral of a weighted series from the first breakpoint to some times."""
        weighting, name = key.split(":")
        row = np.clip(np.searchsorted(self.times_us, times, side="right") - 1, 0, None)
        since = np.maximum(times - self.times_us[row], 0.0)
        weight = self.steps_per_us[row] if weighting == "step" else 1.0
        value = 1.0 if name == "one" else self.values[name][row]
        slope = self.slope_per_us[row] if name == KV_TOKENS else 0.0
        return self._integrals[key][row] + weight * (value * since + slope * since**2 / 2)


def request_lives(requests: pd.DataFrame, experiments: pd.DataFrame, *, failed_ran: bool = True) -> pd.DataFrame:
    """Return when each request waited, was prefilled and decoded, and how long its context was.

    Completed requests are measured. Failed ones have neither lengths nor times: the client gave up on them. They are
    assumed to have been admitted in order of arrival as soon as a slot was free, and to have run at the pace of the
    requests around them until they were aborted (`stepcal.reconstruction.timed_out`).

    Parameters
    ----------
    requests : DataFrame
        Canonical request rows of one or more experiments.
    experiments : DataFrame
        Rows of ``experiments.csv`` that cover them.
    failed_ran : bool
        False lets failed requests wait until they were aborted: the other extreme, to see what the assumption matters.

    Returns
    -------
    DataFrame
        One row a request, sorted by experiment and arrival: `experiment_id`, `index`, `arrival_us`, `admitted_us` (leaves
        the queue), `prefill_us` (its last prompt token starts to be computed), `first_token_us`, `end_us`, `prompt`
        (which of the workload's texts), `prompt_tokens`, `prefill_tokens` (not found in the prefix cache),
        `output_tokens` (generated until `end_us`), `interval_us` (microseconds a token), `completed`, `ran` (decoded at
        all). Times that never came are `end_us`.

    Raises
    ------
    InputError
        If a column is missing, an experiment is unknown, a completed request lacks a time or a length, or generates
        fewer than two tokens.
    """
    table = _joined(requests, experiments)
    lives = _measured_lives(table)
    if failed_ran and not lives["completed"].all():
        output = table["run_output_tokens"].to_numpy(dtype=float)
        lives = fill_in_failed(lives, table["max_num_seqs"].to_numpy(), output)
    return lives


def _measured_lives(table: pd.DataFrame) -> pd.DataFrame:
    """Return the lives as measured; failed requests wait until they were aborted."""
    completed = ~table["has_error"].to_numpy(dtype=bool)
    arrival = table["arrival_time_us"].to_numpy(dtype=float)
    end = arrival + US_PER_S * table["e2e_s"].to_numpy(dtype=float)
    first = np.where(completed, arrival + US_PER_S * table["ttft_s"].to_numpy(dtype=float), end)
    output = table["run_output_tokens"].to_numpy(dtype=float)
    interval = np.where(completed, (end - first) / (output - 1), np.nan)
    text = text_of_request(table)
    prompt_tokens = known_or_typical_length(table, text)
    queued = (first - arrival) - UNQUEUED_STEPS * interval - UNQUEUED_US
    return pd.DataFrame(
        {
            "experiment_id": table["experiment_id"].astype(str).to_numpy(),
            "index": table["index"].to_numpy(),
            "arrival_us": arrival,
            "admitted_us": np.where(completed, arrival + np.maximum(queued, 0.0), end),
            # Not before it arrived: the interval is a mean over its life, and the first steps may be faster.
            "prefill_us": np.where(completed, np.maximum(first - interval, arrival), end),
            "first_token_us": first,
            "end_us": end,
            "prompt": text,
            "prompt_tokens": prompt_tokens,
            "prefill_tokens": prefill_tokens(table, text, prompt_tokens),
            "output_tokens": np.where(completed, output, 0.0),
            "interval_us": interval,
            "completed": completed,
            "ran": completed,
        }
    )


def build_timeline(lives: pd.DataFrame) -> Timeline:
    """Return batch, context and queue of one experiment over time.

    Parameters
    ----------
    lives : DataFrame
        Rows of `request_lives`, one experiment.

    Raises
    ------
    InputError
        If there are no rows, or several experiments.
    """
    if lives["experiment_id"].nunique() != 1:
        raise InputError(
            f"`lives` holds {lives['experiment_id'].nunique()} experiments; a timeline is of one. Filter it first."
        )
    ran = lives["ran"].to_numpy(dtype=bool)
    arrival, admitted, prefill, first, end = (
        lives[c].to_numpy() for c in ("arrival_us", "admitted_us", "prefill_us", "first_token_us", "end_us")
    )
    first_ran, end_ran = first[ran], end[ran]
    pace = 1.0 / lives["interval_us"].to_numpy()[ran]
    one = np.ones(int(ran.sum()))
    # Context is base + slope * t while it decodes.
    base = lives["prompt_tokens"].to_numpy()[ran] + MID_STEP_TOKENS - pace * first_ran
    steps = {
        "decoding": (first_ran, end_ran, one),
        "base": (first_ran, end_ran, base),
        "slope": (first_ran, end_ran, pace),
        "prefilling": (prefill[ran], first_ran, one),
        "waiting": (arrival, admitted, np.ones(arrival.size)),
    }
    times = np.unique(np.concatenate([t for start, stop, _ in steps.values() for t in (start, stop)]))
    level = {name: _level(times, *given) for name, given in steps.items()}
    counts = {name: np.rint(level[name]) for name in (DECODING, WAITING, PREFILLING)}
    busy = counts[DECODING] > 0
    slope = np.where(busy, level["slope"], 0.0)
    values = counts | {KV_TOKENS: np.where(busy, level["base"] + slope * times, 0.0)}
    steps_per_us = np.where(busy, slope / np.maximum(counts[DECODING], 1), 0.0)
    return Timeline(times, values, slope, steps_per_us, _integrals(times, values, slope, steps_per_us))


def decode_intervals(
    requests: pd.DataFrame, experiments: pd.DataFrame, *, weighting: str = "step", failed_ran: bool = True
) -> pd.DataFrame:
    """Return the decode interval of every completed request and what its steps held on average.

    The interval, ``(E2E - TTFT) / (tokens - 1)``, is the mean time of the steps that a request decoded in: a label for
    step-time models that exists for all experiments.

    Parameters
    ----------
    requests, experiments : DataFrame
        As for `request_lives`.
    weighting : str
        Of the means over a life, see `Timeline.means`.
    failed_ran : bool
        As for `request_lives`.

    Returns
    -------
    DataFrame
        `experiment_id`, `index`, `arrival_us`, `interval_us`, `n_intervals` (tokens - 1), and means over the steps of its
        decode life: `batch` (decoding requests, itself included), `kv_tokens` (their contexts summed), `waiting`,
        `prefill_tokens` and `prefill_requests` per step (first tokens of others that fall into its life, and the prompt
        tokens computed for them), `arrivals` per step. `prompt_tokens`, `output_tokens`, `ttft_s`, and `split`: ``train``,
        ``valid``, ``test`` by order of arrival within its experiment, failed requests counted; ``in_flight`` for a
        training request that ended after the first validation request arrived.

    Raises
    ------
    InputError
        As `request_lives` does, or if the weighting is unknown.
    """
    lives = request_lives(requests, experiments, failed_ran=failed_ran)
    tables = [_one_run(own, weighting) for _, own in lives.groupby("experiment_id", sort=True)]
    return pd.concat(tables, ignore_index=True)


def _one_run(lives: pd.DataFrame, weighting: str) -> pd.DataFrame:
    timeline = build_timeline(lives)
    split = _temporal_split(lives)
    done = lives["completed"].to_numpy(dtype=bool)
    own = lives[done]
    first, end = own["first_token_us"].to_numpy(), own["end_us"].to_numpy()
    means = timeline.means(first, end, weighting=weighting)
    n = own["output_tokens"].to_numpy() - 1
    ran = lives[lives["ran"]].sort_values("first_token_us", kind="stable")
    tokens = ran["prefill_tokens"].to_numpy()
    return pd.DataFrame(
        {
            "experiment_id": own["experiment_id"].to_numpy(),
            "index": own["index"].to_numpy(),
            "arrival_us": own["arrival_us"].to_numpy(),
            "interval_us": own["interval_us"].to_numpy(),
            "n_intervals": n,
            "batch": means[DECODING].to_numpy(),
            "kv_tokens": means[KV_TOKENS].to_numpy(),
            "waiting": means[WAITING].to_numpy(),
            "prefill_tokens": _within(ran["first_token_us"].to_numpy(), tokens, first, end) / n,
            "prefill_requests": _within(ran["first_token_us"].to_numpy(), np.ones(len(ran)), first, end) / n,
            "arrivals": _within(lives["arrival_us"].to_numpy(), np.ones(len(lives)), first, end) / n,
            "prompt_tokens": own["prompt_tokens"].to_numpy(),
            "output_tokens": own["output_tokens"].to_numpy(),
            "ttft_s": (first - own["arrival_us"].to_numpy()) / US_PER_S,
            "split": split[done],
        }
    )


def _temporal_split(lives: pd.DataFrame) -> NDArray[np.object_]:
    """Split of each request of one run, in order of arrival."""
    n = len(lives)
    first_valid, first_test = split_starts(n)
    parts = [first_valid, first_test - first_valid, n - first_test]
    split = np.repeat(np.array([TRAIN, VALID, TEST], dtype=object), parts)
    if first_valid < n:
        boundary = lives["arrival_us"].to_numpy()[first_valid]
        split[(split == TRAIN) & (lives["end_us"].to_numpy() > boundary)] = IN_FLIGHT
    return split


def _within(times: FloatArray, amounts: FloatArray, start: FloatArray, end: FloatArray) -> FloatArray:
    """Sum of amounts that fall into (start, end], for sorted times."""
    total = np.concatenate([[0.0], np.cumsum(amounts)])
    return total[np.searchsorted(times, end, side="right")] - total[np.searchsorted(times, start, side="right")]


def _level(times: FloatArray, start: FloatArray, stop: FloatArray, amount: FloatArray) -> FloatArray:
    """Sum of the amounts that are present right after each breakpoint."""
    change = np.zeros(times.size)
    np.add.at(change, np.searchsorted(times, start), amount)
    np.add.at(change, np.searchsorted(times, stop), -amount)
    return np.cumsum(change)


def _integrals(
    times: FloatArray, values: dict[str, FloatArray], slope: FloatArray, steps_per_us: FloatArray
) -> dict[str, FloatArray]:
    """Integral of each series up to each breakpoint, by time and by steps."""
    duration = np.diff(times)
    result = {}
    for weighting, weight in (("time", np.ones(times.size)), ("step", steps_per_us)):
        for name in ("one", *SERIES):
            value = np.ones(times.size) if name == "one" else values[name]
            growth = slope if name == KV_TOKENS else np.zeros(times.size)
            pieces = weight[:-1] * (value[:-1] * duration + growth[:-1] * duration**2 / 2)
            result[f"{weighting}:{name}"] = np.concatenate([[0.0], np.cumsum(pieces)])
    return result


def _joined(requests: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    """Requests in order of arrival with the settings of their run; refuses what cannot be rebuilt."""
    for name, table, required in (
        ("requests", requests, REQUIRED_REQUEST_COLUMNS),
        ("experiments", experiments, REQUIRED_RUN_COLUMNS),
    ):
        missing = [c for c in required if c not in table]
        if missing:
            raise InputError(f"`{name}` lacks {', '.join(missing)}. It needs {', '.join(required)}.")
    unknown = sorted(set(requests["experiment_id"].astype(str)) - set(experiments["experiment_id"].astype(str)))
    if unknown:
        raise InputError(f"`experiments` has no row of `{unknown[0]}`, which `requests` names. Add it, or filter.")
    ordered = requests.sort_values(["experiment_id", "arrival_time_us", "index"], kind="stable")
    table = ordered.merge(
        experiments[list(REQUIRED_RUN_COLUMNS)], on="experiment_id", how="left", validate="many_to_one"
    )
    done = table[~table["has_error"].astype(bool)]
    bad = done[
        ~(
            (done["ttft_s"] > 0)
            & (done["e2e_s"] > done["ttft_s"])
            & np.isfinite(done["e2e_s"])
            & (done["prompt_tokens"] > 0)
        )
    ]
    if len(bad):
        row = bad.iloc[0]
        raise InputError(
            f"Request {row['index']} of `{row['experiment_id']}` completed with TTFT {row['ttft_s']} s, "
            f"E2E {row['e2e_s']} s and {row['prompt_tokens']} prompt tokens; a completed request needs 0 < TTFT < E2E and a "
            "prompt. Mark it with `has_error`, or drop it."
        )
    if len(table) and table["run_output_tokens"].min() < 2:
        raise InputError(
            f"`run_output_tokens` is {table['run_output_tokens'].min()}; a decode interval needs at least 2 tokens."
        )
    return table
