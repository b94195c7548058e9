"""The same readers under atheris, which looks for inputs that reach new code (``python -m fuzz.coverage_guided``).

atheris is not a dependency: it has no wheel for every Python (``pip install atheris`` where it does).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stepcal"]):
    from fuzz.campaign import outcome_of
    from fuzz.readers import readers
READERS = readers()
FOLDER = Path(tempfile.mkdtemp())


def read_one(content: bytes) -> None:
    """Read one input: its first byte chooses the reader."""
    if not content:
        return
    reader = READERS[content[0] % len(READERS)]
    path = FOLDER / reader.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content[1:])
    outcome = outcome_of(reader, path)
    if outcome not in ("read", "refused"):
        raise RuntimeError(f"{reader.name}: {outcome}")


if __name__ == "__main__":
    atheris.Setup(sys.argv, read_one)
    atheris.Fuzz()
