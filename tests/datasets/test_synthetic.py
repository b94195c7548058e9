"""Invented step rows: full size, the same for the same seed, and shaped like what they stand in for."""

from __future__ import annotations

import pandas as pd
import pytest

from stepcal.datasets import content_sha256, experiments, published_h1_per_experiment, simulated_step_rows
from stepcal.errors import InputError


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Full-size rows of one seed."""
    return simulated_step_rows(seed=7)


def test_every_run_has_the_published_number_of_steps(rows: pd.DataFrame) -> None:
    assert len(rows) == 122_752
    published = published_h1_per_experiment().groupby("experiment_id")["n_steps"].first()
    assert rows.groupby("experiment_id").size().to_dict() == published.to_dict()


def test_a_seed_decides_every_value(rows: pd.DataFrame) -> None:
    assert content_sha256(simulated_step_rows(seed=7)) == content_sha256(rows)
    assert content_sha256(simulated_step_rows(seed=8)) != content_sha256(rows)


def test_rows_are_sorted_and_steps_do_not_overlap(rows: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(rows, rows.sort_values(["experiment_id", "step_id"], ignore_index=True))
    before = rows.groupby("experiment_id")["ts_end_ns"].shift(1, fill_value=0)
    assert (rows["ts_start_ns"] >= before).all()


def test_about_a_tenth_of_steps_is_sampled(rows: pd.DataFrame) -> None:
    gaps = rows.groupby("experiment_id")["step_id"].max() / rows.groupby("experiment_id").size()
    assert gaps.between(9.3, 10.7).all()


def test_most_steps_only_decode_and_few_prefills_are_large(rows: pd.DataFrame) -> None:
    assert 0.75 < (rows["prefill_tokens"] == 0).mean() < 0.9
    large = (rows["prefill_tokens"] > 64).groupby(rows["experiment_id"]).sum()
    assert large.between(7, 10).all()
    assert (rows.query("prefill_tokens > 0")["num_prefill_reqs"] > 0).all()
    assert (rows.query("prefill_tokens == 0")["num_prefill_reqs"] == 0).all()


def test_rows_keep_the_servers_limits(rows: pd.DataFrame) -> None:
    limits = rows.merge(experiments()[["experiment_id", "max_num_seqs", "max_num_batched_tokens"]], on="experiment_id")
    assert (limits["running_depth"] <= limits["max_num_seqs"]).all()
    assert (limits["prefill_tokens"] + limits["decode_tokens"] <= limits["max_num_batched_tokens"]).all()
    assert (limits["num_prefill_reqs"] + limits["num_decode_reqs"] == limits["running_depth"]).all()


def test_only_overloaded_runs_queue(rows: pd.DataFrame) -> None:
    queue = rows.groupby("experiment_id")["waiting_depth"].median()
    overloaded = experiments().set_index("experiment_id")["overloaded"]
    assert (queue[overloaded] > 100).all()
    assert (queue[~overloaded] == 0).all()


def test_the_label_follows_the_running_requests(rows: pd.DataFrame) -> None:
    quiet = rows.query("running_depth < 60 and waiting_depth == 0 and num_prefill_reqs == 0")
    per_request = quiet["duration_us"] / quiet["running_depth"]
    assert 5 < per_request.median() < 12


@pytest.mark.parametrize("n_steps", [1, 2, 50])
def test_shorter_traces_can_be_asked_for(n_steps: int) -> None:
    assert (simulated_step_rows(seed=0, n_steps=n_steps).groupby("experiment_id").size() == n_steps).all()


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InputError, match="`n_steps` is 0"):
        simulated_step_rows(seed=0, n_steps=0)
    with pytest.raises(InputError, match="`seed` is -1"):
        simulated_step_rows(seed=-1)
