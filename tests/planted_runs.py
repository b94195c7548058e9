"""Runs whose clients measured what the simulator says, at planted parameters."""

from dataclasses import replace

from simulated_requests import TIMEOUT_S, measured_table

from stepcal.simulator import LoadStage, simulate
from stepcal.step_time.physical import compile_physical
from stepcal.step_time.physical_parameters import by_name

PLANTED = by_name([1.1, 3.0, 40.0, 45.0, 5.0, 1.8, 14.0, 6.0, 0.08, 7_000.0])
SECONDS = 400.0


def simulated(experiment, values):
    """The experiment, shortened, with what a simulation of it measures in place of what clients did."""
    stages = tuple(LoadStage(s.rate, SECONDS) for s in experiment.workload.stages)
    experiment = replace(experiment, workload=replace(experiment.workload, stages=stages))
    requests = experiment.workload.requests("poisson", seed=3)
    step_time = compile_physical(values, experiment.deployment)
    result = simulate(
        requests, experiment.server, step_time, timeout_s=TIMEOUT_S, api_before_us=values["api_before_us"]
    )
    table = measured_table(result, experiment.experiment_id)
    return replace(experiment, requests=table)
