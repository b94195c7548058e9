"""Writes environment.yml from requirements.lock, so that conda and Binder get exactly what pip gets.

The pip section repeats every pin of the lock, markers included; only the hashes stay behind.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?:\s*;\s*(.*?))?\s*\\?$")

HEAD = """\
# Written by `make lock` from requirements.lock; a test holds the two equal. Then, once: pip install --no-deps -e .
name: stepcal
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def pins(lock: str) -> list[str]:
    """Requirements of a lock file, as ``name==version`` or ``name==version ; marker``, in its order.

    Raises
    ------
    ValueError
        If a line is neither a pin, nor a hash, nor a comment.
    """
    found = []
    for number, line in enumerate(lock.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith(("#", "--hash=")):
            continue
        match = _PIN.match(line)
        if match is None:
            raise ValueError(f"requirements.lock, line {number}: `{line}` is not a pin (name==version).")
        name, version, marker = match.groups()
        found.append(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
    return found


def environment(lock: str) -> str:
    """Text of environment.yml for a lock file."""
    return HEAD + "".join(f'      - "{pin}"\n' if ";" in pin else f"      - {pin}\n" for pin in pins(lock))


if __name__ == "__main__":
    ENVIRONMENT.write_text(environment(LOCK.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {ENVIRONMENT.relative_to(ROOT)}")
