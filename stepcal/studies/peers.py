"""Our end-to-end errors beside those that others published: three calibration rounds of BLIS and seven public simulators.

Same experiments, same metric: the signed error of a run's mean, ``predicted / measured - 1``, whole run, over completed
requests. The time per output token of everyone is ``(E2E - TTFT) / (tokens - 1)``; what is published as inter-token latency
(ITL) stands beside it, for its measured side counts stream events.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from stepcal.datasets import experiments, measured, peers, published_blis
from stepcal.datasets.lifecycle import WHOLE_RUN
from stepcal.errors import InputError
from stepcal.step_time.kernel_parameters import KERNEL_PARAMETERS
from stepcal.step_time.learned import KERNELS, PHYSICAL
from stepcal.step_time.physical_parameters import API_PARAMETERS, STEP_PARAMETERS
from stepcal.units import PERCENT

OURS = "ours: measured kernels, the default, in sample"
OURS_LEFT_OUT = "ours: measured kernels, model left out"
EARLIER = "ours: datasheets, default of 2026-11-24, in sample"
EARLIER_LEFT_OUT = "ours: datasheets, model left out"
OURS_INFERRED_SETTINGS = 2
"""The size of the offload pool, and that generated tokens are stored in it: read off these runs' labels, not published."""
OURS_FITTED_NUMBERS = len(KERNEL_PARAMETERS) + OURS_INFERRED_SETTINGS
EARLIER_FITTED_NUMBERS = len(STEP_PARAMETERS) + len(API_PARAMETERS) + OURS_INFERRED_SETTINGS
FOUR_A_MODEL = "R4 direct calibration (4 coefficients per model, in sample)"
EVOLVED = "R3 CMA-ES (in sample)"
COEFFICIENTS_A_MODEL = 4
"""Coefficients that round R4 fitted to each model, by its published name."""
PUBLISHED_LEFT_OUT_PERCENT = 14.8
"""Mean E2E error with a model left out, as the study's later rounds state it; its figures by experiment are not public."""
ERRORS = ("e2e_error_percent", "ttft_error_percent", "tpot_error_percent", "itl_error_percent")
COLUMNS = ("method", "experiment_id", *ERRORS)


def measured_means() -> pd.DataFrame:
    """Return the measured means of whole runs, in ms.

    Returns
    -------
    DataFrame
        Indexed by experiment: `e2e`, `ttft`, `itl` (as published), `tokens` (generated a request), `tpot` (time per output
        token) and `events_per_token`, how many published inter-token gaps fit into it.
    """
    table = measured()
    wanted = (
        (table["stage"] == WHOLE_RUN) & (table["statistic"] == "mean") & table["metric"].isin(["e2e", "ttft", "itl"])
    )
    wide = table[wanted].pivot(index="experiment_id", columns="metric", values="value").rename_axis(columns=None)
    tokens = experiments().set_index("experiment_id")["run_output_tokens"].astype(float)
    wide["tokens"] = tokens.reindex(wide.index)
    wide["tpot"] = (wide["e2e"] - wide["ttft"]) / (wide["tokens"] - 1)
    return wide.assign(events_per_token=wide["tpot"] / wide["itl"])


def our_errors(
    errors: pd.DataFrame, folds: pd.DataFrame, earlier_errors: pd.DataFrame, earlier_folds: pd.DataFrame
) -> pd.DataFrame:
    """Return our errors: both defaults on whole runs, and each run by the numbers fitted without its model.

    Parameters
    ----------
    errors, folds : DataFrame
        Tables of `stepcal.studies.kernels.kernel_model.run_kernel_model`.
    earlier_errors, earlier_folds : DataFrame
        Tables of `stepcal.studies.physical_model.run_physical_model`.

    Returns
    -------
    DataFrame
        `COLUMNS`; the ITL error is that of our time per output token against the published ITL.
    """
    parts = [
        _whole(errors, KERNELS.variant).assign(method=OURS),
        _whole(folds, KERNELS.variant).assign(method=OURS_LEFT_OUT),
        _whole(earlier_errors, PHYSICAL.variant).assign(method=EARLIER),
        earlier_folds[earlier_folds["leave_out"] == "model"].assign(method=EARLIER_LEFT_OUT),
    ]
    table = pd.concat(parts, ignore_index=True)
    events = table["experiment_id"].map(measured_means()["events_per_token"])
    itl = PERCENT * ((1.0 + table["tpot_error_percent"] / PERCENT) * events - 1.0)
    return table.assign(itl_error_percent=itl)[list(COLUMNS)]


def _whole(table: pd.DataFrame, variant: str) -> pd.DataFrame:
    return table[(table["variant"] == variant) & (table["split"] == "whole")]


