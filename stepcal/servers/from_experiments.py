"""`stepcal.calibrate`: what ``stepcal calibrate`` does, for experiments at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment
from stepcal.experiments.latencies import measured_latencies
from stepcal.servers.calibration import ServerCalibration, calibrate_server
from stepcal.servers.coefficient_file import learned_words, parameter_lines
from stepcal.servers.inference.blocks import training_mask
from stepcal.servers.log import log_of
from stepcal.servers.priors import prior_of
from stepcal.step_time.coefficients import DEFAULT, StepTimeModel


@dataclass(frozen=True)
class CalibrationResult:
    """What was learned of a server, and what it rests on.

    Attributes
    ----------
    model : StepTimeModel
        Ready for `stepcal.simulate` and `stepcal.evaluate`; the prior itself where the runs agree with it within the error
        that it is known to have.
    learned : dict
        In what the server differs from the prior, with the factor on the prior's values: single parameters, or
        ``gpu_speed``, all times of the GPU together.
    table : DataFrame
        A row a parameter that acts on the server: `name`, `unit`, `prior`, `value` (that is used), `median`, `low`, `high`
        (of the posterior of all parameters together, 95%), and `state`, where the value comes from: ``learned``, ``moves
        with gpu_speed``, ``as the prior has it``, ``held by the prior``, or ``in doubt`` (outside of the interval).
    n_requests : int
        Requests that were learned from: the first 60% of each run's arrivals.
    experiments : tuple of str
    calibration : ServerCalibration
        All of it.
    """

    model: StepTimeModel
    learned: dict[str, float]
    table: pd.DataFrame
    n_requests: int
    experiments: tuple[str, ...]
    calibration: ServerCalibration

    def report(self) -> str:
        """Return a text with what was learned, and each parameter with its interval and state."""
        runs = f"{len(self.experiments)} experiment{'s' if len(self.experiments) > 1 else ''}"
        prior = dict(zip(self.table["name"], self.table["prior"], strict=True))
        lines = [
            f"{self.model.variant} model, {runs}, {self.n_requests:,} training requests",
            learned_words(self.calibration),
            *parameter_lines(self.calibration, prior),
        ]
        return "\n".join(lines)


def calibrate(
    experiments: Sequence[Experiment], *, prior: str = DEFAULT, seed: int = 0, workers: int = 1
) -> CalibrationResult:
    """Learn of a server what its measured runs determine, with the shipped model as prior.

    The requests are sent again in the simulator, and means of blocks of time are compared. What the model is known to miss
    is no news: only parameters that the runs speak for move, the others keep the prior's values. The last 40% of each run's
    arrivals are left for judging (`stepcal.evaluate`). The command ``stepcal calibrate`` does the same.

    Parameters
    ----------
    experiments : sequence of Experiment
        Of one server, with measured requests.
    prior : str
        Coefficients that the data correct, by name or as a file.
    seed : int
        Of the draws behind the intervals.
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    CalibrationResult

    Raises
    ------
    InputError
        If there is no experiment, one has no measured requests, or the prior's parameters have no priors.

    Examples
    --------
    >>> import stepcal
    >>> fitted = stepcal.calibrate(stepcal.Experiment.read_folder("my-runs"))
    >>> print(fitted.report().splitlines()[0])
    kernels model, 1 experiment, 68 training requests
    >>> fitted.learned  # these clients saw what the default says
    {}
    >>> fitted.model == stepcal.StepTimeModel.load("default")
    True
    """
    if not experiments:
        raise InputError("There is nothing to fit: give at least one experiment with measured requests.")
    start, parameters = prior_of(prior)
    logs = [log_of(e, measured_latencies(e)) for e in experiments]
    masks = [training_mask(log) for log in logs]
    fitted = calibrate_server(logs, start, parameters, masks=masks, seed=seed, workers=workers)
    used = fitted.coefficients.values
    rows = [
        (p.name, p.unit, start.values[p.name], used[p.name], fitted.free(p.name), *fitted.interval(p.name))
        for p in fitted.parameters
    ]
    table = pd.DataFrame(rows, columns=["name", "unit", "prior", "value", "median", "low", "high"])
    return CalibrationResult(
        model=fitted.coefficients,
        learned=fitted.learned,
        table=table.assign(state=[fitted.state(name) for name in table["name"]]),
        n_requests=sum(int(mask.sum()) for mask in masks),
        experiments=tuple(e.experiment_id for e in experiments),
        calibration=fitted,
    )
