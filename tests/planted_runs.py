"""Runs whose clients measured what the simulator says, at planted parameters."""

from dataclasses import replace

import numpy as np
from simulated_requests import TIMEOUT_S, measured_table

from stepcal.simulator import LoadStage, simulate
from stepcal.step_time.physical import physical_clock
from stepcal.step_time.physical_parameters import N_STEP

PLANTED = np.array([1.1, 3.0, 40.0, 45.0, 5.0, 1.8, 14.0, 6.0, 0.08, 7_000.0])
SECONDS = 400.0


def simulated(experiment, theta):
    """The experiment, shortened, with what a simulation of it measures in place of what clients did."""
    stages = tuple(LoadStage(s.rate, SECONDS) for s in experiment.workload.stages)
    experiment = replace(experiment, workload=replace(experiment.workload, stages=stages))
    requests = experiment.workload.requests("poisson", seed=3)
    clock = physical_clock(
        theta[:N_STEP],
        experiment.architecture,
        experiment.accelerator,
        experiment.server,
        tensor_parallel=experiment.tensor_parallel,
    )
    result = simulate(requests, experiment.server, clock, timeout_s=TIMEOUT_S, api_before_us=float(theta[N_STEP]))
    table = measured_table(result, experiment.experiment_id)
    return replace(experiment, requests=table)
