"""How a variant of the step time is judged: closed loop, by part of the arrivals, and by a rule that was set before.

Errors are ``mean predicted / mean measured - 1`` over completed requests: measured arrivals in, latencies out. What is
chosen is chosen on the validation part (arrivals from 60% to 80%); the test part is only reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Run
from stepcal.calibration.training_rows import RequestLevel
from stepcal.datasets.splits import split_starts
from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.simulator import CompiledStepTime, simulate
from stepcal.step_time.physical import compile_physical
from stepcal.studies.model_forms import PHASES, SHIPPED, Form
from stepcal.units import PERCENT, US_PER_S, BoolArray, FloatArray

TRAIN, VALID, TEST, WHOLE = "train", "valid", "test", "whole"
MIN_GAIN_POINTS = 0.5
"""The rule, set before the fits: a variant with more numbers is preferred to the global one only if its validation error of
mean E2E, averaged over the runs that are not overloaded, is smaller by more than so many percentage points."""


@dataclass(frozen=True)
class Fitted:
    """One variant: what was learned, and how to predict with it.

    Attributes
    ----------
    name, what : str
    n_numbers : int
        Numbers that data were fitted with, those of every model counted, those that only a prior holds not.
    values : mapping of str to mapping
        By model, its parameters by name: those of the step time and the API overhead.
    form : Form
    """

    name: str
    what: str
    n_numbers: int
    values: Mapping[str, Mapping[str, float]]
    form: Form = SHIPPED

    def values_of(self, model: str) -> Mapping[str, float]:
        """Parameters of one model.

        Raises
        ------
        InputError
            If the variant was not fitted to it.
        """
        if model not in self.values:
            raise InputError(
                f"`{self.name}` has no numbers for `{model}`; it was fitted to {', '.join(self.values)}. "
                "Use the global numbers."
            )
        return self.values[model]


def compile_variant(variant: Fitted, experiment: Experiment) -> CompiledStepTime:
    """Compile a variant for one server.

    Raises
    ------
    InputError
        If it was not fitted to the server's model.
    """
    values = variant.values_of(experiment.architecture.name)
    return compile_physical(values, experiment.deployment, model=variant.form.model, by_batch=variant.form is PHASES)


def errors_of(variant: Fitted, runs: Sequence[Run], level: RequestLevel) -> pd.DataFrame:
    """Return a variant's errors, closed loop, on each part of the arrivals.

    Parameters
    ----------
    variant : Fitted
    runs : sequence of Run
        Of measured requests.
    level : RequestLevel
        All requests of these runs.

    Returns
    -------
    DataFrame
        `fit`, `experiment_id`, `overloaded`, `split` (train, valid, test, whole), `e2e_percent`, `ttft_percent`,
        `tpot_percent`, `completed_percent` (signed; NaN where nothing completes), `interval_mape_percent` of the requests'
        decode intervals.

    Raises
    ------
    InputError
        If the variant was not fitted to the model of a run, or a run has no measured requests.
    """
    rows = []
    for run in runs:
        name = run.experiment.experiment_id
        own = level.subset((level.rows["experiment_id"] == name).to_numpy())
        values = variant.values_of(run.experiment.architecture.name)
        predicted = variant.form.predict_us(values, own.features)
        interval = PERCENT * np.abs(predicted / own.rows["interval_us"].to_numpy(dtype=float) - 1.0)
        part = own.rows["split"].to_numpy()
        result = simulate(
            run.requests,
            run.experiment.server,
            compile_variant(variant, run.experiment),
            timeout_s=run.experiment.workload.timeout_s,
            api_before_us=values["api_before_us"],
        )
        e2e = result.e2e_us() / US_PER_S
        about = {"fit": variant.name, "experiment_id": name, "overloaded": run.experiment.overloaded}
        for split, errors in split_errors(run, e2e, result.ttft_us() / US_PER_S).items():
            chosen = np.ones(len(part), dtype=bool) if split == WHOLE else part == split
            mape = float(interval[chosen].mean()) if chosen.any() else np.nan
            rows.append({**about, "split": split, **errors, "interval_mape_percent": mape})
    return pd.DataFrame(rows)


def split_errors(run: Run, e2e_s: FloatArray, ttft_s: FloatArray) -> dict[str, dict[str, float]]:
    """Return the signed errors of means by part of the arrivals.

    Parameters
    ----------
    run : Run
        With measured requests.
    e2e_s, ttft_s : ndarray, shape (n_requests,)
        Predicted, seconds, in order of arrival; NaN for a request that does not complete.

    Returns
    -------
    dict
        Of `split` to `e2e_percent`, `ttft_percent`, `tpot_percent`, `completed_percent`.

    Raises
    ------
    InputError
        If the run has no measured requests.
    """
    table = run.experiment.requests
    if table is None:
        raise InputError(f"The requests of `{run.experiment.experiment_id}` are not at hand. Set STEPCAL_DATA.")
    n = len(table)
    place, (first_valid, first_test) = np.arange(n), split_starts(n)
    splits = {
        TRAIN: place < first_valid,
        VALID: (place >= first_valid) & (place < first_test),
        TEST: place >= first_test,
        WHOLE: np.ones(n, dtype=bool),
    }
    known_done = ~table["has_error"].to_numpy(dtype=bool)
    known_e2e, known_ttft = table["e2e_s"].to_numpy(dtype=float), table["ttft_s"].to_numpy(dtype=float)
    done = ~np.isnan(e2e_s)

    def figures(e2e: FloatArray, ttft: FloatArray, chosen: BoolArray) -> dict[str, float]:
        n_done = int(chosen.sum())
        if not n_done:
            return {"e2e": np.nan, "ttft": np.nan, "tpot": np.nan, "completed": 0.0}
        means = {"e2e": float(e2e[chosen].mean()), "ttft": float(ttft[chosen].mean())}
        return {**means, "tpot": means["e2e"] - means["ttft"], "completed": float(n_done)}

    result = {}
    for split, chosen in splits.items():
        predicted, known = figures(e2e_s, ttft_s, chosen & done), figures(known_e2e, known_ttft, chosen & known_done)
        result[split] = {
            f"{k}_percent": PERCENT * (predicted[k] / v - 1.0) if v > 0 else np.nan for k, v in known.items()
        }
    return result


def summarise(errors: pd.DataFrame) -> pd.DataFrame:
    """Return one row a variant and split.

    Parameters
    ----------
    errors : DataFrame
        Of `errors_of`.

    Returns
    -------
    DataFrame
        `fit`, `split`; over the runs that are not overloaded, means of absolute errors: `e2e_percent`, `ttft_percent`,
        `tpot_percent`, `interval_mape_percent`, and `worst_e2e_percent`; over all runs `e2e_all_percent` (mean of absolute
        errors) and `mspe_percent` (signed mean), over the `n_all` in which requests of the split completed; over overloaded
        runs `completed_percent` (mean of absolute errors), over the `n_completed` likewise.
    """
    rows = []
    for (fit, split), own in errors.groupby(["fit", "split"], sort=False):
        calm, full = own[~own["overloaded"]], own[own["overloaded"]]
        means = {name: float(calm[name].abs().mean()) for name in ("e2e_percent", "ttft_percent", "tpot_percent")}
        rows.append(
            {
                "fit": fit,
                "split": split,
                **means,
                "worst_e2e_percent": float(calm["e2e_percent"].abs().max()),
                "e2e_all_percent": float(own["e2e_percent"].abs().mean()),
                "mspe_percent": float(own["e2e_percent"].mean()),
                "n_all": int(own["e2e_percent"].notna().sum()),
                "completed_percent": float(full["completed_percent"].abs().mean()),
                "n_completed": int(full["completed_percent"].notna().sum()),
                "interval_mape_percent": float(calm["interval_mape_percent"].mean()),
            }
        )
    return pd.DataFrame(rows)


def choose(scores: pd.DataFrame, n_numbers: Mapping[str, int], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Apply the rule of `MIN_GAIN_POINTS` to every variant with more numbers.

    Parameters
    ----------
    scores : DataFrame
        Of `summarise`.
    n_numbers : mapping of str to int
        By fit.
    pairs : sequence of (str, str)
        A variant, and the global fit of the same level.

    Returns
    -------
    DataFrame
        `fit`, `against` (the global fit of the same level), `n_numbers`, `n_global`, `valid_percent`, `global_percent`
        (validation error of mean E2E, mean over runs that are not overloaded), `gain_points`, `preferred`.
    """
    valid = scores[scores["split"] == VALID].set_index("fit")["e2e_percent"]
    rows = []
    for fit, against in pairs:
        gain = float(valid[against] - valid[fit])
        rows.append(
            {
                "fit": fit,
                "against": against,
                "n_numbers": n_numbers[fit],
                "n_global": n_numbers[against],
                "valid_percent": float(valid[fit]),
                "global_percent": float(valid[against]),
                "gain_points": gain,
                "preferred": "variant" if gain > MIN_GAIN_POINTS else "global",
            }
        )
    return pd.DataFrame(rows)
