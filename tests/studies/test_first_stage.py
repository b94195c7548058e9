"""Calibrating a run on its first stage and judging the second: on runs of which summaries ship."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stepcal.experiments.latencies import measured_latencies
from stepcal.servers.log import log_of
from stepcal.studies.kernels.first_stage import SIXTEEN, _row, first_stage_summary
from stepcal.studies.published_runs import load_experiments


def test_a_stage_within_the_models_error_is_no_news_and_the_second_is_not_looked_at() -> None:
    from dataclasses import replace

    experiment = next(e for e in load_experiments() if "codellama-34b-tp2-general" in e.experiment_id)
    log = log_of(experiment, measured_latencies(experiment))
    row = _row(SIXTEEN, log, "default")
    assert row["first_after_percent"] == row["first_before_percent"]  # 1% off is no news of this model
    changed = log.summaries.copy()
    changed.loc[changed["split"] != "stage 0", "value"] *= 2.0
    other = _row(SIXTEEN, replace(log, summaries=changed), "default")
    assert other["first_after_percent"] == row["first_after_percent"]
    assert other["learned"] == row["learned"] == ""
    assert row["after_percent"] == row["before_percent"]
    assert other["after_percent"] != row["after_percent"]


def test_the_summary_counts_what_improved() -> None:
    table = pd.DataFrame(
        {
            "set": SIXTEEN,
            "accelerator": "h100-sxm",
            "before_percent": [4.0, -2.0, np.nan],
            "after_percent": [-1.0, 3.0, 1.0],
        }
    )
    row = first_stage_summary(table, (SIXTEEN,)).iloc[-1]
    assert (row["runs"], row["improved"]) == (2, 1)
    assert (row["before_mean_abs_percent"], row["after_worst_percent"]) == (3.0, 3.0)
