"""The study ``reconstruction``: how well batches and queues can be rebuilt from requests alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.metrics import mape_percent
from stepcal.reconstruction.checks import blocks_in_use, failure_sensitivity, rebuilt_at_steps, validate_reconstruction
from stepcal.reconstruction.timeline import (
    DECODING,
    KV_TOKENS,
    TEST,
    TRAIN,
    WAITING,
    build_timeline,
    decode_intervals,
    request_lives,
)
from stepcal.studies.diagnosis.label_audit import lives_of_traced, rows_of
from stepcal.units import PERCENT, US_PER_S, FloatArray

Tables = dict[str, pd.DataFrame]
LINE_FEATURES = ("batch", "kv_tokens", "waiting", "prefill_tokens", "prefill_requests")
SECONDS_AROUND_STAGE_CHANGE = 40.0
SCATTER_EVERY = 40
"""Every so many sampled steps one is kept for a figure."""
WINDOW_COLUMNS = ("experiment_id", "time_us", "running_depth_traced", "running_depth_rebuilt")
SCATTER_COLUMNS = ("experiment_id", "kv_blocks_traced", "kv_blocks_rebuilt")
CAPACITY_EVERY_US = 1e6
OVERLOAD_EVERY_US = 10e6


def run_reconstruction(
    steps: pd.DataFrame, requests: pd.DataFrame, experiments: pd.DataFrame
) -> tuple[Tables, dict[str, str]]:
    """Rebuild batches and queues from requests, and check them against the traces.

    Parameters
    ----------
    steps, requests, experiments : DataFrame
        As for `stepcal.studies.diagnosis.label_audit.run_label_audit`.

    Returns
    -------
    tables : dict
        ``validation``, ``failures`` (what the assumption about failed requests matters), ``runs`` (means over completed
        requests, cache use), ``line_fits`` (how well a line in the rebuilt quantities gives each request's interval), and
        for figures ``window``, ``scatter`` and ``overload``.
    texts : dict
        Empty.
    """
    window, scatter = [], []
    for name, lives in lives_of_traced(steps, requests, experiments).items():
        table = rebuilt_at_steps(rows_of(steps, name), lives, _run(experiments, name)).assign(experiment_id=name)
        scatter.append(table.iloc[::SCATTER_EVERY])
        middle = lives["arrival_us"].max() / 2
        near = (table["time_us"] - middle).abs() < SECONDS_AROUND_STAGE_CHANGE * US_PER_S
        window.append(table[near])
    decode = decode_intervals(requests, experiments)
    tables = {
        "validation": validate_reconstruction(steps, requests, experiments),
        "failures": failure_sensitivity(requests, experiments),
        "runs": _runs(decode, requests, experiments),
        "line_fits": request_line_fits(decode),
        "window": pd.concat(window, ignore_index=True)[list(WINDOW_COLUMNS)].round(0),
        "scatter": pd.concat(scatter, ignore_index=True)[list(SCATTER_COLUMNS)].round(1),
        "overload": _overload(requests, experiments),
    }
    return tables, {}


def request_line_fits(decode: pd.DataFrame) -> pd.DataFrame:
    """Fit each run's decode intervals by a line in the rebuilt quantities, least squares of relative errors.

    Parameters
    ----------
    decode : DataFrame
        Of `stepcal.reconstruction.timeline.decode_intervals`.

    Returns
    -------
    DataFrame
        `experiment_id`, `n_requests`, `mape_constant_percent` (the best constant's), `mape_percent` (mean over the run's
        requests, fitted on them), `n_test`, `mape_test_percent` (mean over the test split, fitted on the training split;
        NaN where either has fewer requests than the line has coefficients).
    """
    rows = []
    for experiment, own in decode.groupby("experiment_id", sort=True):
        y = own["interval_us"].to_numpy()
        x = np.column_stack([np.ones(len(own)), own[list(LINE_FEATURES)].to_numpy()])
        train, test = (own["split"] == TRAIN).to_numpy(), (own["split"] == TEST).to_numpy()
        enough = min(train.sum(), test.sum()) >= x.shape[1]
        rows.append(
            {
                "experiment_id": experiment,
                "n_requests": len(own),
                "mape_constant_percent": mape_percent(_relative_fit(x[:, :1], y)[0] * np.ones(y.size), y),
                "mape_percent": mape_percent(x @ _relative_fit(x, y), y),
                "n_test": int(test.sum()),
                "mape_test_percent": (
                    mape_percent(x[test] @ _relative_fit(x[train], y[train]), y[test]) if enough else float("nan")
                ),
            }
        )
    return pd.DataFrame(rows)


def _relative_fit(x: FloatArray, y: FloatArray) -> FloatArray:
    scale = np.abs(x).max(axis=0)
    scale[scale == 0] = 1.0
    solution: FloatArray = np.linalg.lstsq(x / scale / y[:, None], np.ones(y.size), rcond=None)[0]
    return solution / scale


def _runs(decode: pd.DataFrame, requests: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for experiment, own in decode.groupby("experiment_id", sort=True):
        lives = request_lives(rows_of(requests, str(experiment)), experiments)
        run = _run(experiments, str(experiment))
        times = np.arange(0.0, lives["end_us"].max(), CAPACITY_EVERY_US)
        most = float(blocks_in_use(lives, times, run).max())
        columns = ("interval_us", "batch", "kv_tokens", "waiting", "prefill_tokens", "prefill_requests", "arrivals")
        means = {name: float(own[name].mean()) for name in columns}
        peak = PERCENT * most / float(run["kv_blocks_total"])
        rows.append({"experiment_id": experiment, "n_completed": len(own), **means, "kv_peak_percent": peak})
    return pd.DataFrame(rows)


def _overload(requests: pd.DataFrame, experiments: pd.DataFrame) -> pd.DataFrame:
    tables = []
    for name in experiments.loc[experiments["overloaded"], "experiment_id"]:
        lives = request_lives(rows_of(requests, name), experiments)
        if lives.empty:
            continue
        times = np.arange(0.0, lives["end_us"].max(), OVERLOAD_EVERY_US)
        now = build_timeline(lives).at(times)
        done = build_timeline(lives[lives["completed"]]).at(times)
        tables.append(
            pd.DataFrame(
                {
                    "experiment_id": name,
                    "time_s": times / US_PER_S,
                    "decoding": now[DECODING],
                    "decoding_completed": done[DECODING],
                    "kv_tokens": now[KV_TOKENS],
                    "waiting": now[WAITING],
                }
            )
        )
    return pd.concat(tables, ignore_index=True).round(1)


def _run(experiments: pd.DataFrame, experiment: str) -> pd.Series:
    return experiments[experiments["experiment_id"] == experiment].iloc[0]
