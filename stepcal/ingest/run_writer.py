"""Rows of one run on their way to parquet: spilled to disk as they come, ordered by arrival, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from stepcal.errors import InputError
from stepcal.ingest.request_log import SCHEMA, Rejected, Request
from stepcal.units import US_PER_S

REQUESTS = "requests.parquet"
REJECTED = "rejected.jsonl"
_SPILL_ROWS = 16_384
_WRITE_ROWS = 65_536
_SPILL = pa.schema(
    [
        *(f for f in SCHEMA if f.name not in ("experiment_id", "index", "arrival_time_us")),
        pa.field("sent_s", pa.float64()),
    ]
)
_FIELDS = {name: name for name in _SPILL.names if name not in ("has_error", "error")}


@dataclass(frozen=True)
class WrittenRun:
    """What was written of one run, for the manifest."""

    run: str
    requests: int
    failed: int
    rejected: int
    stages: int
    has_arrivals: bool
    has_ttft: bool
    duration_s: float | None
    parquet_sha256: str
    rejected_sha256: str | None


class RunWriter:
    """Takes rows in any order in constant memory, and writes ``requests.parquet`` and ``rejected.jsonl`` of one run."""

    def __init__(self, name: str, folder: Path, scratch: Path) -> None:
        self.name, self._folder, self._scratch = name, folder, scratch
        self._rows: list[Request] = []
        self._n_rejected = 0
        self._first_rejected: Rejected | None = None
        self._spill_path = scratch / f"{name}.arrow"
        self._spill = pa.ipc.new_file(str(self._spill_path), _SPILL)
        self._rejected: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", dir=scratch)  # noqa: SIM115

    def add(self, request: Request) -> None:
        """Take a good row."""
        self._rows.append(request)
        if len(self._rows) >= _SPILL_ROWS:
            self._flush()

    def reject(self, file: str, row: Rejected) -> None:
        """Take a row that cannot be used."""
        self._n_rejected += 1
        self._first_rejected = self._first_rejected or row
        line = {"file": file, "line": row.source_row, "reason": row.reason, "text": row.text}
        self._rejected.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Let go of the temporary files."""
        with contextlib.suppress(pa.ArrowException, ValueError):
            self._spill.close()
        self._rejected.close()

    def finish(self, file: str) -> WrittenRun:
        """Write what was taken.

        Raises
        ------
        InputError
            If no row could be used.
        """
        self._flush()
        self._spill.close()
        with pa.OSFile(str(self._spill_path)) as source:
            spill = pa.ipc.open_file(source)
            sent = np.concatenate(
                [_batch(spill, i)["sent_s"].to_numpy() for i in range(spill.num_record_batches)] or [[]]
            )
            order = np.argsort(sent, kind="stable")  # NaN last
            n_known = int(np.count_nonzero(~np.isnan(sent)))
            if 0 < n_known < len(order):
                self._reject_without_arrival(file, _rows(spill, order[n_known:]))
                order = order[:n_known]
            if not len(order):
                self._refuse(file)
            summary = self._write(spill, order, sent)
        self._spill_path.unlink()
        return summary

    def _reject_without_arrival(self, file: str, rows: pa.Table) -> None:
        for line in rows["source_row"].to_pylist():
            self.reject(file, Rejected(line, "no time of sending, though other requests of the run have one"))

    def _refuse(self, file: str) -> None:
        first = self._first_rejected
        reason = "it holds no requests" if first is None else f"line {first.source_row}: {first.reason}"
        raise InputError(
            f"{file}: none of its {self._n_rejected:,} rows can be used. First, {reason}. Is it the format that was taken? "
            "`--format` names another."
        )

    def _write(self, spill: Any, order: np.ndarray, sent: np.ndarray) -> WrittenRun:
        start = float(sent[order[0]])
        has_arrivals = not math.isnan(start)
        arrival_us = np.rint((sent - start) * US_PER_S) if has_arrivals else None
        self._folder.mkdir(exist_ok=True)
        path = self._folder / REQUESTS
        temporary = self._scratch / f"{self.name}.{REQUESTS}"
        failed, has_ttft, stages, end_s = 0, False, 0, 0.0
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for first in range(0, len(order), _WRITE_ROWS):
                rows = order[first : first + _WRITE_ROWS]
                part = _rows(spill, rows)
                times = None if arrival_us is None else arrival_us[rows].astype(np.int64)
                writer.write_table(self._part(part, first, times))
                errors = part["has_error"].to_numpy()
                failed += int(errors.sum())
                has_ttft = has_ttft or bool((~np.isnan(part["ttft_s"].to_numpy())[~errors]).any())
                stages = max(stages, int(part["stage"].to_numpy().max()) + 1)
                if times is not None:
                    ends = times / US_PER_S + np.nan_to_num(part["e2e_s"].to_numpy())
                    end_s = max(end_s, float(ends.max()))
        parquet_sha256 = sha256_of(temporary)
        rejected_sha256 = self._write_rejected()
        os.replace(temporary, path)
        return WrittenRun(
            self.name,
            len(order),
            failed,
            self._n_rejected,
            stages,
            has_arrivals,
            has_ttft,
            round(end_s, 6) if has_arrivals else None,
            parquet_sha256,
            rejected_sha256,
        )

    def _part(self, part: pa.Table, first: int, times: np.ndarray | None) -> pa.Table:
        n = part.num_rows
        arrivals = pa.nulls(n, pa.int64()) if times is None else pa.array(times)
        own = {
            "experiment_id": pa.array([self.name] * n, pa.string()),
            "index": pa.array(np.arange(first, first + n)),
            "arrival_time_us": arrivals,
        }
        columns = [own[f.name] if f.name in own else part[f.name] for f in SCHEMA]
        return pa.table(columns, schema=SCHEMA)

    def _write_rejected(self) -> str | None:
        path = self._folder / REJECTED
        if not self._n_rejected:
            path.unlink(missing_ok=True)
            return None
        self._rejected.seek(0)
        temporary = self._scratch / f"{self.name}.{REJECTED}"
        with temporary.open("w", encoding="utf-8") as stream:
            for line in self._rejected:
                stream.write(line)
        digest = sha256_of(temporary)
        os.replace(temporary, path)
        return digest

    def _flush(self) -> None:
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        columns: dict[str, Any] = {name: [getattr(r, name) for r in rows] for name in _FIELDS}
        columns["has_error"] = [r.error is not None for r in rows]
        columns["error"] = [None if r.error is None else r.error.strip()[:200] for r in rows]
        for name in ("e2e_s", "ttft_s"):
            columns[name] = np.array(columns[name], dtype=float)
        arrays = [pa.array(columns[f.name], f.type) for f in _SPILL]
        self._spill.write_batch(pa.record_batch(arrays, schema=_SPILL))


def _batch(spill: Any, i: int) -> pa.RecordBatch:
    return spill.get_batch(i)


def _rows(spill: Any, rows: np.ndarray) -> pa.Table:
    """Rows of a spill file in the order asked for, reading only the batches that hold them."""
    of_batch = rows // _SPILL_ROWS
    needed = np.unique(of_batch)
    table = pa.Table.from_batches([_batch(spill, int(i)) for i in needed])
    place = np.searchsorted(needed, of_batch) * _SPILL_ROWS + rows % _SPILL_ROWS
    return table.take(pa.array(place))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
