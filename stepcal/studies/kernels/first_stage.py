"""What a server's own first stage teaches of its second: the 16 runs and the 31, each calibrated on itself alone.

Each run with two stages of load is calibrated on the first one, with the frozen default as prior, and judged on the E2E of
the second, which no fit saw. Where single requests are published they are used, else the stage's summary and Poisson
arrivals of one seed. Nothing was tuned on the second stages: spreads and blocks are those of `stepcal.servers.calibration`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from stepcal.datasets import have_traces, load_requests
from stepcal.experiments.latencies import measured_latencies
from stepcal.parallel import run_jobs
from stepcal.servers.calibration import calibrate_server
from stepcal.servers.log import ServedLog, log_of
from stepcal.servers.priors import prior_of
from stepcal.servers.replay import replayed_latencies_s
from stepcal.step_time.coefficients import DEFAULT
from stepcal.studies.kernels.transfer import transfer_cases
from stepcal.studies.published_runs import load_experiments
from stepcal.units import MS_PER_S, PERCENT

FIRST, SECOND = 0, 1
SIXTEEN, THIRTY_ONE = "the 16", "the 31"


def first_stage_table(
    requests: pd.DataFrame | None, *, jobs: int = 1, dask: str | None = None, prior: str = DEFAULT
) -> pd.DataFrame:
    """Calibrate each run on its first stage and judge its second.

    Parameters
    ----------
    requests : DataFrame or None
        Request rows of the 16 runs; without them their summaries are used.
    jobs : int
        Processes; their number changes no bit of the result.
    dask : str, optional
        Address of a Dask scheduler that takes their place.
    prior : str

    Returns
    -------
    DataFrame
        `set` (the 16, the 31), `run`, `accelerator`, `bytes_per_weight`, `before_percent`, `after_percent` (signed errors of
        the second stage's mean E2E), `first_before_percent`, `first_after_percent` (in sample), `learned` (in what
        the run differs from the prior; empty where the prior is kept), `log_odds` of that.
    """
    logs = [(SIXTEEN, log_of(e, measured_latencies(e))) for e in load_experiments(requests)]
    logs += [(THIRTY_ONE, log_of(experiment, known)) for experiment, known in transfer_cases()]
    two = [(name, log) for name, log in logs if len(np.unique(log.stage)) > 1]
    return pd.DataFrame(run_jobs(functools.partial(_row_of, prior=prior), two, jobs=jobs, dask=dask))


def _row_of(pair: tuple[str, ServedLog], prior: str) -> dict[str, Any]:
    return _row(*pair, prior)


def _row(name: str, log: ServedLog, prior: str) -> dict[str, Any]:
    start, parameters = prior_of(prior)
    mask = _first_stage(log)
    fitted = calibrate_server([log], start, parameters, masks=[mask])
    row: dict[str, Any] = {
        "set": name,
        "run": log.run,
        "accelerator": log.deployment.accelerator.name,
        "bytes_per_weight": float(log.deployment.architecture.bytes_per_weight),
    }
    for word, coefficients in (("before", start), ("after", fitted.coefficients)):
        e2e, _ = replayed_latencies_s(log, coefficients)
        row[f"{word}_percent"] = _error_percent(log, e2e, SECOND)
        row[f"first_{word}_percent"] = _error_percent(log, e2e, FIRST)
    return {**row, "learned": " ".join(fitted.learned), "log_odds": fitted.log_odds}


def _first_stage(log: ServedLog) -> np.ndarray:
    """Requests of the first stage that ended before the second began; all of it where only summaries are known."""
    first = log.stage == FIRST
    if log.e2e_s is None:
        return first
    begin = log.requests.arrival_s[log.stage == SECOND].min()
    ended = log.requests.arrival_s + np.nan_to_num(log.e2e_s, nan=np.inf)
    return first & (ended <= begin)


def _error_percent(log: ServedLog, e2e: np.ndarray, stage: int) -> float:
    known = log.summaries
    row = known[(known["split"] == f"stage {stage}") & (known["metric"] == "e2e") & (known["statistic"] == "mean")]
    here = e2e[(log.stage == stage) & ~np.isnan(e2e)]
    return (
        float(PERCENT * (MS_PER_S * here.mean() / row["value"].iloc[0] - 1.0))
        if len(row) and here.size
        else float("nan")
    )


def first_stage_summary(table: pd.DataFrame, sets: Sequence[str] = (SIXTEEN, THIRTY_ONE)) -> pd.DataFrame:
    """Return, by set and GPU, runs, and mean and worst absolute error of the second stage's mean E2E before and after."""
    rows = []
    groups = [(name, gpu, part) for (name, gpu), part in table.groupby(["set", "accelerator"], sort=False)]
    groups += [(name, "all", table[table["set"] == name]) for name in sets]
    for name, gpu, part in groups:
        known = part.dropna(subset=["before_percent", "after_percent"])
        row: dict[str, Any] = {"set": name, "accelerator": gpu, "runs": len(known)}
        for word in ("before", "after"):
            size = known[f"{word}_percent"].abs()
            row |= {f"{word}_mean_abs_percent": size.mean(), f"{word}_worst_percent": size.max()}
        rows.append({**row, "improved": int((known["after_percent"].abs() < known["before_percent"].abs()).sum())})
    return pd.DataFrame(rows)


def main() -> int:
    """Print the tables; an argument names other coefficients than the default as prior."""
    prior = sys.argv[1] if len(sys.argv) > 1 else DEFAULT
    table = first_stage_table(load_requests() if have_traces() else None, prior=prior)
    print(table.round(2).to_string())
    print(json.dumps(first_stage_summary(table).round(2).to_dict("records"), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
