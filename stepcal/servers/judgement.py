"""How a calibration does where it was not fitted: on the last fifth of each run, and on stages that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stepcal.servers.calibration import ServerCalibration, calibrate_server
from stepcal.servers.inference.blocks import TRAIN_SHARE, VALIDATION_SHARE, training_mask
from stepcal.servers.log import METRICS, ServedLog
from stepcal.servers.replay import replayed_latencies_s
from stepcal.servers.validity import Validity
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.physical_parameters import LearnedParameter
from stepcal.units import PERCENT, BoolArray, FloatArray

BEFORE, AFTER = "before", "after"
PHASES = 3
"""Parts of the requests, by how many others were in flight when they were sent, that biases are given for."""


@dataclass(frozen=True)
class Judgement:
    """A calibration and its errors.

    Attributes
    ----------
    calibration : ServerCalibration
        Fitted to the training part of all runs.
    errors : DataFrame
        `run`, `part` (``train``, ``validation``, ``test``), `model` (``before``, ``after``), `metric`, and
        `error_percent` of the mean.
    left_out : DataFrame
        The same with `part` a stage that was left out of the fit.
    bias : DataFrame
        `part` (``few``, ``some``, ``many`` in flight), `model`, `metric`, `error_percent`, over all requests.
    log_sd : float
        Root mean square of the logarithmic errors of E2E out of sample: test parts and left-out stages.
    n_out : int
        Errors in `log_sd`.
    validity : Validity
    """

    calibration: ServerCalibration
    errors: pd.DataFrame
    left_out: pd.DataFrame
    bias: pd.DataFrame
    log_sd: float
    n_out: int
    validity: Validity


def judge_calibration(
    logs: Sequence[ServedLog],
    prior: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    *,
    seed: int = 0,
    workers: int = 1,
) -> Judgement:
    """Calibrate on the first 60% of each run, and judge on the rest and over stages.

    Parameters
    ----------
    logs : sequence of ServedLog
    prior : StepTimeModel
    parameters : sequence of LearnedParameter
    seed, workers : int

    Returns
    -------
    Judgement
    """
    fitted = calibrate_server(logs, prior, parameters, seed=seed, workers=workers)
    simulated = {
        BEFORE: [replayed_latencies_s(log, prior) for log in logs],
        AFTER: [replayed_latencies_s(log, fitted.coefficients) for log in logs],
    }
    errors, bias = [], []
    for model, latencies in simulated.items():
        for log, (e2e, ttft) in zip(logs, latencies, strict=True):
            errors += [{**row, "model": model} for row in _by_part(log, e2e, ttft)]
            bias += [{**row, "model": model} for row in _by_load(log, e2e, ttft)]
    left_out = leave_stages_out(logs, prior, parameters, seed=seed, workers=workers)
    table = pd.DataFrame(errors)
    judged = pd.concat([table[table["part"] == "test"], left_out], ignore_index=True)
    chosen = judged[(judged["model"] == AFTER) & (judged["metric"] == "e2e")]["error_percent"]
    logs_of = np.log1p(chosen.to_numpy(dtype=float) / PERCENT)
    return Judgement(
        calibration=fitted,
        errors=table,
        left_out=left_out,
        bias=_mean_bias(pd.DataFrame(bias)),
        log_sd=float(np.sqrt(np.mean(logs_of**2))) if len(logs_of) else float("nan"),
        n_out=len(logs_of),
        validity=Validity.of_logs(logs, [e for e, _ in simulated[AFTER]]),
    )


def leave_stages_out(
    logs: Sequence[ServedLog],
    prior: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    *,
    seed: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Fit without a stage and judge on it, for each stage of each run that has several.

    Returns
    -------
    DataFrame
        `run`, `part` (the stage left out), `model`, `metric`, `error_percent`; empty where no run has two stages.
    """
    rows: list[dict[str, Any]] = []
    stages = sorted({int(s) for log in logs for s in np.unique(log.stage)})
    for out in stages:
        masks = [(log.stage != out) & ~_in_flight_at_other(log, out) for log in logs]
        judged = [i for i, log in enumerate(logs) if (log.stage == out).any() and (log.stage != out).any()]
        if not judged:
            continue
        fitted = calibrate_server(logs, prior, parameters, masks=masks, seed=seed, workers=workers)
        for model, coefficients in ((BEFORE, prior), (AFTER, fitted.coefficients)):
            for i in judged:
                e2e, ttft = replayed_latencies_s(logs[i], coefficients)
                part = {f"stage {out}": logs[i].stage == out}
                rows += [{**row, "model": model} for row in _errors(logs[i], e2e, ttft, part)]
    return pd.DataFrame(rows, columns=["run", "part", "metric", "error_percent", "model"])


def _in_flight_at_other(log: ServedLog, out: int) -> BoolArray:
    """Requests of other stages that were still in flight when the stage left out began."""
    if log.e2e_s is None or not (log.stage == out).any():
        return np.zeros(len(log.requests), dtype=bool)
    begin = log.requests.arrival_s[log.stage == out].min()
    ended = log.requests.arrival_s + np.nan_to_num(log.e2e_s, nan=np.inf)
    return (log.requests.arrival_s < begin) & (ended > begin)


def _by_part(log: ServedLog, e2e: FloatArray, ttft: FloatArray) -> list[dict[str, Any]]:
    n = len(log.requests)
    first = round(TRAIN_SHARE * n)
    last = first + round(VALIDATION_SHARE * n)
    position = np.arange(n)
    parts = {
        "train": training_mask(log),
        "validation": (position >= first) & (position < last),
        "test": position >= last,
    }
    return _errors(log, e2e, ttft, parts)


def _by_load(log: ServedLog, e2e: FloatArray, ttft: FloatArray) -> list[dict[str, Any]]:
    if log.e2e_s is None:
        return []
    end = log.requests.arrival_s + np.nan_to_num(log.e2e_s, nan=0.0)
    arrivals = log.requests.arrival_s
    in_flight = np.arange(1, len(arrivals) + 1) - np.searchsorted(np.sort(end), arrivals, side="right")
    edges = np.quantile(in_flight, np.linspace(0, 1, PHASES + 1)[1:-1])
    phase = np.searchsorted(edges, in_flight, side="left")
    return _errors(log, e2e, ttft, {name: phase == i for i, name in enumerate(("few", "some", "many"))})


def _errors(log: ServedLog, e2e: FloatArray, ttft: FloatArray, parts: dict[str, BoolArray]) -> list[dict[str, Any]]:
    """Signed errors of the means over the requests of each part that completed in both."""
    if log.e2e_s is None or log.ttft_s is None:
        return []
    gaps = np.maximum(np.asarray(log.requests.output_tokens, dtype=float) - 1, 1)
    measured = (log.e2e_s, log.ttft_s, (log.e2e_s - log.ttft_s) / gaps)
    predicted = (e2e, ttft, (e2e - ttft) / gaps)
    rows = []
    for part, chosen in parts.items():
        for metric, known, there in zip(METRICS, measured, predicted, strict=True):
            both = chosen & ~np.isnan(known) & ~np.isnan(there)
            if both.any():
                error = PERCENT * (there[both].mean() / known[both].mean() - 1.0)
                rows.append({"run": log.run, "part": part, "metric": metric, "error_percent": float(error)})
    return rows


def _mean_bias(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return table
    return table.groupby(["part", "model", "metric"], sort=False)["error_percent"].mean().reset_index()
