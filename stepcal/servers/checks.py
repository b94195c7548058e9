"""``stepcal check``: predicted against measured, by stage and percentile, and what looks like a mistake.

Arrivals and lengths go in, latencies come out; nothing of the measured latencies is used. A suspicion is named only where
another reading of the same log explains it far better, or where the rows themselves cannot be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from stepcal.servers.log import ServedLog, summarise
from stepcal.servers.replay import replayed_latencies_s
from stepcal.servers.suspicions import Suspicion, suspicions
from stepcal.servers.validity import Validity, outside
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.units import PERCENT

LOOKED_AT = "model, GPU, TP, weights, KV cache, attention, load; the release of vLLM is not looked at"


@dataclass(frozen=True)
class Check:
    """Predicted against measured for one run.

    Attributes
    ----------
    run : str
    table : DataFrame
        `split`, `metric`, `statistic`, `predicted`, `measured` (ms), `error_percent` (signed).
    suspicions : tuple of Suspicion
    outside : tuple of str
        Where the run lies outside of what the coefficients were fitted on; empty is inside.
    notes : tuple of str
        What was assumed of the run and its server, and what to know of the step time there.
    """

    run: str
    table: pd.DataFrame
    suspicions: tuple[Suspicion, ...]
    outside: tuple[str, ...]
    notes: tuple[str, ...]

    def error_percent(self, metric: str, statistic: str = "mean", split: str = "whole") -> float | None:
        """Signed error of one figure; None where it was not measured or not predicted."""
        t = self.table
        row = t[(t["split"] == split) & (t["metric"] == metric) & (t["statistic"] == statistic)]
        return float(row["error_percent"].iloc[0]) if len(row) else None

    def summary(self) -> dict[str, Any]:
        """Return the check for JSON."""
        return {
            "run": self.run,
            "errors": self.table.to_dict("records"),
            "suspicions": [asdict(s) for s in self.suspicions],
            "outside_validity": list(self.outside),
            "notes": list(self.notes),
        }

    def report(self) -> str:
        """Return the check for a terminal, without its notes: `shared_notes` has those of all runs."""
        lines = [f"{self.run}: signed error of the prediction (%), and what was measured (ms)"]
        lines.append(f"  {'':<10}{'':<6}" + "".join(f"{name:>20}" for name in ("mean", "p50", "p90", "p99")))
        for (split, metric), rows in self.table.groupby(["split", "metric"], sort=False):
            known = rows.set_index("statistic")
            cells = [
                f"{known['error_percent'][s]:+.1f} ({known['measured'][s]:,.1f})" if s in known.index else "-"
                for s in ("mean", "p50", "p90", "p99")
            ]
            lines.append(f"  {split:<10}{metric:<6}" + "".join(f"{cell:>20}" for cell in cells))
        lines += [f"  looks like a mistake: {s.text}" for s in self.suspicions]
        where = "; ".join(self.outside)
        lines.append(
            f"  outside what was calibrated: {where}." if where else f"  inside what was calibrated ({LOOKED_AT})"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckOptions:
    """What `check_log` compares with.

    Attributes
    ----------
    coefficients : StepTimeModel
    validity : Validity
    look_for_mistakes : bool
        Other readings cost a simulation each.
    """

    coefficients: StepTimeModel
    validity: Validity = field(default_factory=Validity)
    look_for_mistakes: bool = True


def check_log(log: ServedLog, options: CheckOptions) -> Check:
    """Compare one run with what the coefficients predict of it.

    Parameters
    ----------
    log : ServedLog
    options : CheckOptions

    Returns
    -------
    Check
    """
    e2e, ttft = replayed_latencies_s(log, options.coefficients)
    if log.ttft_s is not None and np.isnan(log.ttft_s).all():
        ttft = np.full_like(ttft, np.nan)  # the client did not stream
    predicted = summarise(e2e, ttft, log.requests.output_tokens, log.stage)
    keys = ["split", "metric", "statistic"]
    table = predicted.rename(columns={"value": "predicted"}).merge(
        log.summaries.rename(columns={"value": "measured"}), on=keys, how="inner"
    )
    table = table[table["metric"] != "completed"].reset_index(drop=True)
    table["error_percent"] = PERCENT * (table["predicted"] / table["measured"] - 1.0)
    found: Sequence[Suspicion] = ()
    if options.look_for_mistakes:
        found = suspicions(log, options.coefficients, e2e, ttft)
    notes = log_notes(log, options.coefficients)
    return Check(log.run, table, tuple(found), tuple(outside(log, options.validity, e2e)), notes)


def log_notes(log: ServedLog, coefficients: StepTimeModel) -> tuple[str, ...]:
    """Return what was assumed of a run and its server, and what to know of the step time there."""
    return (*log.notes, *coefficients.notes(log.deployment))


def shared_notes(by_run: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the notes of several runs: once those that all have, the others with the runs in front.

    Examples
    --------
    >>> shared_notes([("a", ["one", "two"]), ("b", ["one"])])
    ['one', 'a: two']
    """
    runs: dict[str, list[str]] = {}
    for run, notes in by_run:
        for note in dict.fromkeys(notes):
            runs.setdefault(note, []).append(run)
    return [note if len(own) == len(by_run) else f"{', '.join(own)}: {note}" for note, own in runs.items()]
