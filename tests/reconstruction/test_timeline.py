"""Rebuilt batches: against a slow reference on random requests, and against the servers' record where traces are at hand."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcal.datasets import experiments, load_requests, measured
from stepcal.errors import InputError
from stepcal.reconstruction.checks import (
    blocks_in_use,
    estimate_offset_us,
    failure_sensitivity,
    validate_reconstruction,
)
from stepcal.reconstruction.prefix_cache import groups_seen
from stepcal.reconstruction.timeline import SERIES, build_timeline, decode_intervals, request_lives

RUNS = pd.DataFrame(
    {
        "experiment_id": ["run-a"],
        "run_output_tokens": [10],
        "run_system_prompt_tokens": [40],
        "run_groups": [2],
        "run_prompts_per_group": [3],
        "block_size": [16],
        "max_num_seqs": [4],
        "kv_blocks_total": [1000],
    }
)


def make_requests(arrival_s, ttft_s, decode_s, *, failed=(), prompt_tokens=100):
    arrival_s, ttft_s = np.asarray(arrival_s, dtype=float), np.asarray(ttft_s, dtype=float)
    has_error = np.isin(np.arange(arrival_s.size), failed)
    return pd.DataFrame(
        {
            "experiment_id": "run-a",
            "index": np.arange(arrival_s.size),
            "arrival_time_us": np.rint(1e6 * arrival_s).astype(int),
            "prompt_tokens": np.where(has_error, 0, prompt_tokens),
            "has_error": has_error,
            "e2e_s": ttft_s + np.asarray(decode_s, dtype=float),
            "ttft_s": np.where(has_error, np.nan, ttft_s),
        }
    )


def slow_at(lives, time):
    """State at a time by asking every request: an independent, slow statement of what `Timeline.at` returns."""
    state = dict.fromkeys(SERIES, 0.0)
    for life in lives.to_dict("records"):
        if life["arrival_us"] <= time < life["admitted_us"]:
            state["waiting"] += 1
        if life["ran"] and life["prefill_us"] <= time < life["first_token_us"]:
            state["prefilling"] += 1
        if life["ran"] and life["first_token_us"] <= time < life["end_us"]:
            state["decoding"] += 1
            state["kv_tokens"] += life["prompt_tokens"] + 0.5 + (time - life["first_token_us"]) / life["interval_us"]
    return state


random_requests = st.lists(
    st.tuples(st.floats(0, 3), st.floats(0.01, 0.5), st.floats(0.05, 2), st.integers(1, 300)), min_size=2, max_size=12
)


class TestAgainstSlowReference:
    @given(random_requests, st.lists(st.floats(0, 6), min_size=1, max_size=8))
    def test_state_at_any_time(self, requests, times):
        arrival, ttft, decode, prompt = (np.array(c) for c in zip(*sorted(requests), strict=True))
        lives = request_lives(make_requests(arrival, ttft, decode, prompt_tokens=prompt), RUNS)
        now = build_timeline(lives).at(np.array(times) * 1e6)
        for row, time in enumerate(times):
            for name, value in slow_at(lives, time * 1e6).items():
                assert now[name][row] == pytest.approx(value, abs=1e-5), name

    @given(random_requests)
    def test_means_over_a_life(self, requests):
        arrival, ttft, decode, prompt = (np.array(c) for c in zip(*sorted(requests), strict=True))
        table = make_requests(arrival, ttft, decode, prompt_tokens=prompt)
        lives = request_lives(table, RUNS)
        timeline = build_timeline(lives)
        known = decode_intervals(table, RUNS, weighting="time")
        for row, life in enumerate(lives.to_dict("records")):
            inside = timeline.times_us[
                (timeline.times_us > life["first_token_us"]) & (timeline.times_us < life["end_us"])
            ]
            edges = np.concatenate([[life["first_token_us"]], inside, [life["end_us"]]])
            # Linear between breakpoints: the value in the middle is the mean.
            states = [slow_at(lives, (a + b) / 2) for a, b in pairwise(edges)]
            weights = np.diff(edges)
            for ours, name in (("batch", "decoding"), ("kv_tokens", "kv_tokens"), ("waiting", "waiting")):
                mean = np.average([s[name] for s in states], weights=weights)
                assert known[ours][row] == pytest.approx(mean, rel=1e-6, abs=1e-5)
            first = lives["first_token_us"]
            others = ((first > life["first_token_us"]) & (first <= life["end_us"])).sum()
            assert known["prefill_requests"][row] == pytest.approx(others / 9)


def test_a_lone_request_sees_itself():
    one = decode_intervals(make_requests([0.0], [0.1], [0.9]), RUNS).iloc[0]
    assert one["interval_us"] == pytest.approx(100_000)
    assert one["batch"] == pytest.approx(1)
    assert one["kv_tokens"] == pytest.approx(100 + 10 / 2)
    assert one[["waiting", "prefill_requests", "arrivals"]].tolist() == [0, 0, 0]


def test_steps_weigh_alike_however_long_they_are():
    """A has company only while the server is slow: fewer of its steps than of its time are shared."""
    table = make_requests([0.0, 1.0], [0.1, 0.1], [2.0, 4.0])
    by_time, by_step = (decode_intervals(table, RUNS, weighting=w)["batch"][0] for w in ("time", "step"))
    # One request at 9/2 steps a second for 1 s, then two at the mean of 9/2 and 9/4 for 1 s.
    assert by_time == pytest.approx(1.5, abs=1e-6)
    assert by_step == pytest.approx((4.5 + 2 * 3.375) / (4.5 + 3.375), abs=1e-6)


def test_prefill_tokens_by_what_the_cache_holds():
    table = make_requests(np.arange(8.0), np.full(8, 0.1), np.full(8, 0.5), prompt_tokens=96)
    tokens = request_lives(table, RUNS)["prefill_tokens"].to_numpy()
    assert tokens[0] == 96, "nothing was seen"
    assert np.all((tokens[1:6] < 96) & (tokens[1:6] > 96 - 32)), "some share a system prompt of two full blocks"
    assert tokens[6:].tolist() == [16, 16], "a prompt of whole blocks recomputes its last"


def test_expected_groups():
    assert groups_seen(0, 10, 10) == 0
    assert groups_seen(1, 10, 10) == pytest.approx(10 * (1 - 0.99**10))
    assert groups_seen(100, 10, 10) == 10


class TestFailedRequests:
    def full(self, **kwargs):
        """Four slots taken by completed requests from 0 to about 5 s; the fifth gives up after 10 s."""
        table = make_requests([0, 0.1, 0.2, 0.3, 1.0], [0.1, 0.1, 0.1, 0.1, 0], [5, 5, 5, 5, 10], failed=[4])
        return request_lives(table, RUNS, **kwargs)

    def test_gets_the_first_slot_that_is_free(self):
        lives = self.full()
        assert lives["ran"].all()
        assert lives["admitted_us"][4] == pytest.approx(5.1e6)
        assert 1 < lives["output_tokens"][4] <= 10
        assert lives["prompt_tokens"][4] == 100

    def test_or_none_if_it_is_taken_to_have_waited(self):
        lives = self.full(failed_ran=False)
        assert not lives["ran"][4]
        assert lives["admitted_us"][4] == lives["end_us"][4] == pytest.approx(11e6)
        assert build_timeline(lives).at([8e6])["waiting"][0] == 1

    def test_is_no_row_of_the_labels(self):
        table = make_requests([0, 0.1, 0.2], [0.1, 0.1, 0], [5, 5, 10], failed=[2])
        assert decode_intervals(table, RUNS)["index"].tolist() == [0, 1]

    def test_never_more_than_the_slots(self, traces_folder):
        requests = load_requests(traces_folder)
        for run in experiments().query("overloaded")["experiment_id"]:
            lives = request_lives(requests[requests["experiment_id"] == run], experiments())
            assert build_timeline(lives).values["decoding"].max() <= 129, run


def test_split_is_temporal_and_drops_what_was_in_flight():
    table = make_requests(np.arange(10.0), np.full(10, 0.1), [0.5] * 5 + [3.0] + [0.5] * 4)
    assert (
        decode_intervals(table, RUNS)["split"].tolist() == ["train"] * 5 + ["in_flight"] + ["valid"] * 2 + ["test"] * 2
    )


def test_blocks_are_shared_by_one_prompt():
    table = make_requests([0.0, 0.0], [0.1, 0.1], [9.0, 9.0], prompt_tokens=100)
    lives = request_lives(table.assign(index=[0, 6]), RUNS)
    # Six full blocks of the text once, two of them a system prompt; one block each for what is left.
    assert blocks_in_use(lives, np.array([0.2e6]), RUNS.iloc[0])[0] == pytest.approx(4 + 2 * groups_seen(1, 2, 3) + 2)


class TestRefusals:
    def test_missing_column(self):
        with pytest.raises(InputError, match="`requests` lacks ttft_s"):
            request_lives(make_requests([0], [0.1], [1]).drop(columns="ttft_s"), RUNS)

    def test_unknown_run(self):
        with pytest.raises(InputError, match="no row of `run-b`"):
            request_lives(make_requests([0], [0.1], [1]).assign(experiment_id="run-b"), RUNS)

    def test_completed_without_time(self):
        with pytest.raises(InputError, match="Request 0 of `run-a` completed with TTFT"):
            request_lives(make_requests([0], [0.1], [1]).assign(ttft_s=np.nan), RUNS)

    def test_one_token(self):
        with pytest.raises(InputError, match="at least 2 tokens"):
            request_lives(make_requests([0], [0.1], [1]), RUNS.assign(run_output_tokens=1))

    def test_several_runs_on_one_timeline(self):
        lives = request_lives(make_requests([0], [0.1], [1]), RUNS)
        with pytest.raises(InputError, match="2 experiments"):
            build_timeline(pd.concat([lives, lives.assign(experiment_id="run-b")]))

    def test_weighting_and_empty_interval(self):
        timeline = build_timeline(request_lives(make_requests([0], [0.1], [1]), RUNS))
        with pytest.raises(InputError, match="weighting='step-wise'"):
            timeline.means([0], [1], weighting="step-wise")
        with pytest.raises(InputError, match="must end after it starts"):
            timeline.means([1], [1])


def test_offset_is_found(make_steps):
    """A trace made from the rebuilt batch itself, on a clock 123.4 s ahead."""
    rng = np.random.default_rng(3)
    table = make_requests(np.sort(rng.uniform(0, 30, 60)), np.full(60, 0.1), rng.uniform(1, 3, 60))
    timeline = build_timeline(request_lives(table, RUNS))
    times = np.arange(0.2e6, 32e6, 50e3)
    now = timeline.at(times)
    batch = (now["decoding"] + now["prefilling"]).to_numpy()
    steps = make_steps(
        np.zeros(times.size, dtype=int),
        batch.astype(int),
        ts_start_ns=((times + 123.4e6) * 1e3).astype(np.int64),
        num_decode_reqs=batch.astype(int),
        num_prefill_reqs=0,
    )
    assert estimate_offset_us(steps, timeline) == pytest.approx(123.4e6, abs=2e3)


def test_latencies_are_the_clients_own(traces_folder):
    """What the batches are rebuilt from is the load generator's record, not the server's."""
    requests = load_requests(traces_folder).query("~has_error")
    ours = 1000 * requests.groupby("experiment_id")["e2e_s"].mean()
    summary = measured().query("stage == -1 and metric == 'e2e' and statistic == 'mean'").set_index("experiment_id")
    assert np.allclose(ours, summary["value"].reindex(ours.index), rtol=1e-12)


def test_measured_batches_are_the_traced_ones(traces, traces_folder):
    requests = load_requests(traces_folder)
    checks = validate_reconstruction(traces, requests, experiments()).set_index("quantity")
    assert checks.loc["batch_requests", "mean_abs_error"].max() < 0.02
    assert checks.loc["running_depth", "mean_abs_error"].max() < 0.02
    assert checks.loc["waiting_depth", "mean_abs_error"].max() < 0.1
    assert checks.loc["kv_blocks", "mean_abs_error_percent"].max() < 0.5
    failures = failure_sensitivity(requests, experiments())
    assert failures["n_failed"].sum() == 8966
    assert (failures["n_affected"] < 250).all()
