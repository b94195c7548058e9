"""The two tables that everything else reads: step rows (one a scheduled batch) and request rows (one a request).

Whatever a trace was recorded with, its reader ends in `validate_steps` or `validate_requests`; past that point a
duration is positive and finite, counts are whole, and ``(experiment_id, step_id)`` names a row.
"""

from __future__ import annotations

import pandas as pd
import pandera.pandas as pa

from stepcal.datasets.tables import (
    checked_table,
    column_dictionary,
    flag,
    integer,
    integer_list,
    number,
    row_rule,
    text,
)

STEP_SCHEMA = pa.DataFrameSchema(
    {
        "experiment_id": text("Run that the step belongs to."),
        "model": text("Model served; canonical name in the study's own tables (`llama-2-70b`)."),
        "workload": text("Workload's name (`general`, `codegen`, `roleplay`, `reasoning` in the study)."),
        "tensor_parallel": integer("GPUs that share each layer.", "rank", minimum=1),
        "step_id": integer("The engine's step counter; sampled traces have gaps.", "step"),
        "ts_start_ns": integer("Monotonic clock when `schedule()` was entered.", "ns"),
        "ts_end_ns": integer("Monotonic clock when `schedule()` was left.", "ns"),
        "duration_us": number("The trace's label, `ts_end_ns - ts_start_ns`: the scheduler's own time.", "µs", above=0),
        "running_depth": integer("Requests running when the step was scheduled.", "request"),
        "waiting_depth": integer("Requests queued when the step was scheduled.", "request"),
        "num_prefill_reqs": integer("Requests in the batch that still read their prompt.", "request"),
        "num_decode_reqs": integer("Requests in the batch that generate.", "request"),
        "prefill_tokens": integer("Prompt tokens computed in the step, over all requests.", "token"),
        "decode_tokens": integer("Tokens generated in the step, over all requests.", "token"),
        "num_finished": integer("Requests that ended with the step.", "request"),
        "num_preempted": integer("Requests put back into the queue for want of KV blocks.", "request"),
        "kv_blocks_total": integer("KV blocks of the GPU's pool.", "block"),
        "kv_blocks_free": integer("KV blocks that were free.", "block"),
        "decode_kv_tokens": integer("Context tokens summed over decoding requests.", "token", required=False),
        "prefill_kv_tokens": integer("Context tokens summed over prefilling requests.", "token", required=False),
        "decode_kv_lens": integer_list("Context length of each decoding request.", "token"),
        "prefill_chunk_tokens": integer_list("Prompt tokens computed for each prefilling request.", "token"),
        "prefill_kv_lens": integer_list("Context length of each prefilling request.", "token"),
    },
    checks=[
        row_rule(lambda t: t["ts_end_ns"] >= t["ts_start_ns"], "ts_end_ns", "at or after `ts_start_ns`"),
        row_rule(lambda t: t["kv_blocks_free"] <= t["kv_blocks_total"], "kv_blocks_free", "at most `kv_blocks_total`"),
    ],
    unique=["experiment_id", "step_id"],
    ordered=False,
    name="step rows",
)


def _has_first_token(table: pd.DataFrame) -> pd.Series:
    """Whether a row has the time of its first token, or needs none: it failed, or the whole run was without streaming."""
    without_streaming = not table.loc[~table["has_error"], "ttft_s"].notna().any()
    return table["has_error"] | table["ttft_s"].notna() | without_streaming


REQUEST_SCHEMA = pa.DataFrameSchema(
    {
        "experiment_id": text("Run that the request belongs to."),
        "index": integer("The request's place in its run, by arrival, from 0.", "request"),
        "arrival_time_us": integer("Arrival, counted from the run's first request.", "µs"),
        "prompt_tokens": integer("Prompt length; 0 where the request failed.", "token"),
        "output_tokens": integer("Output length, re-tokenised by the client; 0 where the request failed.", "token"),
        "has_error": flag("Whether the client gave up or was refused."),
        "e2e_s": number("From sending to the last token, or to giving up.", "s", above=0, nullable=True),
        "ttft_s": number("From sending to the first token.", "s", above=0, nullable=True),
        "priority": integer(
            "Which requests a server with priorities serves first: the smallest.", "1", minimum=None, required=False
        ),
    },
    checks=[
        row_rule(lambda t: t["has_error"] | t["e2e_s"].notna(), "e2e_s", "a number unless the request failed"),
        row_rule(_has_first_token, "ttft_s", "a number unless the request failed"),
    ],
    unique=["experiment_id", "index"],
    ordered=False,
    name="request rows",
)

PREDICTION_SCHEMA = pa.DataFrameSchema(
    {
        "experiment_id": text("Run that the step belongs to."),
        "model": text("Model served, canonical name."),
        "workload": text("Workload's name."),
        "step_id": integer("The engine's step counter.", "step"),
        "duration_us": number("Measured label of the trace.", "µs", above=0),
        "predicted_us": number("Published prediction of the study's gradient boosting.", "µs", above=0),
    },
    unique=["experiment_id", "step_id"],
    name="published per-step predictions",
)


def validate_steps(frame: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """Check step rows and return them in canonical order of columns and types.

    Parameters
    ----------
    frame : DataFrame
        The columns of `step_columns`; optional ones may be absent.
    source : str
        What errors call the table, usually the file's path.

    Returns
    -------
    DataFrame
        A checked copy; rows keep their order.

    Raises
    ------
    InputError
        If the table is empty, columns are missing or unexpected, a duration is zero, negative or NaN, a count is not
        whole, a list disagrees with its count, or a step id repeats within an experiment.
    """
    steps = checked_table(frame, STEP_SCHEMA, source=source)
    for column, count in _LIST_COUNTS.items():
        if column in steps:
            _check_list_lengths(steps, column, count, source)
    return steps


def validate_requests(frame: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """Check request rows and return them in canonical order of columns and types.

    Parameters
    ----------
    frame : DataFrame
        The columns of `request_columns`. Latencies may be NaN only where `has_error`.
    source : str
        What errors call the table, usually the file's path.

    Returns
    -------
    DataFrame
        A checked copy; rows keep their order.

    Raises
    ------
    InputError
        If the table is empty, columns are missing or unexpected, a latency is not positive, a completed request lacks
        one, or an index repeats within an experiment.
    """
    return checked_table(frame, REQUEST_SCHEMA, source=source)


def step_columns() -> pd.DataFrame:
    """Return the data dictionary of step rows: column, kind, unit, required, meaning."""
    return column_dictionary(STEP_SCHEMA)


def request_columns() -> pd.DataFrame:
    """Return the data dictionary of request rows: column, kind, unit, required, meaning."""
    return column_dictionary(REQUEST_SCHEMA)


_LIST_COUNTS = {
    "decode_kv_lens": "num_decode_reqs",
    "prefill_chunk_tokens": "num_prefill_reqs",
    "prefill_kv_lens": "num_prefill_reqs",
}


def _check_list_lengths(steps: pd.DataFrame, column: str, count: str, source: str) -> None:
    rule = row_rule(
        lambda table: table[column].map(len) == table[count], column, f"a list of as many numbers as `{count}`"
    )
    checked_table(steps, pa.DataFrameSchema(STEP_SCHEMA.columns, checks=[rule], name=STEP_SCHEMA.name), source=source)
