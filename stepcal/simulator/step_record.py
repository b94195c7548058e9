"""The step record: buffers for the compiled loop, and the step table in the schema of a real trace."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from stepcal.simulator import layout as at
from stepcal.simulator.clock import N_GAP_BINS
from stepcal.simulator.config import ServerConfig
from stepcal.simulator.layout import Int8Array, Int32Array, Record
from stepcal.simulator.steptime import StepBatch
from stepcal.units import FloatArray, IntArray

_ROWS_PER_DRAIN = 1 << 14
_NS_PER_US = 1000.0


class StepRows:
    """Recorded steps: one row a step, and the requests of each step as slices of flat arrays.

    ``items_end[i]`` is where the requests of step ``i`` end in ``item_request``, ``item_tokens`` (tokens scheduled),
    ``item_kv`` (context including them) and ``item_is_prefill``; likewise for the preempted and the newly admitted
    requests.
    """

    def __init__(self, parts: list[dict[str, np.ndarray]]) -> None:
        self.ints: IntArray = _join(parts, "ints", np.int64, len(at.ROW_INTS))
        self.floats: FloatArray = _join(parts, "floats", np.float64, len(at.ROW_FLOATS))
        self.item_request: Int32Array = _join(parts, "item_request", np.int32)
        self.item_tokens: Int32Array = _join(parts, "item_tokens", np.int32)
        self.item_kv: Int32Array = _join(parts, "item_kv", np.int32)
        self.item_is_prefill: Int8Array = _join(parts, "item_is_prefill", np.int8)
        self.preempted: Int32Array = _join(parts, "preempted", np.int32)
        self.cached_request: Int32Array = _join(parts, "cached_request", np.int32)
        self.cached_tokens: Int32Array = _join(parts, "cached_tokens", np.int32)

    def __len__(self) -> int:
        return self.ints.shape[0]

    def column(self, name: str) -> IntArray:
        """An integer column of `layout.ROW_INTS`."""
        return self.ints[:, at.ROW_INTS.index(name)]

    def calls(self) -> Iterator[dict[str, list[Any]]]:
        """Each ``schedule()`` call as plain lists (for tests)."""
        all_scheduled = np.column_stack((self.item_request, self.item_tokens))
        all_cached = np.column_stack((self.cached_request, self.cached_tokens))
        items = preempted = cached = 0
        for row in self.ints.tolist():
            ends = row[at.ROW_ITEMS_END], row[at.ROW_PREEMPTED_END], row[at.ROW_CACHED_END]
            yield {
                "scheduled": all_scheduled[items : ends[0]].tolist(),
                "preempted": self.preempted[preempted : ends[1]].tolist(),
                "cached_tokens": all_cached[cached : ends[2]].tolist(),
            }
            items, preempted, cached = ends

    def table(self, experiment_id: str, kv_blocks: int) -> pa.Table:
        """The step table in the canonical schema, with the lengths behind each batch as list columns."""
        is_prefill = self.item_is_prefill.astype(bool)
        starts = np.concatenate(([0], self.ints[:-1, at.ROW_ITEMS_END])) if len(self) else np.zeros(0, np.int64)
        n_prefill = self.column("num_prefill_reqs")
        n_decode = np.diff(np.append(starts, self.ints[-1:, at.ROW_ITEMS_END])) - n_prefill
        start_ns = np.rint(self.floats[:, 1] * _NS_PER_US).astype(np.int64)
        end_ns = np.rint(self.floats[:, 2] * _NS_PER_US).astype(np.int64)
        columns: dict[str, pa.Array | np.ndarray] = {
            "experiment_id": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(self), np.int32)), [experiment_id]),
            "step_id": self.column("call"),
            "ts_start_ns": start_ns,
            "ts_end_ns": end_ns,
            "duration_us": self.floats[:, 2] - self.floats[:, 1],
        }
        for name in at.ROW_INTS[1:10]:
            if name == "kv_blocks_free":
                columns["kv_blocks_total"] = np.full(len(self), kv_blocks)
            columns[name] = self.column(name)
        columns["decode_kv_tokens"] = self.column("decode_kv_tokens")
        columns["prefill_kv_tokens"] = self.column("prefill_kv_tokens")
        columns["decode_kv_lens"] = _lists(self.item_kv[~is_prefill], n_decode)
        columns["prefill_chunk_tokens"] = _lists(self.item_tokens[is_prefill], n_prefill)
        columns["prefill_kv_lens"] = _lists(self.item_kv[is_prefill], n_prefill)
        return pa.table(columns)


def _join(parts: list[dict[str, np.ndarray]], name: str, dtype: type, width: int = 0) -> np.ndarray:
    empty: np.ndarray = np.zeros((0, width) if width else 0, dtype)
    return np.concatenate([empty, *(part[name] for part in parts)])


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


class StepRecorder:
    """Owns the record's buffers: hands them to the compiled loop, and empties them when they are full."""

    def __init__(
        self, server: ServerConfig, n_stages: int, fraction: float | None, seed: int, *, keep_empty: bool, asks: bool
    ) -> None:
        self._fraction = fraction
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._parts: list[dict[str, np.ndarray]] = []
        self._offsets = [0, 0, 0]
        is_on = asks or fraction is not None
        n_rows = _ROWS_PER_DRAIN if is_on else 1
        n_items = (n_rows + 1) * server.max_num_seqs if is_on else 1
        n_rare = n_rows + 4 * server.max_num_seqs if is_on else 1
        self.record = Record(
            is_on=int(is_on),
            keep_empty=int(keep_empty),
            sample=np.ones(n_rows, np.int8),
            ints=np.zeros((n_rows, len(at.ROW_INTS)), np.int64),
            floats=np.zeros((n_rows, len(at.ROW_FLOATS))),
            item_request=np.zeros(n_items, np.int32),
            item_tokens=np.zeros(n_items, np.int32),
            item_kv=np.zeros(n_items, np.int32),
            item_is_prefill=np.zeros(n_items, np.int8),
            preempted=np.zeros(n_rare, np.int32),
            cached_request=np.zeros(n_rare, np.int32),
            cached_tokens=np.zeros(n_rare, np.int32),
            gap_counts=np.zeros((n_stages, N_GAP_BINS), np.int64),
            gap_sums=np.zeros(n_stages),
        )
        self._draws_here = asks
        if not asks:
            self._draw()

    def _draw(self) -> None:
        if self._fraction is not None and self._fraction < 1.0:
            self.record.sample[:] = self._rng.random(self.record.sample.size) < self._fraction

    def last_batch(self, counts: IntArray) -> StepBatch:
        """The batch just scheduled; its row goes unless the step table keeps it."""
        record, row = self.record, counts[at.N_ROWS] - 1
        start = record.ints[row - 1, at.ROW_ITEMS_END] if row else 0
        items = slice(start, record.ints[row, at.ROW_ITEMS_END])
        is_prefill = record.item_is_prefill[items].astype(bool)
        kv = record.item_kv[items]
        batch = StepBatch(
            prefill_chunk_tokens=record.item_tokens[items][is_prefill],
            prefill_kv_lens=kv[is_prefill],
            decode_kv_lens=kv[~is_prefill],
            waiting=int(record.ints[row, at.ROW_INTS.index("waiting_depth")]),
        )
        if self._fraction is None or self._rng.random() >= self._fraction:
            ends = record.ints[row - 1, at.ROW_ITEMS_END :] if row else np.zeros(3, np.int64)
            counts[[at.N_ROWS, at.N_ROW_ITEMS, at.N_ROW_PREEMPTED, at.N_ROW_CACHED]] = row, *ends
        return batch

    def drain(self, counts: IntArray) -> None:
        """Move the recorded rows out of the buffers."""
        if not self.record.is_on:
            return
        ends = counts[[at.N_ROWS, at.N_ROW_ITEMS, at.N_ROW_PREEMPTED, at.N_ROW_CACHED]]
        n_rows, n_items, n_preempted, n_cached = (int(n) for n in ends)
        record = self.record
        ints = record.ints[:n_rows].copy()
        ints[:, at.ROW_ITEMS_END :] += self._offsets
        self._offsets = [self._offsets[0] + n_items, self._offsets[1] + n_preempted, self._offsets[2] + n_cached]
        self._parts.append(
            {
                "ints": ints,
                "floats": record.floats[:n_rows].copy(),
                "item_request": record.item_request[:n_items].copy(),
                "item_tokens": record.item_tokens[:n_items].copy(),
                "item_kv": record.item_kv[:n_items].copy(),
                "item_is_prefill": record.item_is_prefill[:n_items].copy(),
                "preempted": record.preempted[:n_preempted].copy(),
                "cached_request": record.cached_request[:n_cached].copy(),
                "cached_tokens": record.cached_tokens[:n_cached].copy(),
            }
        )
        counts[[at.N_ROWS, at.N_ROW_ITEMS, at.N_ROW_PREEMPTED, at.N_ROW_CACHED, at.N_DRAWN]] = 0
        if not self._draws_here:
            self._draw()

    def rows(self) -> StepRows | None:
        """All recorded steps, or None if none were asked for."""
        return None if self._fraction is None else StepRows(self._parts)
