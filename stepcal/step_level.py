"""The physical model on sampled steps, against the interval between them; baselines fitted to the same label.

The label of a sampled step is the mean time of the ten or so steps until the next sample, but the trace shows only the
first of them. Two kinds of features are therefore judged: those of the sampled step, and the mean over the steps of the gap,
whose batches are rebuilt from the requests. The rebuilt ones rest on measured latencies: they serve to fit and to diagnose.

Within one experiment a regression on the batch does as well as physics, for the label is nearly a line there. What physics
adds shows where the line was not fitted: on another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.audit import stage_starts_ns as starts_of_stages
from stepcal.calibration import N_STEP, Calibration, calibrate
from stepcal.datasets import load_stages
from stepcal.end_to_end import Experiment
from stepcal.errors import InputError
from stepcal.labels import step_intervals
from stepcal.metrics import mape_percent, mspe_percent
from stepcal.physical import PhysicalFeatures, PhysicalModel, physical_features
from stepcal.reconstruction import DECODING, KV_TOKENS, WAITING, Timeline, build_timeline, request_lives
from stepcal.reconstruction_checks import estimate_offset_us
from stepcal.request_level import RequestLevel, batch_rejections
from stepcal.splits import temporal_split

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

NS_PER_US = 1e3
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
        As for `stepcal.reconstruction.request_lives`.
    stage_starts_ns : mapping, optional
        See `stepcal.labels.step_intervals`. By default the arrivals of the first requests of each further load stage, moved
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
    last token (`stepcal.reconstruction.Timeline`), and is prefilled, all at once, in the last one that was scheduled before
    its first token. The trace's own counts serve only to set its clock: it counts a request as prefilling once more in the
    step after, where it already decodes.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows of experiments with measured requests.
    requests, runs : DataFrame
        As for `stepcal.reconstruction.request_lives`.

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


def step_features(
    table: pd.DataFrame, experiments: Sequence[Experiment], rebuilt: pd.DataFrame | None = None
) -> PhysicalFeatures:
    """Build the physical features of labelled steps, in their order.

    Parameters
    ----------
    table : DataFrame
        Of `labelled_steps`; rows by experiment.
    experiments : sequence of Experiment
    rebuilt : DataFrame, optional
        Of `rebuilt_steps`. With it, features are the means over the steps that the interval measures (`gap_means`); they
        are averaged, not computed from mean counts, as they need not be linear in the counts.

    Returns
    -------
    PhysicalFeatures
        A row a labelled step.

    Raises
    ------
    KeyError
        If a step's experiment is not among `experiments`.
    InputError
        As `gap_means`.
    """
    by_name = {e.experiment_id: e for e in experiments}
    if rebuilt is None:
        runs = table.groupby("experiment_id", sort=True, observed=True)
        return PhysicalFeatures.joined([_features(own, by_name[str(name)]) for name, own in runs])
    parts = []
    for own, every in _by_run(table, rebuilt):
        single = _features(every, by_name[str(own["experiment_id"].iloc[0])])
        first, count = _gap_rows(own, every)
        means = {f.name: _means(getattr(single, f.name), first, count) for f in fields(PhysicalFeatures)}
        parts.append(PhysicalFeatures(**means))
    return PhysicalFeatures.joined(parts)


def fit_steps(table: pd.DataFrame, features: PhysicalFeatures, experiments: Sequence[Experiment]) -> Calibration:
    """Fit the physical model to the corrected labels of the training steps.

    The steps of an experiment together weigh as one figure of it, as decode intervals do at the request level: the model's
    error is common to them. Numbers that no step tells anything about stay at their priors.

    Parameters
    ----------
    table : DataFrame
        `experiment_id`, `interval_us`, `split` of labelled steps; fitted are those whose split is ``train``.
    features : PhysicalFeatures
        Of `step_features`, a row a row of `table`.
    experiments : sequence of Experiment

    Returns
    -------
    Calibration
        Of level ``step``.

    Raises
    ------
    InputError
        If there is no training step, or features and steps differ in number.
    """
    if len(features) != len(table):
        raise InputError(f"`features` has {len(features)} rows and `table` {len(table)}; give one for each step.")
    train = (table["split"] == "train").to_numpy()
    rows = table.loc[train, ["experiment_id", "interval_us"]].reset_index(drop=True)
    overloaded = {e.experiment_id: e.overloaded for e in experiments}
    rows["overloaded"] = rows["experiment_id"].astype(str).map(overloaded).to_numpy(dtype=bool)
    return replace(calibrate(level=RequestLevel(rows, features.rows(train))), level="step")


def step_scores(
    table: pd.DataFrame,
    experiments: Sequence[Experiment],
    theta: FloatArray,
    theta_without: Mapping[str, FloatArray] | None = None,
    *,
    rebuilt: pd.DataFrame | None = None,
    split: str = "test",
) -> pd.DataFrame:
    """Score the physical model and baselines per step on one split.

    Parameters
    ----------
    table : DataFrame
        Of `labelled_steps`.
    experiments : sequence of Experiment
    theta : ndarray
        The calibrated numbers, which saw decode intervals and latencies of the training arrivals, no step.
    theta_without : mapping of str to ndarray, optional
        By model, numbers fitted without it; adds the physical rows of ``other models``.
    rebuilt : DataFrame, optional
        Of `rebuilt_steps`; adds the rows whose features are the gap's means, of the corrected label.
    split : str
        Which steps are judged: ``train``, ``valid`` or ``test``.

    Returns
    -------
    DataFrame
        `experiment_id`, `label` (corrected, published), `features` (of `FEATURES`), `trained_on` (``own run``,
        ``other models``; ``all runs``: `theta`; ``steps of all runs``: `fit_steps`), `variant` (constant, blackbox,
        physical), `mape_percent`, `mspe_percent`, `n`.

    Raises
    ------
    InputError
        As `gap_means` and `fit_steps`, or if no step is of the split.
    """
    if not (table["split"] == split).any():
        raise InputError(f"`table` has no step of `split={split!r}`; it has {sorted(table['split'].unique())}.")
    kinds: list[tuple[str, pd.DataFrame, pd.DataFrame | None]] = [(SAMPLED_STEP, table, None)]
    if rebuilt is not None:
        kinds.append((GAP_MEAN, gap_means(table, rebuilt), rebuilt))
    rows = []
    for kind, counts, every in kinds:
        features = step_features(table, experiments, every)
        thetas = {
            "all runs": theta[:N_STEP],
            "steps of all runs": fit_steps(table, features, experiments).theta[:N_STEP],
        }
        for name in table["experiment_id"].unique():
            own = (table["experiment_id"] == name).to_numpy()
            judged = own & (table["split"] == split).to_numpy()
            family = _families(table)[own][0]
            left_out = (theta_without or {}).get(family)
            learned = thetas | ({} if left_out is None else {"other models": left_out[:N_STEP]})
            for label, column in LABELS.items():
                if kind == GAP_MEAN and label == "published":
                    continue  # It is of the sampled step alone.
                actual = table[column].to_numpy(dtype=float)
                predictions = _baselines(counts, actual, own, judged, _families(table) != family)
                if label == "corrected":
                    for trained_on, numbers in learned.items():
                        predicted = PhysicalModel().predict_us(numbers, features.rows(judged))
                        predictions[trained_on, "physical"] = predicted
                about = {"experiment_id": name, "label": label, "features": kind}
                rows += [about | _scored(who, p, actual[judged]) for who, p in predictions.items()]
    return pd.DataFrame(rows)


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


def _features(own: pd.DataFrame, e: Experiment) -> PhysicalFeatures:
    """Features of the steps of one experiment."""
    counts: dict[str, Any] = {c: own[c].to_numpy(dtype=float) for c in (*COUNTS, *PREFILL_COUNTS) if c in own}
    running = own["decode_tokens"].to_numpy(dtype=float) + own["num_prefill_reqs"].to_numpy(dtype=float)
    return physical_features(
        e.architecture,
        e.accelerator,
        tensor_parallel=e.tensor_parallel,
        decode_requests=own["decode_tokens"].to_numpy(dtype=float),
        prefill_requests=own["num_prefill_reqs"].to_numpy(dtype=float),
        rejected=batch_rejections(e, running, counts["kv_tokens"]),
        block_size=e.server.block_size,
        offload_blocks=e.server.offload_blocks,
        **counts,
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


def _families(table: pd.DataFrame) -> NDArray[np.object_]:
    """Name of each row's model, whichever copy of its weights was served."""
    return table["model"].astype(str).str.removesuffix("-hf").to_numpy(dtype=object)


