"""What a simulation gives back: a row for each request, summaries by stage of load, and on request the step table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stepcal.errors import InputError
from stepcal.simulator import layout as at
from stepcal.simulator.clock import gap_bin_centres
from stepcal.simulator.load.workload import RequestList
from stepcal.simulator.step_record import StepRows
from stepcal.units import US_PER_MS, US_PER_S, FloatArray, IntArray

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

Summary = dict[str, Any]


@dataclass(frozen=True)
class SimulationResult:
    """Outcome of a simulation.

    Times of the request table are those of the client, in seconds from the start, except `first_scheduled_s`, which
    is the engine's. Latencies in summaries are those of completed requests, the gaps between tokens (`itl_ms`) those
    of all tokens sent.
    """

    requests: RequestList
    rows: np.ndarray  # layout.REQUEST_ROW
    api_before_us: float
    api_after_us: float
    steps: int
    preemptions: int
    simulated_s: float
    wall_s: float
    engine_s: float
    gap_counts: IntArray
    gap_sums: FloatArray
    step_rows: StepRows | None
    kv_blocks: int
    experiment_id: str

    @property
    def sent_us(self) -> FloatArray:
        """When the client sent each request; NaN for follow-up turns that were never sent."""
        sent = self.rows["arrival_us"] - self.api_before_us
        if self.requests.follows is not None:
            sent[self.rows["status"] == at.NOT_SENT] = np.nan
        return sent

    @property
    def is_finished(self) -> np.ndarray:
        """Which requests completed, shape (n,)."""
        return self.rows["status"] == at.FINISHED

    def e2e_us(self) -> FloatArray:
        """End-to-end latency that the client sees; NaN unless the request completed."""
        latency = self.rows["finish_us"] + self.api_after_us - self.sent_us
        latency[~self.is_finished] = np.nan
        return latency

    def ttft_us(self) -> FloatArray:
        """Time to the first token that the client sees; NaN where there was none."""
        return self.rows["first_token_us"] + self.api_after_us - self.sent_us

    def request_table(self) -> pd.DataFrame:
        """One row a request: when it arrived, started, had its first token, finished; status, lengths, preemptions."""
        import pandas as pd

        rows = self.rows
        status = pd.Categorical.from_codes(rows["status"].tolist(), categories=pd.Index(at.STATUS_NAMES))
        return pd.DataFrame(
            {
                "index": np.arange(len(self.requests)) if self.requests.index is None else self.requests.index,
                "stage": 0 if self.requests.stage is None else self.requests.stage,
                "arrival_s": self.sent_us / US_PER_S,
                "first_scheduled_s": rows["first_scheduled_us"] / US_PER_S,
                "first_token_s": (rows["first_token_us"] + self.api_after_us) / US_PER_S,
                "finish_s": (rows["finish_us"] + np.where(self.is_finished, self.api_after_us, 0.0)) / US_PER_S,
                "status": status,
                "prompt_tokens": rows["prompt_tokens"],
                "output_tokens": rows["output_tokens"],
                "generated_tokens": rows["generated_tokens"],
                "cached_tokens": rows["cached_tokens"],
                "preemptions": rows["preemptions"],
                "e2e_s": self.e2e_us() / US_PER_S,
                "ttft_s": self.ttft_us() / US_PER_S,
            },
            copy=False,
        )

    def step_table(self) -> pa.Table:
        """The recorded steps in the canonical step schema.

        Raises
        ------
        InputError
            If the simulation recorded none.
        """
        if self.step_rows is None:
            raise InputError(
                "No steps were recorded. Call `simulate(..., record_steps=1.0)`, or a smaller fraction for a sample."
            )
        return self.step_rows.table(self.experiment_id, self.kv_blocks)

    def summary(self) -> Summary:
        """Latency statistics overall and by stage of load, ready for JSON (NaN and undefined values are None)."""
        n_stages = self.requests.n_stages
        e2e, ttft = self.e2e_us(), self.ttft_us()
        stages = [
            self._summarise(e2e, ttft, None if n_stages == 1 else self._stage() == s, slice(s, s + 1))
            for s in range(n_stages)
        ]
        return {
            "overall": stages[0] if n_stages == 1 else self._summarise(e2e, ttft, None, slice(None)),
            "stages": stages,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "simulated_s": self.simulated_s,
            "wall_s": self.wall_s,
        }

    def _stage(self) -> np.ndarray:
        return self.rows["stage"]

    def _summarise(self, e2e: FloatArray, ttft: FloatArray, mask: np.ndarray | None, stages: slice) -> Summary:
        finished = self.is_finished if mask is None else self.is_finished & mask
        n = len(self.requests) if mask is None else int(mask.sum())
        n_finished = int(finished.sum())
        e2e, ttft = e2e[finished], ttft[finished]
        gaps = self.rows["output_tokens"][finished] - 1
        tpot = (e2e - ttft)[gaps > 0] / gaps[gaps > 0]
        sent = self.sent_us if mask is None else self.sent_us[mask]
        last = self.rows["finish_us"][finished].max(initial=0.0) + self.api_after_us
        span_us = last - np.nanmin(sent) if n_finished else 0.0
        return {
            "requests": n,
            "completed": n_finished,
            "failed": n - n_finished,
            "e2e_ms": _quantiles(e2e / US_PER_MS),
            "ttft_ms": _quantiles(ttft / US_PER_MS),
            "itl_ms": _gap_quantiles(self.gap_counts[stages].sum(axis=0), float(self.gap_sums[stages].sum())),
            "tpot_ms": _quantiles(tpot / US_PER_MS),
            "requests_per_s": float(n_finished / span_us * US_PER_S) if span_us > 0.0 else None,
        }


def _quantiles(values: FloatArray) -> dict[str, float | None]:
    if values.size == 0:
        return dict.fromkeys(("mean", *_QUANTILES))
    quantiles = np.quantile(values, list(_QUANTILES.values()))
    return {"mean": float(values.mean()), **dict(zip(_QUANTILES, quantiles.tolist(), strict=True))}


def _gap_quantiles(counts: IntArray, total_us: float) -> dict[str, float | None]:
    """Quantiles of the gaps between tokens, out of their histogram (exact to 0.1 %)."""
    n = int(counts.sum())
    if n == 0:
        return dict.fromkeys(("mean", *_QUANTILES))
    ends = np.cumsum(counts)
    centres = gap_bin_centres() / US_PER_MS
    ranks = {name: int(np.searchsorted(ends, q * n)) for name, q in _QUANTILES.items()}
    return {
        "mean": total_us / n / US_PER_MS,
        **{name: float(centres[min(i, centres.size - 1)]) for name, i in ranks.items()},
    }
