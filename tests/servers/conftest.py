"""A small server to play with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stepcal.experiments.options import deployment_from
from stepcal.servers.demo import DEMO_SERVER, Load, demo_truth, simulated_log
from stepcal.servers.log import ServedLog
from stepcal.simulator import LoadStage
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel

EXACT = {"tpot": 0.0, "ttft": 0.0}


@pytest.fixture
def deployment() -> Deployment:
    return deployment_from(DEMO_SERVER).deployment


@pytest.fixture
def exact_log(deployment: Deployment) -> Callable[..., ServedLog]:
    """A log of a server that is the demo's truth exactly, at some rates."""

    def make(
        rates: tuple[float, ...] = (3.0, 6.0),
        *,
        seconds: float = 120.0,
        seed: int = 0,
        truth: StepTimeModel | None = None,
        **changes: object,
    ) -> ServedLog:
        load = Load(tuple(LoadStage(rate, seconds) for rate in rates))
        served = deployment.with_server(**changes) if changes else deployment
        return simulated_log(served, truth or demo_truth(), load, seed=seed, block_log_sd=EXACT)

    return make
