"""``stepcal ingest``: files of load generators to one folder of request tables with a manifest, resumable and locked.

Each source file becomes ``<run>/requests.parquet`` (and ``rejected.jsonl`` where lines could not be used), then a part under
``.parts/`` that says what was read and written. A second call reads again only what has no part that still holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from stepcal.errors import InputError
from stepcal.files import write_atomically
from stepcal.ingest.formats import Format, Options, UnreadableError
from stepcal.ingest.request_log import BadRowError, Rejected, checked
from stepcal.ingest.run_writer import REJECTED, REQUESTS, RunWriter, sha256_of
from stepcal.ingest.tools import FORMATS, format_named, format_of

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_PARTS = ".parts"
_LOCK = ".lock"
_SCRATCH = ".tmp-"
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_GENERIC = ("benchmarks", "profile_export", "per_request_lifecycle_metrics", "requests", "results", "result", "trace")
"""Names that tools give to every file: the folder's name is the run's."""

Manifest = dict[str, Any]
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Source:
    """A file to read, the run it is named, and its format."""

    path: Path
    run: str
    format: str


def ingest(
    sources: Sequence[Path],
    out: Path,
    *,
    format_name: str | None = None,
    mapping: Mapping[str, Any] | None = None,
    strict: bool = False,
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> Manifest:
    """Turn files of load generators into request tables of one definition.

    Parameters
    ----------
    sources : sequence of Path
        Files, or folders in which files of known tools are looked for.
    out : Path
        Folder to write to; what an earlier call wrote there stays.
    format_name : str, optional
        Format of all files; by default each file's head tells it.
    mapping : mapping, optional
        For tables of one's own (`stepcal.ingest.mapped.read_mapping`).
    strict : bool
        Stop at the first row that cannot be used, and write nothing of its file.
    jobs : int
        Files that are read at once, each by a process.
    on_progress : callable, optional
        Called with the name and the bytes of each file that is done.

    Returns
    -------
    dict
        The manifest, as written to ``manifest.json``.

    Raises
    ------
    InputError
        If a source cannot be read, two would have one name, or another process writes to `out`.
    """
    options = Options(mapping=mapping or {})
    with _locked(out):
        found = _sources(sources, format_name, has_mapping=bool(mapping))
        work = Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(_ingest_file)(source, out, options, strict) for source in found
        )
        parts = []
        for part in work:
            parts.append(part)
            if on_progress is not None:
                on_progress(part["file"], part["source_bytes"])
        return _write_manifest(out, parts)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process alone."""
    try:
        out.mkdir(exist_ok=True)
        (out / _PARTS).mkdir(exist_ok=True)
        handle = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"Cannot write to {out}: {error.strerror}. Choose a folder whose parent exists.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise InputError(
                f"{out} is being written to by another `stepcal ingest` (process {owner}). Wait, or give another --out."
            ) from None
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _sources(paths: Sequence[Path], format_name: str | None, *, has_mapping: bool) -> list[Source]:
    files: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            files += _in_folder(path, has_mapping=has_mapping)
        else:
            files.append((path, format_named(format_name).name if format_name else format_of(path).name))
    if not files:
        raise InputError(f"No file of a known tool in {', '.join(map(str, paths))}. Known: {', '.join(FORMATS)}.")
    named: dict[str, Path] = {}
    result = []
    for path, form in files:
        run = _run_name(path)
        if run in named:
            raise InputError(
                f"{named[run]} and {path} would both be the run `{run}`. Rename one, or ingest it into another --out."
            )
        named[run] = path
        result.append(Source(path, run, form))
    return result


def _in_folder(folder: Path, *, has_mapping: bool) -> list[tuple[Path, str]]:
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _SUFFIXES):
        try:
            form = format_of(path).name
        except InputError:
            continue
        if form != "table" or has_mapping:
            found.append((path, form))
    return found


def _run_name(path: Path) -> str:
    stem = path.stem
    name = path.resolve().parent.name if stem in _GENERIC else stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "run"