def _baselines(
    table: pd.DataFrame, actual: FloatArray, own: BoolArray, judged: BoolArray, others: BoolArray
) -> dict[tuple[str, str], FloatArray]:
    """What a constant and a line predict, fitted to the training steps of the run or of other models."""
    train = (table["split"] == "train").to_numpy()
    predictions = {}
    for trained_on, chosen in (("own run", own & train), ("other models", others & train)):
        if chosen.any():
            predictions[trained_on, "constant"] = np.full(int(judged.sum()), np.median(actual[chosen]))
            predictions[trained_on, "blackbox"] = _relative_line(table, actual, chosen, judged)
    return predictions


def _relative_line(table: pd.DataFrame, actual: FloatArray, chosen: BoolArray, judged: BoolArray) -> FloatArray:
    """Least squares of relative errors on an intercept, prefill and decode tokens: the study's two features."""
    x = np.column_stack([np.ones(len(table)), table["prefill_tokens"], table["decode_tokens"]]).astype(float)
    weighted = x[chosen] / actual[chosen, None]
    line = np.linalg.lstsq(weighted, np.ones(int(chosen.sum())), rcond=None)[0]
    return np.maximum(x[judged] @ line, 1.0)


def _scored(who: tuple[str, str], predicted: FloatArray, actual: FloatArray) -> dict[str, object]:
    return {
        "trained_on": who[0],
        "variant": who[1],
        "mape_percent": mape_percent(predicted, actual),
        "mspe_percent": mspe_percent(predicted, actual),
        "n": int(actual.size),
    }