def round_errors() -> pd.DataFrame:
    """Return the errors of the published calibration rounds, `COLUMNS`; ten experiments each."""
    table = published_blis()
    known = measured_means().reindex(table["experiment_id"]).reset_index(drop=True)
    tpot = (table["predicted_e2e_ms"] - table["predicted_ttft_ms"]) / (known["tokens"] - 1)
    return table.assign(
        e2e_error_percent=_error(table["predicted_e2e_ms"], table["measured_e2e_ms"]),
        ttft_error_percent=_error(table["predicted_ttft_ms"], table["measured_ttft_ms"]),
        tpot_error_percent=_error(tpot, known["tpot"]),
        itl_error_percent=_error(table["predicted_itl_ms"], known["itl"]),
    )[list(COLUMNS)]


def peer_errors() -> pd.DataFrame:
    """Return the errors of the public simulators on whole runs, `COLUMNS`, each against the measurement published with it.

    LLMServingSim was given a part of the requests of each run, and its measured means are those of that part.
    """
    table = peers()
    table = table[(table["stage"] == WHOLE_RUN) & (table["statistic"] == "mean")]
    wide = table.pivot(index=["simulator", "experiment_id"], columns="metric", values=["predicted_ms", "measured_ms"])
    predicted, known = wide["predicted_ms"], wide["measured_ms"]
    result = pd.DataFrame(
        {
            "e2e_error_percent": _error(predicted["e2e"], known["e2e"]),
            "ttft_error_percent": _error(predicted["ttft"], known["ttft"]),
            # The number of tokens cancels.
            "tpot_error_percent": _error(predicted["e2e"] - predicted["ttft"], known["e2e"] - known["ttft"]),
            "itl_error_percent": _error(predicted["itl"], known["itl"]),
        }
    )
    return result.reset_index().rename(columns={"simulator": "method"}).rename_axis(columns=None)[list(COLUMNS)]


def summarise(table: pd.DataFrame, only: Iterable[str] | None = None) -> pd.DataFrame:
    """Average errors over experiments, a method a row in order of appearance.

    Parameters
    ----------
    table : DataFrame
        `COLUMNS`.
    only : iterable of str, optional
        Experiments to take; all by default.

    Returns
    -------
    DataFrame
        In percent: `e2e`, `ttft`, `tpot`, `itl` (means of absolute errors), `bias` (mean signed error of E2E) and `worst`
        (largest absolute error of E2E); and `method`, `experiments`.

    Raises
    ------
    InputError
        If none of the experiments is in the table.
    """
    wanted = None if only is None else sorted(set(only))
    chosen = table if wanted is None else table[table["experiment_id"].isin(wanted)]
    if chosen.empty:
        raise InputError(
            f"`only` names {', '.join(wanted or []) or 'no experiment'}, and the table has none of them. It has: "
            f"{', '.join(sorted(table['experiment_id'].unique())) or 'no rows'}."
        )
    rows = []
    for method, own in chosen.groupby("method", sort=False):
        size = own[list(ERRORS)].abs().mean()
        rows.append(
            {
                "method": str(method),
                "experiments": len(own),
                "e2e": size["e2e_error_percent"],
                "bias": own["e2e_error_percent"].mean(),
                "worst": own["e2e_error_percent"].abs().max(),
                "ttft": size["ttft_error_percent"],
                "tpot": size["tpot_error_percent"],
                "itl": size["itl_error_percent"],
            }
        )
    return pd.DataFrame(rows)


def beside_peers(ours: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Return each simulator's summary with ours over the experiments that it predicted.

    Parameters
    ----------
    ours, others : DataFrame
        Of `our_errors` and `peer_errors`.

    Returns
    -------
    DataFrame
        As `summarise`, with `ours_e2e`, `ours_left_out_e2e`, `ours_ttft`, `ours_tpot` (means of absolute errors, percent),
        best first.
    """
    rows = []
    for _, own in others.groupby("method", sort=False):
        mine = summarise(ours, own["experiment_id"]).set_index("method")
        row = {str(key): value for key, value in summarise(own).iloc[0].items()}
        left_out = mine["e2e"].get(OURS_LEFT_OUT, np.nan)
        about = {f"ours_{name}": mine.loc[OURS, name] for name in ("e2e", "ttft", "tpot")}
        rows.append({**row, **about, "ours_left_out_e2e": left_out})
    return pd.DataFrame(rows).sort_values("e2e").reset_index(drop=True)


def fitted_numbers(method: str, experiment_ids: Iterable[str]) -> int | None:
    """Return how many numbers a method fitted to these experiments; None where that is not published."""
    if method in (OURS, OURS_LEFT_OUT):
        return OURS_FITTED_NUMBERS
    if method in (EARLIER, EARLIER_LEFT_OUT):
        return EARLIER_FITTED_NUMBERS
    if method != FOUR_A_MODEL:
        return None
    table = experiments()
    return COEFFICIENTS_A_MODEL * int(table.loc[table["experiment_id"].isin(list(experiment_ids)), "model"].nunique())


def _error(predicted: pd.Series, known: pd.Series) -> pd.Series:
    return PERCENT * (predicted / known - 1.0)
