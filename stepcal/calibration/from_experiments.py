"""Parameters of the physical model from measured runs: simulate them again and again until the latencies agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri

from stepcal.calibration import closed_loop
from stepcal.calibration.uncertainty import parameter_table
from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.metrics import CONFIDENCE
from stepcal.step_time.coefficients import DEFAULT, StepTimeModel


@dataclass(frozen=True)
class CalibrationResult:
    """Fitted parameters and what they rest on.

    Attributes
    ----------
    model : StepTimeModel
        Ready for `stepcal.simulate` and `stepcal.evaluate`.
    table : DataFrame
        A row a parameter: `name`, `unit`, `value`, `low`, `high` (95%, of the posterior), `identified`, `reason`, and the
        prior. What is not identified is held by its prior.
    n_requests : int
        Requests of the training part: the first 60% of each run's arrivals.
    experiments : tuple of str
    """

    model: StepTimeModel
    table: pd.DataFrame
    n_requests: int
    experiments: tuple[str, ...]

    def report(self) -> str:
        """Return a text with each parameter, its interval, or the reason why it has none."""
        width = max(len(name) for name in self.table["name"]) + 2
        runs = f"{len(self.experiments)} experiment{'s' if len(self.experiments) > 1 else ''}"
        lines = [f"physical model, {runs}, {self.n_requests:,} training requests"]
        for row in self.table.itertuples():
            unit = "" if row.unit == "1" else f" {row.unit}"
            interval = f"[{row.low:.3g}, {row.high:.3g}]" if row.identified else f"not identified: {row.reason}"
            lines.append(f"  {row.name:<{width}}{f'{row.value:.4g}{unit}':<12} {interval}")
        return "\n".join(lines)


def calibrate(experiments: Sequence[Experiment], *, workers: int = 1) -> CalibrationResult:
    """Fit the physical model to measured runs, with the datasheets and kernel benchmarks as priors.

    The means of E2E latency, TTFT and time per output token of each stage of load are matched in a closed loop: measured
    arrivals in, simulated latencies out. The last 40% of each run's arrivals are left for judging (`stepcal.evaluate`).

    Parameters
    ----------
    experiments : sequence of Experiment
        With measured requests.
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    CalibrationResult

    Raises
    ------
    InputError
        If there is no experiment, or one has no measured requests.

    Examples
    --------
    >>> import stepcal
    >>> fitted = stepcal.calibrate(stepcal.Experiment.read_folder("my-runs"))
    >>> print(fitted.report().splitlines()[0])
    physical model, 1 experiment, 68 training requests
    >>> fitted.model.parameters["layer_us"].unit
    'us'
    >>> bool(fitted.table.set_index("name").loc["collective_us", "identified"])  # one GPU has no collectives
    False
    """
    if not experiments:
        raise InputError("There is nothing to fit: give at least one experiment with measured requests.")
    runs = closed_loop.prepare_runs(experiments)
    fitted = closed_loop.calibrate(runs=runs, workers=workers)
    table = parameter_table(fitted)[0]
    # With few runs a bootstrap over runs says little: the interval is the posterior's, as normal in the logarithm.
    spread = np.exp(ndtri(0.5 + CONFIDENCE / 2) * table["posterior_log_sd"])
    table = table.assign(low=table["value"] / spread, high=table["value"] * spread)
    names = tuple(e.experiment_id for e in experiments)
    units = {p.name: p.unit for p in fitted.parameters}
    model = StepTimeModel(DEFAULT, dict(fitted.values), f"a calibration to {', '.join(names)}", units=units).check()
    n_requests = sum(int(target.chosen.sum()) for run in runs for target in run.targets)
    return CalibrationResult(model, table, n_requests, names)