def _ingest_file(source: Source, out: Path, options: Options, strict: bool) -> dict[str, Any]:
    """Read one file, unless its part says that this was done already; return its part."""
    form = FORMATS[source.format]
    if not source.path.is_file():
        raise UnreadableError(f"{source.path} is no file. Check the path.")
    key = {
        "source_sha256": sha256_of(source.path),
        "format": form.name,
        "format_version": form.version,
        "mapping": dict(options.mapping),
        "stepcal": version("stepcal"),
    }
    place = out / _PARTS / f"{source.run}.json"
    done = _part_that_holds(place, key, out)
    if done is not None and not (strict and any(r["rejected"] for r in done["runs"])):
        return done
    facts = form.describe(source.path) if form.describe else {}
    runs = _read_into(source, form, options, out, strict)
    part = {
        **key,
        "file": source.path.name,
        "source_bytes": source.path.stat().st_size,
        "facts": facts,
        "runs": runs,
    }
    write_atomically(place, json.dumps(part, indent=1, sort_keys=True) + "\n")
    return part


def _part_that_holds(place: Path, key: dict[str, Any], out: Path) -> dict[str, Any] | None:
    if not place.is_file():
        return None
    part: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if {name: part.get(name) for name in key} != key:
        return None
    for run in part["runs"]:
        for name, digest in ((REQUESTS, run["parquet_sha256"]), (REJECTED, run["rejected_sha256"])):
            path = out / run["run"] / name
            if digest is not None and (not path.is_file() or sha256_of(path) != digest):
                return None
    return part


def _read_into(source: Source, form: Format, options: Options, out: Path, strict: bool) -> list[dict[str, Any]]:
    scratch = Path(tempfile.mkdtemp(dir=out / _PARTS, prefix=_SCRATCH))
    writers: dict[str, RunWriter] = {}
    file = source.path.name
    try:
        last = ""
        for row in form.read(source.path, options):
            rejection = row if isinstance(row, Rejected) else None
            if not isinstance(row, Rejected):
                last = row.run
                try:
                    checked(row)
                except BadRowError as error:
                    rejection = Rejected(row.source_row, str(error))
            name = f"{source.run}-{last}" if last else source.run
            if name not in writers:
                writers[name] = RunWriter(name, out / name, scratch)
            if rejection is None and not isinstance(row, Rejected):
                writers[name].add(row)
            elif rejection is not None:
                if strict:
                    raise InputError(
                        f"{source.path}, line {rejection.source_row}: {rejection.reason}. Mend the line, or leave out "
                        "`--strict` to set such lines aside."
                    )
                writers[name].reject(file, rejection)
        if not writers:
            raise UnreadableError(f"{source.path} holds no requests.")
        return [asdict(w.finish(file)) for w in writers.values()]
    finally:
        for writer in writers.values():
            writer.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed process left; the lock is ours, so nobody is writing."""
    for leftover in (out / _PARTS).glob(f"{_SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (*(out / _PARTS).glob(".*.json.*"), *out.glob(f".{MANIFEST}.*")):
        leftover.unlink()


def _write_manifest(out: Path, parts: list[dict[str, Any]]) -> Manifest:
    """Write the manifest of these parts, and of earlier ones that stand beside them."""
    _remove_leftovers(out)
    own = {part["runs"][0]["run"]: part for part in parts}
    for place in sorted((out / _PARTS).glob("*.json")):
        other = json.loads(place.read_text(encoding="utf-8"))
        own.setdefault(other["runs"][0]["run"], other)
    runs = []
    for part in (own[name] for name in sorted(own)):
        form = FORMATS[part["format"]]
        about = {
            "file": part["file"],
            "source_sha256": part["source_sha256"],
            "source_bytes": part["source_bytes"],
            "tool": form.name,
            "reader_version": part["format_version"],
            "tested_on": form.verified,
            "definitions": dict(form.definitions),
            "facts": part["facts"],
        }
        runs += [{**run, **about} for run in part["runs"]]
    manifest = {
        "kind": "stepcal ingest",
        "version": MANIFEST_VERSION,
        "stepcal": version("stepcal"),
        "requests": sum(r["requests"] for r in runs),
        "failed": sum(r["failed"] for r in runs),
        "rejected": sum(r["rejected"] for r in runs),
        "runs": runs,
    }
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest
