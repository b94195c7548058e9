"""How long the door takes to open: whole processes, from the shell's call to their end.

::

    python benchmarks/start_up.py                    # needs no traces; verdict h2 then judges the recorded results
    STEPCAL_DATA=shared/data python benchmarks/start_up.py

Wall time and CPU time (user and system, all threads), the least of several runs, beside what was asked for. The first run of
each is not counted: it may compile the simulator or compute the studies, which then lie in the user's cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stepcal.locations import data_folder

EXPERIMENT = "20260218-150956-codellama-34b-tp2-codegen"
TARGETS_S = {"import stepcal": 0.3, "stepcal --help": 0.3, "stepcal simulate": 1.5, "stepcal verdict h2": 5.0}
"""Wall times that issue 8 asks for; simulate serves 9,000 requests of codellama-34b codegen, the verdict is a second one."""


def rows_of(table: str) -> list[dict[str, str]]:
    """Rows of the experiment in a shipped table."""
    with (data_folder() / table).open(newline="", encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if row["experiment_id"] == EXPERIMENT]


def workload() -> dict[str, object]:
    """The experiment's load as a file of inference-perf, made from the tables that ship."""
    (run,) = rows_of("experiments.csv")
    prefix = {
        "num_groups": int(run["run_groups"]),
        "num_prompts_per_group": int(run["run_prompts_per_group"]),
        "system_prompt_len": int(run["run_system_prompt_tokens"]),
        "question_len": int(run["run_question_tokens"]),
        "output_len": int(run["run_output_tokens"]),
    }
    stages = [
        {"rate": float(r["requested_rate_per_s"]), "duration": int(float(r["duration_s"]))}
        for r in rows_of("load_stages.csv")
    ]
    return {"data": {"type": "shared_prefix", "shared_prefix": prefix}, "load": {"type": "constant", "stages": stages}}


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, by its name in `TARGETS_S`."""
    (run,) = rows_of("experiments.csv")
    profile = folder / "profile.yaml"
    profile.write_text(json.dumps(workload()), encoding="utf-8")  # JSON is YAML too
    stepcal = [sys.executable, "-m", "stepcal"]
    options = ["--tp", run["tensor_parallel"], "--kv-blocks", run["kv_blocks_total"], "--workload", str(profile)]
    return {
        "import stepcal": [sys.executable, "-c", "import stepcal"],
        "stepcal --help": [*stepcal, "--help"],
        "stepcal simulate": [
            *stepcal,
            "simulate",
            "--architecture",
            run["model"],
            *options,
            "--coefficients",
            "default",
        ],
        "stepcal verdict h2": [*stepcal, "verdict", "h2"],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    print(f"{'':<20}{'wall s':>8}{'CPU s':>8}{'asked':>8}   load of the machine: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder)).items():
            timed(command)
            found = [timed(command) for _ in range(runs)]
            wall, cpu = (min(one[i] for one in found) for i in (0, 1))
            print(f"{name:<20}{wall:>8.2f}{cpu:>8.2f}{TARGETS_S[name]:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
