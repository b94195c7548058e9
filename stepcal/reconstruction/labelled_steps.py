"""The physical model on sampled steps, against the interval between them; baselines fitted to the same label.

The label of a sampled step is the mean time of the ten or so steps until the next sample, but the trace shows only the
first of them. Two kinds of features are therefore judged: those of the sampled step, and the mean over the steps of the gap,
whose batches are rebuilt from the requests. The rebuilt ones rest on measured latencies: they serve to fit and to diagnose.

Within one experiment a regression on the batch does as well as physics, for the label is nearly a line there. What physics
adds shows where the line was not fitted: on another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stepcal.datasets import load_stages
from stepcal.datasets.splits import temporal_split
from stepcal.errors import InputError
from stepcal.reconstruction.checks import estimate_offset_us
from stepcal.reconstruction.labels import stage_starts_ns as starts_of_stages
from stepcal.reconstruction.labels import step_intervals
from stepcal.reconstruction.timeline import DECODING, KV_TOKENS, WAITING, Timeline, build_timeline, request_lives
from stepcal.units import NS_PER_US, FloatArray, IntArray

LABELS = {"corrected": "interval_us", "published": "duration_us"}
SAMPLED_STEP, GAP_MEAN = "sampled step", "gap mean"
FEATURES = (SAMPLED_STEP, GAP_MEAN)
GPU_LAG_STEPS = 1
"""Steps by which the GPU is behind the scheduler: while it computes step i - 1, step i is scheduled (asynchronous scheduling
of vLLM 0.15.1). From one call of the scheduler to the next is the time of the step before."""
COUNTS = ("prefill_tokens", "kv_tokens")
PREFILL_COUNTS = ("prefill_kv_tokens", "prefill_pairs")
"""Counts of a rebuilt step that the trace does not hold; zero where a table lacks them."""
MEAN_COLUMNS = ("decode_tokens", "num_prefill_reqs", "waiting_depth", *COUNTS, *PREFILL_COUNTS)
KEYS = ["experiment_id", "step_id"]


def labelled_steps(
    steps: pd.DataFrame,
    requests: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    stage_starts_ns: Mapping[str, Sequence[float]] | None = None,
) -> pd.DataFrame:
    """Give every sampled step its corrected label, the rebuilt context of its batch, and its split.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows of experiments with measured requests.
    requests, runs : DataFrame
        As for `stepcal.reconstruction.timeline.request_lives`.
    stage_starts_ns : mapping, optional
        See `stepcal.reconstruction.labels.step_intervals`. By default the arrivals of the first requests of each
        further load stage, moved
        to the trace's clock, for the experiments whose stages ship; an empty mapping excludes no stage change.

    Returns
    -------
    DataFrame
        The step columns, `interval_us` and the `gap_steps` that it is the mean of, `kv_tokens` (rebuilt, scaled to the
        requests that the trace says decode), `split`; only steps with a usable interval, by experiment and step.
    """
    parts, offsets = [], {}
    for name, own in steps.groupby("experiment_id", sort=True, observed=True):
        timeline = build_timeline(request_lives(requests[requests["experiment_id"] == name], runs))
        offset = offsets[str(name)] = estimate_offset_us(own, timeline)
        rebuilt = timeline.at(own["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US - offset)
        context = rebuilt["kv_tokens"] / rebuilt["decoding"].clip(lower=1.0)
        parts.append(own.assign(kv_tokens=context.to_numpy() * own["decode_tokens"].to_numpy()))
    starts = starts_of_stages(requests, load_stages(), offsets) if stage_starts_ns is None else stage_starts_ns
    labels = step_intervals(steps, stage_starts_ns=starts)
    split = temporal_split(pd.concat(parts))
    named = {"train": split.train, "valid": split.valid, "test": split.test}
    table = pd.concat([part.assign(split=name) for name, part in named.items()])
    table = table.merge(labels.loc[labels["usable"], [*KEYS, "interval_us", "gap_steps"]], on=KEYS, how="inner")
    return table.sort_values(KEYS, kind="stable").reset_index(drop=True)


def rebuilt_steps(steps: pd.DataFrame, requests: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Rebuild the batch of every step between the first and the last sample, sampled or not, from the requests.

    Between two samples steps are taken to be equally long. A request decodes in the steps scheduled between its first and
    last token (`stepcal.reconstruction.timeline.Timeline`), and is prefilled, all at once, in the last one that was
    scheduled before
    its first token. The trace's own counts serve only to set its clock: it counts a request as prefilling once more in the
    step after, where it already decodes.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows of experiments with measured requests.
    requests, runs : DataFrame
        As for `stepcal.reconstruction.timeline.request_lives`.

    Returns
    -------
    DataFrame
        A row a step, without holes, by experiment and step, from `GPU_LAG_STEPS` before the first sample: `experiment_id`,
        `step_id`, `decode_tokens`, `num_prefill_reqs`, `waiting_depth` (requests), `kv_tokens` (of those that decode),
        `prefill_tokens`, `prefill_kv_tokens` (tokens), `prefill_pairs` (of a query and what it attends to).
    """
    tables = []
    for name, own in steps.groupby("experiment_id", sort=True, observed=True):
        lives = request_lives(requests[requests["experiment_id"] == name], runs)
        timeline = build_timeline(lives)
        samples = own.sort_values("step_id")
        time = samples["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US - estimate_offset_us(own, timeline)
        tables.append(_rebuilt_run(str(name), samples["step_id"].to_numpy(dtype=np.int64), time, timeline, lives))
    return pd.concat(tables, ignore_index=True)


def gap_means(table: pd.DataFrame, rebuilt: pd.DataFrame) -> pd.DataFrame:
    """Replace the counts of sampled steps by their means over the steps that the interval measures.

    Parameters
    ----------
    table : DataFrame
        `experiment_id`, `step_id` and `gap_steps` of labelled steps, by experiment.
    rebuilt : DataFrame
        Of `rebuilt_steps`, the same experiments.

    Returns
    -------
    DataFrame
        `table` with `MEAN_COLUMNS` per step: those of the steps from ``i - GPU_LAG_STEPS`` to ``j - GPU_LAG_STEPS``
        (excluded), for a sample i and the next, j.

    Raises
    ------
    InputError
        If `rebuilt` lacks one of these steps, or has holes.
    """
    parts = []
    for own, every in _by_run(table, rebuilt):
        first, count = _gap_rows(own, every)
        columns = [c for c in MEAN_COLUMNS if c in every]
        means = _means(every[columns].to_numpy(dtype=float), first, count)
        parts.append(own.assign(**dict(zip(columns, means.T, strict=True))))
    return pd.concat(parts)


def _rebuilt_run(
    name: str, ids: IntArray, time_us: FloatArray, timeline: Timeline, lives: pd.DataFrame
) -> pd.DataFrame:
    number = np.arange(ids[0] - GPU_LAG_STEPS, ids[-1] + 1)
    start = np.interp(number, ids, time_us)
    pace = (time_us[1] - time_us[0]) / (ids[1] - ids[0]) if ids.size > 1 else 0.0
    start -= pace * np.maximum(ids[0] - number, 0)
    now = timeline.at(start)
    ran = lives[lives["ran"]]
    first = ran["first_token_us"].to_numpy()
    prefilled = np.searchsorted(start, first, side="right") - 1
    inside = (prefilled >= 0) & (first < time_us[-1] + pace)
    tokens, prompt = (ran[c].to_numpy(dtype=float) for c in ("prefill_tokens", "prompt_tokens"))
    # What is not cached is the end of the prompt; each token attends to all before it and to itself.
    pairs = tokens * (prompt - (tokens - 1) / 2)

    def per_step(amount: FloatArray) -> FloatArray:
        return np.bincount(prefilled[inside], weights=amount[inside], minlength=number.size).astype(float)

    return pd.DataFrame(
        {
            "experiment_id": name,
            "step_id": number,
            "decode_tokens": now[DECODING],
            "num_prefill_reqs": per_step(np.ones(first.size)),
            "waiting_depth": now[WAITING],
            "kv_tokens": now[KV_TOKENS],
            "prefill_tokens": per_step(tokens),
            "prefill_kv_tokens": per_step(prompt),
            "prefill_pairs": per_step(pairs),
        }
    )


def _by_run(table: pd.DataFrame, rebuilt: pd.DataFrame) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Labelled steps of each experiment with all its steps."""
    every = dict(iter(rebuilt.groupby("experiment_id", observed=True)))
    runs = table.groupby("experiment_id", sort=True, observed=True)
    missing = sorted(str(name) for name, _ in runs if name not in every)
    if missing:
        raise InputError(f"`rebuilt` has no steps of `{missing[0]}`. Build it from the same steps as `table`.")
    return [(own, every[name]) for name, own in runs]


def _gap_rows(own: pd.DataFrame, every: pd.DataFrame) -> tuple[IntArray, IntArray]:
    """Position in all steps of the first step that each interval measures, and how many it does."""
    number = every["step_id"].to_numpy(dtype=np.int64)
    first = own["step_id"].to_numpy(dtype=np.int64) - GPU_LAG_STEPS - number[0]
    count = own["gap_steps"].to_numpy(dtype=np.int64)
    if np.any(np.diff(number) != 1) or np.any(first < 0) or np.any(first + count > number.size):
        raise InputError(
            f"`rebuilt` holds steps {number[0]} to {number[-1]} of `{own['experiment_id'].iloc[0]}`; it needs every step of "
            "every gap, in order. Build it from the same steps as `table`."
        )
    return first, count


def _means(values: FloatArray, first: IntArray, count: IntArray) -> FloatArray:
    """Means of some rows from each `first`, shape (n_gaps, ...)."""
    total = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
    return ((total[first + count] - total[first]).T / count).T
