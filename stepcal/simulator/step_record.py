"""The step record: buffers for the compiled loop, and the step table in the schema of a real trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from stepcal.simulator import layout as at
from stepcal.simulator.clock import N_GAP_BINS
from stepcal.simulator.config import ServerConfig
from stepcal.simulator.layout import Int8Array, Int32Array, Record, State
from stepcal.simulator.steptime import StepBatch
from stepcal.units import NS_PER_US, IntArray

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_DRAIN = 1 << 14
# Where the requests of a step end, the preempted and the admitted ones.
_ENDS = ["items_end", "preempted_end", "cached_end"]
# Columns of the step table that are those of `layout.STEP_ROW`.
_TABLE_COLUMNS = at.STEP_ROW.names[1:10] if at.STEP_ROW.names else ()


class StepRows:
    """Recorded steps: one row a step, and the requests of each step as slices of flat arrays.

    ``steps["items_end"][i]`` is where the requests of step ``i`` end in ``item_request``, ``item_tokens`` (tokens
    scheduled), ``item_kv`` (context including them) and ``item_is_prefill``; likewise for the preempted and the newly
    admitted requests.
    """

    def __init__(self, parts: list[dict[str, np.ndarray]]) -> None:
        self.steps: np.ndarray = _join(parts, "rows", at.STEP_ROW)
        self.item_request: Int32Array = _join(parts, "item_request", np.int32)
        self.item_tokens: Int32Array = _join(parts, "item_tokens", np.int32)
        self.item_kv: Int32Array = _join(parts, "item_kv", np.int32)
        self.item_is_prefill: Int8Array = _join(parts, "item_is_prefill", np.int8)
        self.preempted: Int32Array = _join(parts, "preempted", np.int32)
        self.cached_request: Int32Array = _join(parts, "cached_request", np.int32)
        self.cached_tokens: Int32Array = _join(parts, "cached_tokens", np.int32)

    def __len__(self) -> int:
        return self.steps.size

    def column(self, name: str) -> IntArray:
        """A column of `layout.STEP_ROW`, shape (n_steps,)."""
        return np.ascontiguousarray(self.steps[name])

    def calls(self) -> Iterator[dict[str, list[Any]]]:
        """Each ``schedule()`` call as plain lists (for tests)."""
        all_scheduled = np.column_stack((self.item_request, self.item_tokens))
        all_cached = np.column_stack((self.cached_request, self.cached_tokens))
        items = preempted = cached = 0
        for ends in self.steps[["items_end", "preempted_end", "cached_end"]].tolist():
            yield {
                "scheduled": all_scheduled[items : ends[0]].tolist(),
                "preempted": self.preempted[preempted : ends[1]].tolist(),
                "cached_tokens": all_cached[cached : ends[2]].tolist(),
            }
            items, preempted, cached = ends

    def table(self, experiment_id: str, kv_blocks: int) -> pa.Table:
        """The step table in the canonical schema, with the lengths behind each batch as list columns."""
        import pyarrow as pa

        is_prefill = self.item_is_prefill.astype(bool)
        n_prefill = self.column("num_prefill_reqs")
        n_decode = np.diff(self.column("items_end"), prepend=0) - n_prefill
        start_ns = np.rint(self.steps["start_us"] * NS_PER_US).astype(np.int64)
        end_ns = np.rint(self.steps["end_us"] * NS_PER_US).astype(np.int64)
        columns: dict[str, pa.Array | np.ndarray] = {
            "experiment_id": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(self), np.int32)), [experiment_id]),
            "step_id": self.column("call"),
            "ts_start_ns": start_ns,
            "ts_end_ns": end_ns,
            "duration_us": self.steps["end_us"] - self.steps["start_us"],
        }
        for name in _TABLE_COLUMNS:
            if name == "kv_blocks_free":
                columns["kv_blocks_total"] = np.full(len(self), kv_blocks)
            columns[name] = self.column(name)
        columns["decode_kv_tokens"] = self.column("decode_kv_tokens")
        columns["prefill_kv_tokens"] = self.column("prefill_kv_tokens")
        columns["decode_kv_lens"] = _lists(self.item_kv[~is_prefill], n_decode)
        columns["prefill_chunk_tokens"] = _lists(self.item_tokens[is_prefill], n_prefill)
        columns["prefill_kv_lens"] = _lists(self.item_kv[is_prefill], n_prefill)
        return pa.table(columns)


def _join(parts: list[dict[str, np.ndarray]], name: str, dtype: DTypeLike) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(part[name] for part in parts)])


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    import pyarrow as pa

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
        self._windows = tuple(group for group in server.kv_groups if group.kind != "full")
        is_on = asks or fraction is not None
        n_rows = _ROWS_PER_DRAIN if is_on else 1
        n_items = (n_rows + 1) * server.max_num_seqs if is_on else 1
        n_rare = n_rows + 4 * server.max_num_seqs if is_on else 1
        self.record = Record(
            is_on=int(is_on),
            keep_empty=int(keep_empty),
            sample=np.ones(n_rows, np.int8),
            rows=np.zeros(n_rows, at.STEP_ROW),
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

    def last_batch(self, state: State) -> StepBatch:
        """The batch just scheduled; its row goes unless the step table keeps it."""
        record, row = self.record, state.n_rows - 1
        before = record.rows[_ENDS][row - 1] if row else (0, 0, 0)
        items = slice(before[0], record.rows["items_end"][row])
        is_prefill = record.item_is_prefill[items].astype(bool)
        kv = record.item_kv[items]
        batch = StepBatch(
            prefill_chunk_tokens=record.item_tokens[items][is_prefill],
            prefill_kv_lens=kv[is_prefill],
            decode_kv_lens=kv[~is_prefill],
            waiting=int(record.rows["waiting_depth"][row]),
            windows=self._windows,
        )
        if self._fraction is None or self._rng.random() >= self._fraction:
            state.n_rows = row
            state.n_row_items, state.n_row_preempted, state.n_row_cached = before
        return batch

    def drain(self, state: State) -> None:
        """Move the recorded rows out of the buffers."""
        if not self.record.is_on:
            return
        n_items, n_preempted, n_cached = int(state.n_row_items), int(state.n_row_preempted), int(state.n_row_cached)
        record, n_rows = self.record, int(state.n_rows)
        rows = record.rows[:n_rows].copy()
        for name, offset in zip(_ENDS, self._offsets, strict=True):
            rows[name] += offset
        self._offsets = [self._offsets[0] + n_items, self._offsets[1] + n_preempted, self._offsets[2] + n_cached]
        self._parts.append(
            {
                "rows": rows,
                "item_request": record.item_request[:n_items].copy(),
                "item_tokens": record.item_tokens[:n_items].copy(),
                "item_kv": record.item_kv[:n_items].copy(),
                "item_is_prefill": record.item_is_prefill[:n_items].copy(),
                "preempted": record.preempted[:n_preempted].copy(),
                "cached_request": record.cached_request[:n_cached].copy(),
                "cached_tokens": record.cached_tokens[:n_cached].copy(),
            }
        )
        state.n_rows = state.n_row_items = state.n_row_preempted = state.n_row_cached = state.n_drawn = 0
        if not self._draws_here:
            self._draw()

    def rows(self) -> StepRows | None:
        """All recorded steps, or None if none were asked for."""
        return None if self._fraction is None else StepRows(self._parts)
