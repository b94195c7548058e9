"""What an instrumented vLLM calls the attributes of a step event, and what we call them."""

from __future__ import annotations

BATCH_EVENT = "step.BATCH_SUMMARY"
"""Name of the trace event that describes one scheduled step."""

STEP_ATTRIBUTES = {
    "step.id": "step_id",
    "step.ts_start_ns": "ts_start_ns",
    "step.ts_end_ns": "ts_end_ns",
    "step.duration_us": "duration_us",
    "queue.running_depth": "running_depth",
    "queue.waiting_depth": "waiting_depth",
    "batch.num_prefill_reqs": "num_prefill_reqs",
    "batch.num_decode_reqs": "num_decode_reqs",
    "batch.prefill_tokens": "prefill_tokens",
    "batch.decode_tokens": "decode_tokens",
    "batch.num_finished": "num_finished",
    "batch.num_preempted": "num_preempted",
    "kv.blocks_total_gpu": "kv_blocks_total",
    "kv.blocks_free_gpu": "kv_blocks_free",
    "batch.decode_kv_tokens": "decode_kv_tokens",
    "batch.prefill_kv_tokens": "prefill_kv_tokens",
    "batch.decode_kv_lens": "decode_kv_lens",
    "batch.prefill_chunk_tokens": "prefill_chunk_tokens",
    "batch.prefill_kv_lens": "prefill_kv_lens",
}
"""Attribute of the event: column of a step row. The last five are ours; no public trace carries them."""

UNUSED_STEP_ATTRIBUTES = frozenset({"batch.scheduled_tokens", "kv.usage_gpu_ratio"})
"""Attributes that other columns determine: prefill plus decode tokens; one minus free over total blocks."""

IDENTITY_COLUMNS = ("experiment_id", "model", "workload", "tensor_parallel")
"""Columns that name the run; a step event carries none of them."""
