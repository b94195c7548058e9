"""Latency tables: what clients measured, what a simulation predicts, and the summary of either."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stepcal.datasets import measured
from stepcal.datasets.lifecycle import WHOLE_RUN
from stepcal.datasets.splits import STUDY_FRACTIONS, split_starts
from stepcal.experiments.experiment import Experiment
from stepcal.simulator import SimulationResult
from stepcal.units import MS_PER_S, US_PER_S, BoolArray, FloatArray

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LATENCIES = ("e2e", "ttft", "tpot")
WHOLE, TEST = "whole", "test"


def latency_table(
    e2e_s: FloatArray,
    ttft_s: FloatArray,
    output_tokens: int,
    stage: NDArray[np.integer],
    *,
    fractions: tuple[float, float] = STUDY_FRACTIONS,
) -> pd.DataFrame:
    """Summarise latencies of requests in order of arrival, whole, by load stage, and on the temporal test split.

    Parameters
    ----------
    e2e_s, ttft_s : ndarray, shape (n_requests,)
        NaN for a request that did not complete.
    output_tokens : int
        Tokens that each request generates.
    stage : ndarray of int, shape (n_requests,)
    fractions : (float, float)
        Shares of arrivals before the test split.

    Returns
    -------
    DataFrame
        `split` (``whole``, ``test``, ``stage 0`` and so on), `metric` (``e2e``, ``ttft``, ``tpot`` in ms, ``completed``,
        ``failed``), `statistic` (mean, p50, p90, p99, count), `value`; NaN where no request of a split completed.
    """
    n = len(e2e_s)
    in_test = np.arange(n) >= split_starts(n, fractions)[1]
    splits: dict[str, BoolArray] = {WHOLE: np.ones(n, dtype=bool), TEST: in_test}
    splits |= {f"stage {s}": stage == s for s in np.unique(stage)} if len(np.unique(stage)) > 1 else {}
    tpot_s = (e2e_s - ttft_s) / max(output_tokens - 1, 1)
    rows = []
    for split, chosen in splits.items():
        done = chosen & ~np.isnan(e2e_s)
        rows.append((split, "completed", "count", float(done.sum())))
        rows.append((split, "failed", "count", float((chosen & ~done).sum())))
        for metric, values in zip(LATENCIES, (e2e_s, ttft_s, tpot_s), strict=True):
            here = values[done] * MS_PER_S
            rows.append((split, metric, "mean", float(here.mean()) if here.size else np.nan))
            rows += [
                (split, metric, q, float(np.quantile(here, p)) if here.size else np.nan) for q, p in QUANTILES.items()
            ]
    return pd.DataFrame(rows, columns=["split", "metric", "statistic", "value"])


def measured_latencies(experiment: Experiment) -> pd.DataFrame:
    """Return what clients measured, as `latency_table` does; from shipped summaries where requests are not at hand.

    Rows ``throughput``, ``requests`` are added: requests completed per second (see `served_per_s`).

    The published time per output token counts two stream events a token, so its mean is recomputed from the means of E2E
    and TTFT, and its percentiles are left out of what comes from summaries.
    """
    output_tokens = experiment.workload.output_len
    if experiment.requests is None:
        table = measured()
        return summary_latencies(table[table["experiment_id"] == experiment.experiment_id], output_tokens)
    table = experiment.requests
    failed = table["has_error"].to_numpy(dtype=bool)
    e2e = np.where(failed, np.nan, table["e2e_s"].to_numpy(dtype=float))
    ttft = np.where(failed, np.nan, table["ttft_s"].to_numpy(dtype=float))
    stage = np.asarray(experiment.arrivals("replayed").stage)
    sent = table["arrival_time_us"].to_numpy(dtype=float) / US_PER_S
    ended = sent + np.where(failed, experiment.workload.timeout_s, e2e)
    stages = np.unique(stage)
    splits = {WHOLE: np.ones(len(e2e), dtype=bool), **{f"stage {s}": stage == s for s in stages if len(stages) > 1}}
    per_s = {split: served_per_s(sent[own], ended[own], ~failed[own]) for split, own in splits.items()}
    rows = [(split, "throughput", "requests", value) for split, value in per_s.items() if value is not None]
    served = pd.DataFrame(rows, columns=["split", "metric", "statistic", "value"])
    return pd.concat([latency_table(e2e, ttft, output_tokens, stage), served], ignore_index=True)


def served_per_s(sent_s: FloatArray, ended_s: FloatArray, done: BoolArray) -> float | None:
    """Return the requests completed per second, from the first one sent to the last that was answered or given up.

    Parameters
    ----------
    sent_s, ended_s : ndarray, shape (n_requests,)
        Seconds of one clock.
    done : ndarray of bool, shape (n_requests,)

    Returns
    -------
    float or None
        As the load generator inference-perf counts it; None where no request completed.
    """
    return float(done.sum() / (ended_s.max() - sent_s.min())) if done.any() else None


def summary_latencies(summaries: pd.DataFrame, output_tokens: int) -> pd.DataFrame:
    """Turn the summaries of one run (`stage`, `metric`, `statistic`, `value`) into the shape of `measured_latencies`.

    There is no test split in summaries. The time per output token has its mean only: what the load generator reports
    counts stream events, so the mean is that of E2E less TTFT.
    """
    latencies = summaries[summaries["metric"].isin(["e2e", "ttft"])]
    counts = summaries[(summaries["metric"] == "requests") & summaries["statistic"].isin(["completed", "failed"])]
    served = summaries[(summaries["metric"] == "throughput") & (summaries["statistic"] == "requests")]
    means = latencies[latencies["statistic"] == "mean"].pivot(index="stage", columns="metric", values="value")
    means = means.reindex(columns=["e2e", "ttft"])
    tpot = ((means["e2e"] - means["ttft"]) / max(output_tokens - 1, 1)).rename("value").reset_index()
    rows = [
        latencies,
        counts.assign(metric=counts["statistic"], statistic="count"),
        tpot.assign(metric="tpot", statistic="mean"),
        served,
    ]
    result = pd.concat(rows)
    split = np.where(result["stage"] == WHOLE_RUN, WHOLE, "stage " + result["stage"].astype(int).astype(str))
    result = result.assign(split=split)[["split", "metric", "statistic", "value"]]
    stages = set(result["split"]) - {WHOLE}
    return (result if len(stages) > 1 else result[result["split"] == WHOLE]).reset_index(drop=True)


def predicted_latencies(result: SimulationResult, output_tokens: int) -> pd.DataFrame:
    """Summarise a simulation as `latency_table` does."""
    stage = result.requests.stage
    stages = np.zeros(len(result.requests), dtype=int) if stage is None else np.asarray(stage)
    e2e = result.e2e_us() / US_PER_S
    ttft = np.where(np.isnan(e2e), np.nan, result.ttft_us() / US_PER_S)
    return latency_table(e2e, ttft, output_tokens, stages)


def latency_summary(table: pd.DataFrame, split: str, span_s: float | None = None) -> dict[str, Any]:
    """Return one split of a latency table in the JSON shape of `stepcal simulate`; what is not known is None.

    Parameters
    ----------
    table : DataFrame
        Of `measured_latencies` or `latency_table`.
    split : str
    span_s : float, optional
        Seconds in which the requests completed; by default the table's own throughput is taken.
    """
    values = table[table["split"] == split].set_index(["metric", "statistic"])["value"]

    def quantiles(metric: str) -> dict[str, float | None]:
        known = {s: values.get((metric, s), np.nan) for s in ("mean", *QUANTILES)}
        return {s: None if np.isnan(v) else float(v) for s, v in known.items()}

    completed, failed = (int(values.get((name, "count"), 0)) for name in ("completed", "failed"))
    per_s = completed / span_s if span_s else float(values.get(("throughput", "requests"), np.nan))
    tpot = quantiles("tpot")
    return {
        "requests": completed + failed,
        "completed": completed,
        "failed": failed,
        "e2e_ms": quantiles("e2e"),
        "ttft_ms": quantiles("ttft"),
        # Over requests of one length the mean gap between tokens is the mean time per output token; its quantiles differ.
        "itl_ms": {"mean": tpot["mean"], **dict.fromkeys(QUANTILES)},
        "tpot_ms": tpot,
        "requests_per_s": None if np.isnan(per_s) else per_s,
    }
