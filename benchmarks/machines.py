"""Does another machine come to the same conclusions? `stepcal record --check` with other arithmetic, one setting at a time.

::

    python benchmarks/machines.py --data shared/data --out machines.csv [--setting NAME]... [STUDY]...

What a processor changes can be had on one machine: the BLAS kernels, numpy's vector code, the instructions that numba
compiles for, the C library's exponentials and logarithms, threads, and cores. Each setting is a process of its own. Printed
is the largest difference from the recordings in units of its declared tolerance (``data/recorded/tolerances.csv``): above 1
the check fails.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VECTORS = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL"}
"""Names of numpy 2.4; with them gone it has the baseline of 2008."""
LIBM = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"}
SETTINGS: dict[str, tuple[dict[str, str], int | None]] = {
    "as it is": ({}, None),
    "BLAS of Haswell": ({"OPENBLAS_CORETYPE": "Haswell"}, None),
    "BLAS of Zen": ({"OPENBLAS_CORETYPE": "Zen"}, None),
    "BLAS of SkylakeX": ({"OPENBLAS_CORETYPE": "SkylakeX"}, None),
    "BLAS of Sandybridge": ({"OPENBLAS_CORETYPE": "Sandybridge"}, None),
    "one BLAS thread": ({"OPENBLAS_NUM_THREADS": "1"}, None),
    "two BLAS threads": ({"OPENBLAS_NUM_THREADS": "2"}, None),
    "numpy without AVX": (VECTORS, None),
    "numba for any x86-64": ({"NUMBA_CPU_NAME": "generic"}, None),
    "libm without FMA": (LIBM, None),
    "one core": ({}, 1),
    "all at once": (
        {"OPENBLAS_CORETYPE": "Sandybridge", "OPENBLAS_NUM_THREADS": "1", "NUMBA_CPU_NAME": "generic"} | VECTORS | LIBM,
        1,
    ),
}
"""Environment variables, and the number of cores where it is limited."""


def check(setting: str, studies: list[str], data: Path | None) -> dict[str, str]:
    """Run the check under one setting; machine code is compiled anew, for it depends on the setting."""
    variables, n_cores = SETTINGS[setting]
    command = [sys.executable, "-m", "stepcal", "record", "--check", *studies]
    command += [] if data is None else ["--data", str(data)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            command,
            env={**os.environ, **variables, "NUMBA_CACHE_DIR": cache, "STEPCAL_CACHE": cache},
            preexec_fn=None if n_cores is None else lambda: os.sched_setaffinity(0, range(n_cores)),
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"^largest difference: (\S+) of its tolerance \((.*)\)$", done.stderr, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{setting}: the check printed no largest difference:\n{done.stderr[-2000:]}")
    return {
        "setting": setting,
        "studies": " ".join(studies) or "all",
        "largest_difference": found[1],
        "of": found[2],
        "holds": "yes" if done.returncode == 0 else "no",
        "seconds": f"{time.perf_counter() - started:.0f}",
    }


def main() -> None:
    """Check what the command line asks for, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help="studies to check; all by default")
    parser.add_argument("--data", type=Path, help="folder of the traces; by default STEPCAL_DATA")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="all by default")
    parser.add_argument("--out", type=Path, help="CSV file, to which rows are added")
    arguments = parser.parse_args()
    for setting in arguments.setting or SETTINGS:
        row = check(setting, arguments.studies, arguments.data)
        print("  ".join(row.values()), flush=True)
        if arguments.out is not None:
            is_new = not arguments.out.exists()
            with arguments.out.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
