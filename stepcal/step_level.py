"""The physical model on single sampled steps, against the interval between them; baselines fitted to the same label.

Within one experiment a regression on the batch does as well as physics, for the label is nearly a line there. What physics
adds shows where the line was not fitted: on another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.calibration import N_STEP
from stepcal.end_to_end import Experiment
from stepcal.labels import step_intervals
from stepcal.metrics import mape_percent, mspe_percent
from stepcal.physical import PhysicalFeatures, PhysicalModel, physical_features
from stepcal.reconstruction import build_timeline, request_lives
from stepcal.reconstruction_checks import estimate_offset_us
from stepcal.splits import temporal_split

FloatArray = NDArray[np.float64]

NS_PER_US = 1e3
LABELS = {"corrected": "interval_us", "published": "duration_us"}


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
        See `stepcal.labels.step_intervals`.

    Returns
    -------
    DataFrame
        The step columns, `interval_us`, `kv_tokens` (rebuilt, scaled to the requests that the trace says decode), `split`;
        only steps with a usable interval.
    """
    labels = step_intervals(steps, stage_starts_ns=stage_starts_ns)
    parts = []
    for name, own in steps.groupby("experiment_id", sort=True, observed=True):
        timeline = build_timeline(request_lives(requests[requests["experiment_id"] == name], runs))
        offset = estimate_offset_us(own, timeline)
        rebuilt = timeline.at(own["ts_start_ns"].to_numpy(dtype=float) / NS_PER_US - offset)
        context = rebuilt["kv_tokens"] / rebuilt["decoding"].clip(lower=1.0)
        parts.append(own.assign(kv_tokens=context.to_numpy() * own["decode_tokens"].to_numpy()))
    split = temporal_split(pd.concat(parts))
    named = {"train": split.train, "valid": split.valid, "test": split.test}
    table = pd.concat([part.assign(split=name) for name, part in named.items()])
    keys = ["experiment_id", "step_id"]
    table = table.merge(labels.loc[labels["usable"], [*keys, "interval_us"]], on=keys, how="inner")
    return table.sort_values(keys, kind="stable").reset_index(drop=True)


def step_features(table: pd.DataFrame, experiments: Sequence[Experiment]) -> PhysicalFeatures:
    """Build the physical features of labelled steps, in their order.

    Raises
    ------
    KeyError
        If a step's experiment is not among `experiments`.
    """
    by_name = {e.experiment_id: e for e in experiments}
    parts = []
    for name, own in table.groupby("experiment_id", sort=True, observed=True):
        e = by_name[str(name)]
        counts = {c: own[c].to_numpy(dtype=float) for c in ("prefill_tokens", "kv_tokens")}
        parts.append(
            physical_features(
                e.architecture,
                e.accelerator,
                tensor_parallel=e.tensor_parallel,
                decode_requests=own["decode_tokens"].to_numpy(dtype=float),
                prefill_requests=own["num_prefill_reqs"].to_numpy(dtype=float),
                waiting=own["waiting_depth"].to_numpy(dtype=float),
                max_num_seqs=e.server.max_num_seqs,
                **counts,
            )
        )
    return PhysicalFeatures.joined(parts)


def step_scores(
    table: pd.DataFrame,
    experiments: Sequence[Experiment],
    theta: FloatArray,
    theta_without: Mapping[str, FloatArray] | None = None,
) -> pd.DataFrame:
    """Score the physical model and baselines per step on the test split.

    Parameters
    ----------
    table : DataFrame
        Of `labelled_steps`.
    experiments : sequence of Experiment
    theta : ndarray
        The calibrated numbers, which saw decode intervals and latencies of the training arrivals, no step.
    theta_without : mapping of str to ndarray, optional
        By model, numbers fitted without it; adds the rows of ``model left out``.

    Returns
    -------
    DataFrame
        `experiment_id`, `label` (corrected, published), `trained_on` (``own run``, ``all runs``, ``other models``),
        `variant` (constant, blackbox, physical), `mape_percent`, `mspe_percent`, `n`.
    """
    features, model = step_features(table, experiments), PhysicalModel()
    rows = []
    for name in table["experiment_id"].unique():
        own = (table["experiment_id"] == name).to_numpy()
        test = own & (table["split"] == "test").to_numpy()
        train = own & (table["split"] == "train").to_numpy()
        family = str(table.loc[own, "model"].iloc[0]).removesuffix("-hf")
        others = (table["model"].str.removesuffix("-hf") != family).to_numpy() & (table["split"] == "train").to_numpy()
        for label, column in LABELS.items():
            actual = table[column].to_numpy(dtype=float)
            predictions = {}
            for trained_on, chosen in (("own run", train), ("other models", others)):
                predictions[trained_on, "constant"] = np.full(int(test.sum()), np.median(actual[chosen]))
                predictions[trained_on, "blackbox"] = _relative_line(table, actual, chosen, test)
            if label == "corrected":
                predictions["all runs", "physical"] = model.predict_us(theta[:N_STEP], features.rows(test))
                left_out = (theta_without or {}).get(family)
                if left_out is not None:
                    predictions["other models", "physical"] = model.predict_us(left_out[:N_STEP], features.rows(test))
            for (trained_on, variant), predicted in predictions.items():
                rows.append(
                    {
                        "experiment_id": name,
                        "label": label,
                        "trained_on": trained_on,
                        "variant": variant,
                        "mape_percent": mape_percent(predicted, actual[test]),
                        "mspe_percent": mspe_percent(predicted, actual[test]),
                        "n": int(test.sum()),
                    }
                )
    return pd.DataFrame(rows)


def _relative_line(
    table: pd.DataFrame, actual: FloatArray, chosen: NDArray[np.bool_], test: NDArray[np.bool_]
) -> FloatArray:
    """Least squares of relative errors on an intercept, prefill and decode tokens: the study's two features."""
    x = np.column_stack([np.ones(len(table)), table["prefill_tokens"], table["decode_tokens"]]).astype(float)
    weighted = x[chosen] / actual[chosen, None]
    line = np.linalg.lstsq(weighted, np.ones(int(chosen.sum())), rcond=None)[0]
    return np.maximum(x[test] @ line, 1.0)
