"""``stepcal ingest``: files of load generators to request tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepcal.cli.output import Json, emit, progress_options
from stepcal.errors import InputError


def ingest(
    source: Annotated[list[Path], typer.Argument(help="Files of load generators, or folders that hold some.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    format_name: Annotated[
        str | None, typer.Option("--format", help="Format of the files. Default: told by each file's head.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option("--mapping", help="For your own CSV or parquet tables: YAML that names the columns.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first line that cannot be used.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Files that are read at once.")] = 1,
    json_out: Json = None,
) -> None:
    """Turn files of vLLM bench, GuideLLM, AIPerf, inference-perf, OTLP and others into tables of one definition.

    Lines that cannot be used are set aside with their reason in `rejected.jsonl` and counted. A call that was interrupted
    goes on where it stopped. Example: stepcal ingest results/*.json --out mine
    """
    from tqdm import tqdm

    from stepcal.ingest import ingest as ingest_files
    from stepcal.ingest import read_mapping

    columns = None if mapping is None else read_mapping(mapping)
    total = sum(_size(path) for path in source)
    with tqdm(total=total, unit="B", unit_scale=True, **progress_options()) as bar:

        def show(name: str, n_bytes: int) -> None:
            bar.set_postfix_str(name)
            bar.update(n_bytes)

        manifest = ingest_files(
            source, out, format_name=format_name, mapping=columns, strict=strict, jobs=jobs, on_progress=show
        )
    emit(manifest, json_out, "\n".join(_lines(manifest, out)))


def _size(path: Path) -> int:
    try:
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check the path.") from None


def _lines(manifest: dict[str, Any], out: Path) -> list[str]:
    lines = [f"{'run':<36}{'tool':<16}{'requests':>9} {'failed':>7} {'rejected':>9} {'seconds':>9}"]
    for run in manifest["runs"]:
        seconds = "-" if run["duration_s"] is None else f"{run['duration_s']:,.1f}"
        lines.append(
            f"{run['run']:<36}{run['tool']:<16}{run['requests']:>9,} {run['failed']:>7,} {run['rejected']:>9,} {seconds:>9}"
        )
        if run["tested_on"].startswith("unverified"):
            lines.append(f"  {run['tool']}: {run['tested_on']}")
        if run["rejected"]:
            lines.append(f"  rejected lines, with reasons: {out / run['run'] / 'rejected.jsonl'}")
    return lines
