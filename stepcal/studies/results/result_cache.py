"""Results of studies, kept between processes: the same code, data and options give the same tables, so once is enough.

An entry is a file of JSON in the form of a recording (`stepcal.studies.results.records`). Its name is a hash of all that the
result depends on, so an entry is never stale, only unused. It is written whole or not at all: processes that compute the
same thing at once each write the same file. One that cannot be read is as good as none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stepcal.errors import InputError
from stepcal.files import write_atomically
from stepcal.locations import RESULTS, book_folder, cache_folder, data_folder
from stepcal.studies.results.provenance import Provenance
from stepcal.studies.results.records import Recording, from_json, to_json
from stepcal.studies.study import Study

LIBRARIES = ("numba", "numpy", "pandas", "scipy", "xgboost-cpu")
"""Libraries whose version may change a result."""
SHOWS_ONLY = ("cli", "report")
"""Rooms that no study imports (a contract of the import linter): a change there changes no result."""


def cached_study(name: str, key: str, compute: Callable[[], Study]) -> Study:
    """Return a study from the cache, or compute it and keep it.

    Parameters
    ----------
    name : str
        Of the study, in front of the file's name for who looks into the folder.
    key : str
        Of `result_key`.
    compute : callable

    Returns
    -------
    Study
        The same whether it was computed or read: as a recording holds it.
    """
    path = cache_folder() / RESULTS / f"{name}-{key[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _study(name, from_json(path.read_text(encoding="utf-8")))
    study = compute()
    text = to_json(Recording(study.tables, study.texts, asdict(study.provenance)), allow_nan=True)
    with suppress(OSError, InputError):  # without a cache that can be written to, everything is computed each time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return _study(name, from_json(text))


def result_key(
    name: str,
    source: str,
    trace_files: Iterable[Path],
    only_experiments: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
) -> str:
    """Return a hash of what a result depends on: code, shipped tables, libraries, traces, options.

    Parameters
    ----------
    name, source : str
        Study, and whether its rows are measured or simulated.
    trace_files : iterable of Path
        Files that hold the measured rows.
    only_experiments : sequence of str
    options : mapping, optional

    Returns
    -------
    str
        SHA-256 in hexadecimal.
    """
    traces = [hashlib.sha256(path.read_bytes()).hexdigest() for path in trace_files]
    named = sorted((key, repr(value)) for key, value in (options or {}).items())
    parts = [_code_sha256(), name, source, traces, sorted(only_experiments), named]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def _code_sha256() -> str:
    """Hash of the code, of the tables and pre-registrations that ship, and of the libraries' versions."""
    package = Path(__file__).parents[1]
    code = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in SHOWS_ONLY]
    shipped = [p for folder in (data_folder(), book_folder() / "preregistrations") for p in folder.rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(p for p in (*code, *shipped) if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library} {importlib.metadata.version(library)} ".encode())
    return digest.hexdigest()


def _study(name: str, recording: Recording) -> Study:
    return Study(name, recording.tables, Provenance(**recording.provenance), recording.texts)
