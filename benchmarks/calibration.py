"""Speed of the calibration: one end-to-end evaluation of all experiments, and its gradient by the learned numbers.

::

    python benchmarks/calibration.py --data shared/data --workers 2

Best of several repetitions in one process; what numba compiles is cached on disk, and the first run (which may compile) is
not counted. The gradient takes central differences, so it simulates each run twice a number that touches it.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from stepcal.calibration.closed_loop import prepare_runs, workload_jacobian, workload_residuals
from stepcal.datasets import load_requests
from stepcal.step_time.coefficients import frozen_values
from stepcal.step_time.physical_parameters import as_array, by_name
from stepcal.studies.published_runs import load_experiments


def time_gradient(data: Path | None, workers: int, repeats: int) -> None:
    """Print the time of residuals alone, and of residuals with their Jacobian, at the frozen default."""
    runs = prepare_runs(load_experiments(load_requests(data)))
    log_theta = np.log(as_array(frozen_values()))
    best_s = {}
    for n in sorted({1, workers}):
        alone, both = [], []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            workload_residuals(runs, by_name(np.exp(log_theta)), workers=n)
            evaluated = time.perf_counter()
            jacobian = workload_jacobian(runs, log_theta, workers=n)
            alone.append(evaluated - started)
            both.append(time.perf_counter() - started)
        best_s[n] = min(both[1:])
        n_requests = sum(len(run.requests) for run in runs)
        print(
            f"{len(runs)} experiments, {n_requests:,} requests, {n} thread{'s' if n > 1 else ''}: "
            f"evaluation {min(alone[1:]):.3f} s, with its {jacobian.shape[1]} derivatives {best_s[n]:.3f} s"
        )


def main() -> None:
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with requests/; by default STEPCAL_DATA")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    time_gradient(arguments.data, arguments.workers, arguments.repeats)


if __name__ == "__main__":
    main()
