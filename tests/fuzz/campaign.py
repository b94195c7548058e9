"""Damages many files and reads them: ``python -m fuzz.campaign --inputs 100000`` from ``tests`` (or ``make fuzz``).

Counts what is neither read nor refused, and gives the slowest input and the most memory. A seed gives the same files again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz.damage import damaged
from fuzz.readers import Reader, readers
from stepcal.errors import StepcalError

TOO_SLOW_S = 2.0
GIVE_UP_S = 20
REPORT_EVERY = 5_000
LONGEST_MESSAGE = 5_000
KIB_PER_MIB = 1024


def one_input(reader: Reader, rng: random.Random, folder: Path) -> tuple[str, float, bytes]:
    """Damage one file and read it: ``read``, ``refused`` or the unhandled error, and how long it took on the processor."""
    path = folder / reader.file
    path.parent.mkdir(exist_ok=True, parents=True)
    content = damaged(rng.choice(reader.seeds), path.suffix, rng)
    path.write_bytes(content)
    started = time.process_time()
    outcome = outcome_of(reader, path)
    return outcome, time.process_time() - started, content


def outcome_of(reader: Reader, path: Path) -> str:
    """Read a file: ``read``, ``refused``, or the error that nobody foresaw."""
    try:
        reader.read(path)
    except StepcalError as error:
        return "refused" if len(str(error)) < LONGEST_MESSAGE else f"a message of {len(str(error)):,} characters"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "read"


def campaign(n_inputs: int, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Read `n_inputs` damaged files, in turn for each reader, and sum up."""
    rng, all_readers = random.Random(seed), readers()
    outcomes: Counter[str] = Counter()
    unhandled: list[dict[str, Any]] = []
    slowest = {"seconds": 0.0, "reader": ""}
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for i in range(n_inputs):
            reader = all_readers[i % len(all_readers)]
            signal.alarm(GIVE_UP_S)
            outcome, seconds, content = one_input(reader, rng, Path(name) / str(i % len(all_readers)))
            signal.alarm(0)
            if seconds > slowest["seconds"]:
                slowest = {"seconds": seconds, "reader": reader.name}
            known = outcome in ("read", "refused")
            outcomes[outcome if known else "unhandled"] += 1
            if not known or seconds > TOO_SLOW_S:
                unhandled.append({"reader": reader.name, "input": i, "outcome": outcome, "seconds": seconds})
                if keep is not None:
                    keep.mkdir(exist_ok=True, parents=True)
                    (keep / f"{i}-{Path(reader.file).name}").write_bytes(content)
            if (i + 1) % REPORT_EVERY == 0:
                print(f"{i + 1:,} inputs, {outcomes['unhandled']} unhandled, {slowest}", file=sys.stderr, flush=True)
    return {
        "inputs": n_inputs,
        "seed": seed,
        "readers": len(all_readers),
        "read": outcomes["read"],
        "refused": outcomes["refused"],
        "unhandled": outcomes["unhandled"],
        "slowest_s": slowest["seconds"],
        "slowest_reader": slowest["reader"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_MIB,
        "wall_s": time.perf_counter() - started,
        "faults": unhandled[:50],
    }


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"longer than {GIVE_UP_S} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder for inputs that were not handled.")
    given = parser.parse_args()
    result = campaign(given.inputs, given.seed, given.keep)
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["faults"] else 0)
