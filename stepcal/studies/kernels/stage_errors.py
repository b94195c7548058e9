"""By what a model misses a stage of load of a server whose like was left out of its fit: what a calibration must expect.

Of the 16 runs, those that are not overloaded are taken, stage by stage, each model left out of a fit to all other runs by
one Gauss-Newton step from the frozen values. A stage's error of TPOT over what 1% of step time does to TPOT there is the
error of its step time; what is left of TTFT after that is the first token's own. Stages whose TTFT is mostly queue say
nothing of the latter. ``python -m stepcal.studies.kernels.stage_errors`` prints both for each shipped model with priors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stepcal.calibration.closed_loop import Run, prepare_runs, workload_jacobian, workload_residuals
from stepcal.datasets import load_requests
from stepcal.evaluation.cross_validation import folds
from stepcal.experiments.latencies import measured_latencies
from stepcal.servers.inference.blocks import blocks_of, figures_of, log_errors
from stepcal.servers.inference.error_model import factor_slopes
from stepcal.servers.log import log_of
from stepcal.servers.replay import replayed_latencies_s, with_values
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.step_time.learned import learned_model
from stepcal.step_time.physical_parameters import as_array, by_name
from stepcal.studies.published_runs import load_experiments

SHIPPED = ("default", "default-2026-11-24")
MOSTLY_QUEUE = 5.0
"""Growth of TTFT with step time, percent by percent, from which it is the queue that grows."""


def stage_error_table(runs: Sequence[Run], coefficients: StepTimeModel, *, workers: int = 1) -> pd.DataFrame:
    """Return the errors of each stage of the runs that are not overloaded, their models left out of the fit.

    Parameters
    ----------
    runs : sequence of Run
    coefficients : StepTimeModel
        Where the Gauss-Newton step starts.
    workers : int

    Returns
    -------
    DataFrame
        `run`, `stage`, `tpot_slope`, `ttft_slope` (by the step time), `tpot_log_error`, `ttft_log_error`, `step_log_error`,
        and `first_token_log_error`, NaN where TTFT is mostly queue.
    """
    model = learned_model(coefficients.variant)
    x = np.log(as_array(coefficients.values, model.parameters))
    residuals, labels = workload_residuals(runs, coefficients.values, model=model, workers=workers)
    jacobian = workload_jacobian(runs, x, model=model, workers=workers)
    precision = np.diag([p.prior_log_sd**-2.0 for p in model.parameters])
    from_prior = x - np.log([p.start for p in model.parameters])
    parts = []
    for fold in folds(runs, "model"):
        kept = np.isin(labels, list(fold.train))
        own, errors = jacobian[kept], residuals[kept]
        step = np.linalg.solve(own.T @ own + precision, own.T @ errors + precision @ from_prior)
        fitted = with_values(coefficients, by_name(np.exp(x - step), model.parameters))
        judged = [r for r in runs if r.experiment.experiment_id in fold.judged and not r.experiment.overloaded]
        parts += [_stages(run, fitted) for run in judged]
    return pd.concat(parts, ignore_index=True)


def _stages(run: Run, coefficients: StepTimeModel) -> pd.DataFrame:
    log = log_of(run.experiment, measured_latencies(run.experiment))
    blocks = blocks_of([log], [np.ones(len(log.requests), dtype=bool)], 1)
    errors = log_errors([log], blocks, [replayed_latencies_s(log, coefficients)])
    slopes = factor_slopes([log], blocks, coefficients)
    found: dict[int, dict[str, float]] = {}
    for (block, name), error, slope in zip(figures_of(blocks), errors, slopes, strict=True):
        row = found.setdefault(block.stage, {})
        row |= {f"{name}_slope": float(slope), f"{name}_log_error": float(error)}
    table = pd.DataFrame(list(found.values())).assign(run=log.run, stage=list(found))
    table["step_log_error"] = table["tpot_log_error"] / table["tpot_slope"]
    rest = table["ttft_log_error"] - table["ttft_slope"] * table["step_log_error"]
    return table.assign(first_token_log_error=rest.where(table["ttft_slope"] < MOSTLY_QUEUE))


def root_mean_squares(table: pd.DataFrame) -> dict[str, float]:
    """Return the size of both errors, as `stepcal.servers.inference.error_model.STAGE_ERRORS` has them."""
    return {
        "step_log_sd": float(np.sqrt((table["step_log_error"] ** 2).mean())),
        "ttft_log_sd": float(np.sqrt((table["first_token_log_error"] ** 2).mean())),
    }


def main() -> int:
    """Print the tables and the sizes, from the traces that STEPCAL_DATA names."""
    runs = prepare_runs(load_experiments(load_requests()))
    for name in SHIPPED:
        table = stage_error_table(runs, load_coefficients(name))
        print(table.round(4).to_string())
        print(name, {key: round(value, 4) for key, value in root_mean_squares(table).items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
