"""The gradient through the simulator: the same on any number of threads, and nothing simulated that cannot change."""

import threading
import time

import numpy as np
import pytest
from planted_runs import PLANTED, simulated

from stepcal.calibration import closed_loop as calibration
from stepcal.calibration.closed_loop import (
    DIFFERENCE_SHARE,
    calibrate,
    prepare_runs,
    workload_jacobian,
    workload_residuals,
)
from stepcal.calibration.gauss_newton import significant
from stepcal.simulator import CompiledStepTime, LoadStage, ServerConfig, Workload, engine, simulate
from stepcal.step_time.physical_parameters import PARAMETERS, as_array, by_name
from stepcal.studies.published_runs import load_experiments
from stepcal.threads import each

NAMES = [p.name for p in PARAMETERS]
ELSEWHERE = np.log(as_array(PLANTED) * 1.03)
DENSE_ONE_RANK, DENSE, MIXTURE = 0, 1, 2


@pytest.fixture(scope="module")
def runs():
    """A dense model on one GPU, a dense one on several, a mixture on two; measured as `PLANTED` predicts."""
    own = [e for e in load_experiments() if not e.overloaded]
    one = next(e for e in own if e.deployment.tensor_parallel == 1)
    several = next(e for e in own if e.deployment.tensor_parallel == 4)
    mixture = next(e for e in own if e.architecture.is_mixture)
    return prepare_runs([simulated(e, PLANTED) for e in (one, several, mixture)])


@pytest.fixture
def n_simulated(monkeypatch):
    """Simulations by experiment, as they happen."""
    counts: dict[str, int] = {}
    latencies = calibration._latencies_s

    def counted(run, step_time, values):
        name = run.experiment.experiment_id
        counts[name] = counts.get(name, 0) + 1
        return latencies(run, step_time, values)

    monkeypatch.setattr(calibration, "_latencies_s", counted)
    return counts


@pytest.mark.parametrize("workers", [2, 3])
def test_threads_change_no_bit(runs, workers: int) -> None:
    alone, labels = workload_residuals(runs, by_name(np.exp(ELSEWHERE)))
    together, same_labels = workload_residuals(runs, by_name(np.exp(ELSEWHERE)), workers=workers)
    assert alone.tobytes() == together.tobytes()
    assert labels == same_labels
    assert np.abs(alone).max() > 0.5
    alone, together = (workload_jacobian(runs, ELSEWHERE, workers=n) for n in (1, workers))
    assert alone.tobytes() == together.tobytes()


def test_the_gradient_is_that_of_central_differences_of_everything(runs) -> None:
    columns = []
    for j, parameter in enumerate(PARAMETERS):
        step = np.zeros(ELSEWHERE.size)
        step[j] = DIFFERENCE_SHARE * parameter.prior_log_sd
        ends = [by_name(significant(np.exp(ELSEWHERE + sign * step))) for sign in (1, -1)]
        above, below = (workload_residuals(runs, values)[0] for values in ends)
        columns.append((above - below) / np.log(ends[0][parameter.name] / ends[1][parameter.name]))
    assert np.array_equal(workload_jacobian(runs, ELSEWHERE), np.column_stack(columns))


def test_the_gradient_holds_slopes_rather_than_jitter(runs) -> None:
    """Places that differ by a thousandth of a standard deviation have the same gradient, within what the fit needs."""
    here = workload_jacobian(runs, ELSEWHERE)
    there = workload_jacobian(runs, ELSEWHERE + 1e-4 * np.resize([1.0, -1.0], ELSEWHERE.size))
    scale = np.array([p.prior_log_sd for p in PARAMETERS])
    assert np.linalg.norm((here - there) * scale) < 0.1 * np.linalg.norm(here * scale)


def test_only_what_a_number_touches_is_simulated(runs, n_simulated) -> None:
    jacobian = workload_jacobian(runs, ELSEWHERE, workers=2)
    names = [run.experiment.experiment_id for run in runs]
    every = len(PARAMETERS)
    # Two numbers are of collectives, one is of mixture layers.
    assert [n_simulated[name] for name in names] == [2 * (every - 3), 2 * (every - 1), 2 * every]
    rows = np.repeat(np.arange(3), [sum(3 for _ in run.targets) for run in runs])
    for name, untouched in (("collective_us", [DENSE_ONE_RANK]), ("mixture_layer_us", [DENSE_ONE_RANK, DENSE])):
        column = jacobian[:, NAMES.index(name)]
        assert not column[np.isin(rows, untouched)].any(), name
        assert column[~np.isin(rows, untouched)].any(), name


def test_a_calibration_is_the_same_on_two_threads(runs, n_simulated) -> None:
    start = by_name(np.exp(ELSEWHERE))
    alone = calibrate(runs=runs, start=start, max_jacobians=2)
    n_alone = sum(n_simulated.values())
    together = calibrate(runs=runs, start=start, max_jacobians=2, workers=2)
    assert alone.values == together.values
    assert alone.jacobian.tobytes() == together.jacobian.tobytes()
    per_jacobian = 2 * (3 * len(PARAMETERS) - 4)
    assert n_alone == 3 * alone.n_evaluations + 2 * per_jacobian, "nothing is simulated twice at one place"


def test_two_simulations_run_side_by_side(monkeypatch) -> None:
    """While one thread simulates, another one goes on: the compiled loop does not hold Python's lock."""
    monkeypatch.setattr(engine, "_ROUNDS_PER_VISIT", 1 << 40)  # it comes back to Python once, at its end
    workload = Workload(
        n_groups=10, n_prompts_per_group=10, system_prompt_len=100, question_len=466, output_len=247,
        stages=(LoadStage(10.0, 40_000.0),),
    )  # fmt: skip
    requests, clock = workload.requests(seed=1), CompiledStepTime(constant_us=5000.0, requests_us=20.0, kv_us=0.03)
    simulate(workload.requests(seed=2), ServerConfig(kv_blocks=7463), clock)  # compiled
    done: list[float] = []
    thread = threading.Thread(
        target=lambda: done.append(simulate(requests, ServerConfig(kv_blocks=7463), clock).engine_s)
    )
    ticks = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    assert np.diff(ticks).max() < done[0] / 2


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0.0)
        return i * i

    for workers in (1, 2, 5):
        assert each(slow_at_first, range(6), workers=workers) == [0, 1, 4, 9, 16, 25]
    with pytest.raises(ZeroDivisionError):
        each(lambda i: 1 // i, [1, 0, 2], workers=2)
