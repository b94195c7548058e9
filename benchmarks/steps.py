"""Speed of the step-level half: decomposing and fitting at the study's full size, on simulated rows.

::

    python benchmarks/steps.py

Best of several runs in one process; peak memory is the process's own.
"""

import resource
import time
from collections.abc import Callable

from stepcal.calibration.least_squares import fit
from stepcal.datasets import simulated_step_rows
from stepcal.datasets.splits import temporal_split
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.corrections import Global9, Model36, Phase16, StepFeatures
from stepcal.step_time.decomposition import decompose

REPEATS = 5


def best_of(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Print one line a benchmark."""
    h100 = load_accelerator("h100-sxm")
    steps = simulated_step_rows(seed=1)
    print(f"decompose {len(steps):,} steps: {best_of(lambda: decompose(steps, h100)):.4f} s")
    train = temporal_split(steps).train
    features, label = StepFeatures.of(train, h100), train["duration_us"].to_numpy(dtype=float)
    families = tuple(sorted(set(features.families.tolist())))
    for model, repeats in ((Global9(), REPEATS), (Model36(families), REPEATS), (Phase16.for_accelerator(h100), 1)):
        seconds = best_of(lambda model=model: fit(model, features, label), repeats)
        print(f"fit {model.name} ({len(model.parameters)} parameters) to {len(train):,} steps: {seconds:.2f} s")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
