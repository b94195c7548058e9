"""What step and request tables accept, and what they say when they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stepcal.datasets import content_sha256, request_columns, step_columns, validate_requests, validate_steps
from stepcal.errors import InputError

Change = Callable[[pd.DataFrame], pd.DataFrame]


def _with(column: str, row: int, value: Any) -> Change:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        values = table[column].astype(object) if column in table else pd.Series([None] * len(table), dtype=object)
        values[row] = value
        return table.assign(**{column: values})

    return change


def test_valid_steps_come_back_in_canonical_order_and_types(steps: pd.DataFrame) -> None:
    shuffled = steps[sorted(steps.columns)].astype({"step_id": "Int64", "decode_tokens": "float64"})
    checked = validate_steps(shuffled, source="trace")
    assert list(checked) == list(step_columns().query("required")["column"])
    assert checked["step_id"].dtype == checked["decode_tokens"].dtype == np.dtype("int64")
    assert checked["duration_us"].dtype == np.dtype("float64")


def test_validation_leaves_its_argument_alone(steps: pd.DataFrame) -> None:
    before = steps.copy(deep=True)
    validate_steps(steps, source="trace")
    pd.testing.assert_frame_equal(steps, before)


def test_optional_lists_are_kept_as_lists_of_integers(steps: pd.DataFrame) -> None:
    checked = validate_steps(steps.assign(decode_kv_lens=pd.Series([np.array([5, 6, 7])] * len(steps))), source="trace")
    assert checked["decode_kv_lens"].iloc[0] == [5, 6, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with("duration_us", 2, 0.0), "row 3: column `duration_us` is 0.0, but must be a number above 0"),
        (_with("duration_us", 1, -7.5), "row 2: column `duration_us` is -7.5, but must be a number above 0"),
        (_with("duration_us", 1, np.nan), "row 2: column `duration_us` is NaN, but must be a number above 0"),
        (_with("duration_us", 3, np.inf), "row 4: column `duration_us` is inf, but must be a finite number"),
        (_with("duration_us", 0, "fast"), "row 1: column `duration_us` is 'fast'"),
        (_with("decode_tokens", 2, 2.5), "row 3: column `decode_tokens` is 2.5, but must be a whole number"),
        (_with("decode_tokens", 2, None), "row 3: column `decode_tokens` is missing, but must be a whole number"),
        (
            _with("waiting_depth", 0, -1),
            "row 1: column `waiting_depth` is -1, but must be a whole number of at least 0",
        ),
        (_with("num_finished", 1, [4]), "row 2: column `num_finished` is [4], but must be a whole number"),
        (_with("num_finished", 1, 10**30), "row 2: column `num_finished` is 1000000"),
        (_with("num_finished", 1, "x"), "row 2: column `num_finished` is 'x', but must be a whole number"),
        (lambda t: t.assign(num_finished=True), "row 1: column `num_finished` is True, but must be a whole number"),
        (_with("tensor_parallel", 0, 0), "column `tensor_parallel` is 0, but must be a whole number of at least 1"),
        (_with("model", 1, ""), "row 2: column `model` is '', but must be text that is not empty"),
        (_with("model", 1, None), "row 2: column `model` is missing, but must be text that is not empty"),
        (_with("ts_end_ns", 3, 0), "row 4: column `ts_end_ns` is 0, but must be at or after `ts_start_ns`"),
        (_with("kv_blocks_free", 3, 101), "column `kv_blocks_free` is 101, but must be at most `kv_blocks_total`"),
        (_with("step_id", 3, 10), r"row 4: duplicate of row 1 (experiment_id 'run-a', step_id 10)"),
        (lambda t: t.assign(decode_kv_lens=[[1, 2]] * 4), "a list of as many numbers as `num_decode_reqs`"),
        (lambda t: t.assign(decode_kv_lens=[[1, 2, -3]] * 4), "a list of whole numbers of at least 0"),
        (lambda t: t.assign(decode_kv_lens="none"), "a list of whole numbers of at least 0"),
        (lambda t: t.drop(columns=["step_id", "model"]), "missing columns `model`, `step_id`"),
        (lambda t: t.assign(cycle_time=1.0), "unexpected column `cycle_time`"),
        (lambda t: t.rename(columns={"model": "name"}), "missing column `model`; unexpected column `name`"),
        (lambda t: t.iloc[:0], "the table has no rows"),
        (lambda t: pd.concat([t, t[["model"]]], axis=1), "column `model` appears twice"),
    ],
)
def test_bad_steps_are_refused_by_source_place_column_and_bound(steps: pd.DataFrame, change: Change, said: str) -> None:
    with pytest.raises(InputError) as refusal:
        validate_steps(change(steps), source="trace.parquet")
    assert str(refusal.value).startswith("trace.parquet")
    assert said in str(refusal.value)


def test_the_same_step_id_may_occur_in_two_experiments(steps: pd.DataFrame) -> None:
    both = pd.concat([steps, steps.assign(experiment_id="run-b")])
    assert len(validate_steps(both, source="trace")) == 2 * len(steps)


def test_valid_requests_may_lack_latency_only_where_they_failed(requests: pd.DataFrame) -> None:
    assert validate_requests(requests, source="requests")["ttft_s"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with("ttft_s", 0, np.nan), "row 1: column `ttft_s` is NaN, but must be a number unless the request failed"),
        (_with("e2e_s", 1, np.nan), "row 2: column `e2e_s` is NaN, but must be a number unless the request failed"),
        (_with("e2e_s", 1, 0.0), "row 2: column `e2e_s` is 0.0, but must be a number above 0"),
        (_with("has_error", 1, "no"), "row 2: column `has_error` is 'no', but must be true or false"),
        (_with("index", 2, 1), "row 3: duplicate of row 2 (experiment_id 'run-a', index 1)"),
        (_with("prompt_tokens", 0, 1.5), "row 1: column `prompt_tokens` is 1.5, but must be a whole number"),
        (lambda t: t.drop(columns="has_error"), "missing column `has_error`"),
        (lambda t: t.iloc[:0], "the table has no rows"),
    ],
)
def test_bad_requests_are_refused(requests: pd.DataFrame, change: Change, said: str) -> None:
    with pytest.raises(InputError) as refusal:
        validate_requests(change(requests), source="requests.parquet")
    assert said in str(refusal.value)


@pytest.mark.parametrize("dictionary", [step_columns(), request_columns()], ids=["steps", "requests"])
def test_the_data_dictionary_explains_every_column(dictionary: pd.DataFrame) -> None:
    assert (dictionary["meaning"].str.len() > 10).all()
    measured = dictionary[dictionary["kind"].isin(["integer", "number"])]
    assert (measured["unit"] != "").all()


def test_content_hash_ignores_row_order_column_order_and_encoding(steps: pd.DataFrame) -> None:
    checked = validate_steps(steps, source="trace")
    other = checked.sample(frac=1, random_state=0)[sorted(checked.columns)]
    other = other.astype({"experiment_id": "category", "step_id": "Int64", "num_finished": "int16"})
    assert content_sha256(other) == content_sha256(checked)


@pytest.mark.parametrize(("column", "value"), [("duration_us", 250.00000000000003), ("model", "b"), ("step_id", 99)])
def test_content_hash_sees_any_changed_value(steps: pd.DataFrame, column: str, value: Any) -> None:
    changed = steps.copy()
    changed[column] = changed[column].astype(object).where(changed.index != 0, value).infer_objects()
    checked = validate_steps(changed, source="trace")
    assert content_sha256(checked) != content_sha256(validate_steps(steps, source="trace"))


def test_content_hash_holds_over_a_parquet_round_trip(requests: pd.DataFrame, tmp_path: Any) -> None:
    checked = validate_requests(requests, source="requests")
    checked.to_parquet(tmp_path / "requests.parquet")
    assert content_sha256(pd.read_parquet(tmp_path / "requests.parquet")) == content_sha256(checked)
