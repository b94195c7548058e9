"""The 31 runs of ``data/transfer`` through `check`: servers that nobody here ran, predicted from their arrivals alone."""

from __future__ import annotations

import numpy as np

from stepcal.servers.checks import CheckOptions, check_log
from stepcal.servers.coefficient_file import load_known
from stepcal.servers.log import log_of
from stepcal.studies.kernels.transfer import transfer_cases


def test_the_31_runs_are_within_the_error_that_the_default_says_of_itself() -> None:
    known = load_known("default")
    errors = {}
    for experiment, measured in transfer_cases():
        log = log_of(experiment, measured)
        check = check_log(log, CheckOptions(known.coefficients, known.validity, look_for_mistakes=False))
        gpu = log.deployment.accelerator.name
        error = check.error_percent("e2e")
        assert error is not None
        errors.setdefault(gpu, []).append(np.log1p(error / 100.0))
    assert sum(map(len, errors.values())) == 31
    for gpu, found in errors.items():
        assert np.sqrt(np.mean(np.square(found))) < 1.15 * known.log_sd_on(gpu), gpu
