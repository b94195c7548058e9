"""All that a report about one's own server shows: its data, check, calibration and verdict, from one folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.evaluation.verdict import Verdict, judge
from stepcal.ingest import MANIFEST
from stepcal.servers.checks import Check, CheckOptions, check_log
from stepcal.servers.coefficient_file import KnownModel, load_known
from stepcal.servers.judgement import Judgement, judge_calibration
from stepcal.servers.log import ServedLog, read_logs
from stepcal.servers.priors import prior_of
from stepcal.servers.validity import load_of

HYPOTHESIS = "h3"
"""Pre-registered rules for servers that nobody here has seen."""
BOARDS = {
    "h100-sxm": "default_h100",
    "h100-nvl": "default_h100",
    "a100-80gb": "default_a100",
    "l40s": "default_l40s",
}
"""Which of its criteria speaks of a GPU."""
OTHER_GPU = "other_gpu"


@dataclass(frozen=True)
class Dossier:
    """One's own server.

    Attributes
    ----------
    folder : Path
    logs : list of ServedLog
    model : KnownModel
        What predictions are made with.
    """

    folder: Path
    logs: list[ServedLog]
    model: KnownModel

    @classmethod
    def read(cls, folder: Path | str | None, coefficients: str = "default") -> Dossier:
        """Read a folder that `stepcal ingest` wrote, with an ``exp-config.yaml`` that says what was served.

        Raises
        ------
        InputError
            If no folder is given, or it cannot be read.
        """
        if folder is None:
            raise InputError("Which server is the report about? Give `stepcal report --data FOLDER`.")
        return cls(Path(folder), read_logs(Path(folder), {}), load_known(coefficients))

    def data_table(self) -> pd.DataFrame:
        """Return a row a run: tool, requests, failed, rejected lines, rate, lengths, latencies."""
        manifest = _manifest(self.folder)
        rows = []
        for log in self.logs:
            about = manifest.get(log.run, {})
            e2e = np.full(len(log.requests), np.nan) if log.e2e_s is None else log.e2e_s
            load = load_of(log, e2e)
            mean = log.summaries[(log.summaries["split"] == "whole") & (log.summaries["statistic"] == "mean")]
            known = dict(zip(mean["metric"], mean["value"], strict=True))
            rows.append(
                {
                    "run": log.run,
                    "tool": about.get("tool", "inference-perf summaries"),
                    "requests": len(log.requests),
                    "failed": int(np.isnan(e2e).sum()) if log.e2e_s is not None else 0,
                    "rejected": about.get("rejected", 0),
                    "requests_per_s": load["requests_per_s"],
                    "in_flight": load["batch_requests"],
                    "prompt_tokens": float(np.mean(log.requests.prompt_tokens)),
                    "output_tokens": float(np.mean(log.requests.output_tokens)),
                    **{f"{name}_ms": known.get(name, np.nan) for name in ("e2e", "ttft", "tpot")},
                }
            )
        return pd.DataFrame(rows)

    def definitions(self) -> pd.DataFrame:
        """Return what the words of the tools mean that wrote the runs."""
        rows = {}
        for about in _manifest(self.folder).values():
            for word, meaning in about.get("definitions", {}).items():
                rows[about["tool"], word] = {"tool": about["tool"], "word": word, "meaning": meaning}
        return pd.DataFrame(list(rows.values()), columns=["tool", "word", "meaning"])

    def checks(self) -> list[Check]:
        """Return predicted against measured for each run."""
        return [check_log(log, CheckOptions(self.model.coefficients, self.model.validity)) for log in self.logs]

    def calibration(self) -> Judgement:
        """Calibrate on the first part of all runs and judge on the rest.

        Raises
        ------
        InputError
            If there are summaries only.
        """
        prior, parameters = prior_of("default")
        return judge_calibration(self.logs, prior, parameters)

    def verdict(self) -> Verdict:
        """Judge the runs by the frozen rules of H3, predictions made with this dossier's coefficients."""
        rows = []
        for log, check in zip(self.logs, self.checks(), strict=True):
            variant = BOARDS.get(log.deployment.accelerator.name, OTHER_GPU)
            error = check.error_percent("e2e")
            value = np.nan if error is None else error
            reason = "" if error is not None else "nothing was measured or predicted"
            for quantity, figure in (("e2e_error_percent", abs(value)), ("mspe_percent", value)):
                rows.append(
                    {"quantity": quantity, "variant": variant, "unit": log.run, "value": figure, "reason": reason}
                )
        return judge(HYPOTHESIS, pd.DataFrame(rows))


def check_table(checks: list[Check]) -> pd.DataFrame:
    """Return the whole-run errors of checks: a row a run and metric, a column a statistic (%)."""
    tables = [c.table.assign(run=c.run) for c in checks]
    table = pd.concat(tables, ignore_index=True)
    table = table[table["split"] == "whole"]
    wide = table.pivot_table(index=["run", "metric"], columns="statistic", values="error_percent", sort=False)
    return wide.reset_index()


def verdict_table(verdict: Verdict) -> pd.DataFrame:
    """Return the criteria of a verdict: role, statement, value, evidence."""
    rows = [(r.role.replace("_", " "), r.criterion.statement, r.value, r.evidence) for r in verdict.criteria]
    return pd.DataFrame(rows, columns=["role", "criterion", "value", "evidence"])


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    return {str(run["run"]): run for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
