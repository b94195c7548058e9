"""Time ``schedule()`` of the real vLLM 0.15.1 on a CPU, against the number of running requests.

The label of the seed study, ``step.duration_us``, is taken around ``Scheduler.schedule()`` by an instrumented vLLM. This
script takes the same interval around the same function with no GPU and no weights in the machine: vLLM's own engine loop
(``EngineCore``, asynchronous scheduling and prefix caching on) runs with the stub executor of ``record_vllm.py``, and only
steps in which every request decodes are counted. ``update_from_output()``, which the label leaves out, is timed beside it.
Two cases more: requests that wait while all slots are taken, and a second Python thread that computes in the same process
and holds the interpreter's lock whenever it gets it.

    vllm-env/bin/python tools/time_vllm_schedule.py --out data/recorded/schedule_timing.json

Times are of the machine that the script runs on; the file names it.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record_vllm
from record_vllm import Player, vllm_version

RUNNING = (1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 50, 64, 80, 96, 112, 128)
WITH_WAITING = ((128, 300), (128, 1000))  # running, waiting
WITH_THREAD = (10, 35, 64, 96, 128)  # running
PROMPT_TOKENS = 575  # the median prompt of the `general` runs
BLOCK_SIZE = 16
STEPS = 600
WARM_UP_STEPS = 100
MEASURED_RELEASE = "0.15.1"
"""Of the study's servers."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
NS_PER_US = 1e3

CONFIG = {
    "block_size": BLOCK_SIZE,
    "enable_prefix_caching": True,
    "num_gpu_blocks": 31_357,  # of the llama-2-70b runs, and the null block
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
    "max_model_len": 4096,
    "async_scheduling": True,
}


def timed(function: Callable, into: list[tuple[int, int]]) -> Callable:
    """The function, which notes start and duration of each call in nanoseconds."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter_ns()
        result = function(*args, **kwargs)
        into.append((start, time.perf_counter_ns() - start))
        return result

    return wrapped


@contextmanager
def busy_thread(wanted: bool) -> Iterator[None]:
    """Run a thread of plain Python beside the body, or nothing."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()


def time_decode(
    n_running: int, n_steps: int, model_dir: str, *, n_waiting: int = 0, with_thread: bool = False
) -> dict[str, list[float]]:
    """Microseconds of each call while `n_running` requests decode, others wait, and no request comes or ends."""
    n_prefill_steps = n_running * PROMPT_TOKENS // CONFIG["max_num_batched_tokens"] + 10
    requests = [
        {
            "index": i,
            "prompt_segments": [(i + 1, PROMPT_TOKENS)],
            "output_tokens": n_prefill_steps + WARM_UP_STEPS + n_steps + 100,
            "output_content": None,
            "arrival_step": 0,
        }
        for i in range(n_running + n_waiting)
    ]
    player = Player({"config": CONFIG, "requests": requests}, model_dir)
    scheduler = player.scheduler
    # The recorder's own observation is no part of what is timed.
    for name in ("schedule", "_preempt_request"):
        delattr(scheduler, name)
    schedule: list[tuple[int, int]] = []
    update: list[tuple[int, int]] = []
    for request in requests:
        player.add(request)
    while len(scheduler.running) < n_running or any(
        r.num_computed_tokens <= r.num_prompt_tokens for r in scheduler.running
    ):
        player.engine.step_fn()
    for _ in range(WARM_UP_STEPS):
        player.engine.step_fn()
    scheduler.schedule = timed(scheduler.schedule, schedule)
    scheduler.update_from_output = timed(scheduler.update_from_output, update)
    gc.collect()
    with busy_thread(with_thread):
        for _ in range(n_steps):
            player.engine.step_fn()
    assert (len(scheduler.running), len(scheduler.waiting)) == (n_running, n_waiting)
    return {
        "schedule": [duration / NS_PER_US for _, duration in schedule],
        "update_from_output": [duration / NS_PER_US for _, duration in update],
    }


def quantile(ordered: list[float], p: float) -> float:
    return ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_recording(path: Path, name: str, rows: dict[str, list], **about: Any) -> None:
    """Write one table as data/recorded/ holds it, with the machine and what else was given."""
    provenance = {
        "kind": "measured by stepcal on a CPU, no GPU",
        "recorded": datetime.date.today().isoformat(),
        "vllm": vllm_version,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        **about,
        "data_sha256": "",
    }
    content = {"provenance": provenance, "texts": {}, "tables": {name: rows}}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps a batch size")
    given = parser.parse_args()
    if vllm_version != MEASURED_RELEASE:
        print(f"vLLM {vllm_version} is installed; the label is of {MEASURED_RELEASE}.", file=sys.stderr)
        return 2
    rows: dict[str, list] = {
        name: [] for name in ("function", "running", "waiting", "busy_threads", "n_calls", "mean_us")
    }
    rows |= {f"p{100 * p:.0f}_us": [] for p in QUANTILES}
    with tempfile.TemporaryDirectory() as model_dir:
        (Path(model_dir) / "config.json").write_text(json.dumps(record_vllm.TINY_LLAMA))
        cases = [(n, 0, False) for n in RUNNING]
        cases += [(*case, False) for case in WITH_WAITING] + [(n, 0, True) for n in WITH_THREAD]
        for n_running, n_waiting, with_thread in cases:
            times = time_decode(n_running, given.steps, model_dir, n_waiting=n_waiting, with_thread=with_thread)
            for name, values in times.items():
                ordered = sorted(values)
                rows["function"].append(name)
                rows["running"].append(n_running)
                rows["waiting"].append(n_waiting)
                rows["busy_threads"].append(int(with_thread))
                rows["n_calls"].append(len(ordered))
                rows["mean_us"].append(round(sum(ordered) / len(ordered), 2))
                for p in QUANTILES:
                    rows[f"p{100 * p:.0f}_us"].append(round(quantile(ordered, p), 2))
            median = [rows["p50_us"][-2], rows["p50_us"][-1]]
            what = f"{n_running:4d} running, {n_waiting} waiting, {int(with_thread)} threads"
            print(f"{what}: schedule {median[0]} µs, update {median[1]} µs", file=sys.stderr)
    write_recording(given.out, "timing", rows, config=CONFIG, prompt_tokens=PROMPT_TOKENS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
