"""Corrected labels: the interval between sampled steps, its exclusions and its error, and the audit of the old one."""

import numpy as np
import pandas as pd
import pytest

from stepcal.errors import InputError
from stepcal.reconstruction import labels
from stepcal.reconstruction.labels import stage_starts_ns
from stepcal.studies import registry as studies
from stepcal.studies.diagnosis import label_audit
from stepcal.studies.diagnosis.batch_reconstruction import request_line_fits
from stepcal.studies.diagnosis.label_audit import large_prefills
from stepcal.studies.results import records as recorded


@pytest.fixture
def trace(make_steps):
    """A run of 10 ms a step: ids and starts as given, in ms."""

    def make(ids, start_ms, decode=20, **columns):
        start = (np.asarray(start_ms, dtype=float) * 1e6).astype(np.int64)
        prefill = columns.pop("prefill_tokens", 0)
        return make_steps(
            np.broadcast_to(prefill, len(ids)),
            np.broadcast_to(decode, len(ids)),
            step_id=ids,
            ts_start_ns=start,
            **columns,
        )

    return make


class TestStepIntervals:
    def test_is_the_mean_over_the_gap(self, trace):
        table = labels.step_intervals(trace([3, 4, 9], [0, 10, 60]))
        assert table["interval_us"].tolist()[:2] == [10_000, 10_000]
        assert table["gap_steps"].tolist() == [1, 5, 0]
        assert table["exclusion"].tolist() == ["", "", "last sample"]
        assert np.isinf(table["interval_sd_us"].iloc[-1])

    def test_sorts_and_keeps_runs_apart(self, trace):
        a, b = trace([1, 2], [0, 10]), trace([1, 2], [5, 25]).assign(experiment_id="run-b")
        table = labels.step_intervals(pd.concat([b, a.iloc[::-1]]))
        assert table.query("usable")["interval_us"].tolist() == [10_000, 20_000]

    def test_idle_needs_a_long_gap_and_a_quiet_server(self, trace):
        ids, start = [1, 2, 3, 4, 5, 6], [0, 10, 20, 320, 330, 340]
        quiet = labels.step_intervals(trace(ids, start, decode=[20, 20, 1, 20, 20, 20]))
        assert quiet["exclusion"].tolist() == ["", "", "idle", "", "", "last sample"]
        busy = labels.step_intervals(trace(ids, start))
        assert busy["exclusion"].tolist() == [""] * 5 + ["last sample"], "a long step of a busy server is a long step"
        short = labels.step_intervals(trace(ids, np.array(ids) * 10, decode=1))
        assert short["usable"].sum() == 5

    def test_a_change_of_load_inside_a_gap(self, trace):
        table = labels.step_intervals(trace([1, 2, 3, 4], [0, 10, 20, 30]), stage_starts_ns={"run-a": [15e6]})
        assert table["exclusion"].tolist() == ["", "stage change", "", "last sample"]

    def test_a_long_gap(self, trace):
        table = labels.step_intervals(trace([1, 2, 200, 201], [0, 10, 1990, 2000]))
        assert table["exclusion"].tolist() == ["", "long gap", "", "last sample"]

    def test_error_grows_with_the_gap_and_with_the_drift(self, trace):
        rng = np.random.default_rng(0)
        gaps = rng.integers(1, 20, 400)
        batch = np.repeat(rng.integers(10, 60, 41), 10)[:401]
        noise = rng.normal(0, 300, 400) / np.sqrt(gaps)
        start = np.concatenate([[0], np.cumsum(gaps * (10_000 + 50 * batch[:-1] + noise))]) / 1e3
        table = labels.step_intervals(trace(np.concatenate([[0], np.cumsum(gaps)]), start, decode=batch)).query(
            "usable"
        )
        steady = table[(table["batch_end"] - table["batch_start"]).abs() < 2]
        assert steady.query("gap_steps == 1")["interval_sd_us"].max() < 60, "no other step is in it"
        assert steady.query("gap_steps > 5")["interval_sd_us"].median() == pytest.approx(300, rel=0.3)
        moved = table[(table["batch_end"] - table["batch_start"]).abs() > 30]
        assert moved["interval_sd_us"].min() > steady["interval_sd_us"].median()

    @pytest.mark.parametrize(
        ("ids", "start", "message"),
        [([1, 1], [0, 10], "ids must be distinct"), ([1, 2], [10, 0], "time must grow")],
    )
    def test_refuses_disorder(self, trace, ids, start, message):
        with pytest.raises(InputError, match=message):
            labels.step_intervals(trace(ids, start))

    def test_refuses_a_missing_column(self, trace):
        with pytest.raises(InputError, match="lacks ts_start_ns"):
            labels.step_intervals(trace([1, 2], [0, 10]).drop(columns="ts_start_ns"))


def test_share_of_wall_time_counts_every_step(trace):
    steps = trace([1, 2, 6, 7], [0, 10, 50, 60], duration_us=[1000.0, 2000.0, 1000.0, 5.0])
    row = label_audit.label_against_interval(labels.step_intervals(steps)).iloc[0]
    assert row["wall_share_percent"] == pytest.approx(100 * (1 + 4 * 2 + 1) / 60)
    assert row["ratio_median"] == pytest.approx(10)


def test_steps_are_counted_between_samples(trace):
    lives = pd.DataFrame(
        {
            "completed": [True, True, False],
            "first_token_us": [105e3, 0.0, 110e3],
            "end_us": [195e3, 150e3, 160e3],
            "output_tokens": 10,
        }
    )
    # Ten milliseconds a step, on a clock 1 s ahead.
    steps = trace([10, 15, 20], [1100, 1150, 1200])
    assert label_audit.steps_per_token(steps, lives, offset_us=1e6) == pytest.approx([1.0])


def test_label_by_running_takes_decode_steps_only(trace):
    steps = trace([1, 2, 3], [0, 10, 20], decode=[5, 5, 25], prefill_tokens=[0, 100, 0], duration_us=[40.0, 9e9, 200.0])
    table = label_audit.label_by_running(steps).set_index(["experiment_id", "bin"])
    assert table.loc[("run-a", "1-10"), "median_us"] == 40
    assert table.loc[("pooled", "21-30"), "per_request_us"] == pytest.approx(8)


def test_a_large_prefill_shows_one_interval_later(trace):
    steps = trace([1, 2, 3, 4, 5, 6], [0, 10, 20, 60, 70, 80], prefill_tokens=[0, 500, 0, 0, 0, 0])
    row = large_prefills(steps, labels.step_intervals(steps)).iloc[0]
    assert (row["excess_own_us"], row["excess_next_us"]) == pytest.approx((0, 30_000))


def test_stage_starts_are_on_the_traces_clock():
    requests = pd.DataFrame({"experiment_id": "run-a", "arrival_time_us": [0, 10, 20, 30]})
    stages = pd.DataFrame({"experiment_id": "run-a", "stage": [0, 1], "requests": [3, 1]})
    assert stage_starts_ns(requests, stages, {"run-a": 1000.0}) == {"run-a": [1030e3]}


def test_a_line_is_fitted_exactly():
    rng = np.random.default_rng(1)
    n = 50
    decode = pd.DataFrame(
        {c: rng.uniform(1, 2, n) for c in ("batch", "kv_tokens", "waiting", "prefill_tokens", "prefill_requests")}
    )
    decode = decode.assign(
        experiment_id="run-a",
        interval_us=10 + decode["batch"] + 3 * decode["kv_tokens"],
        split=["train"] * 30 + ["test"] * 20,
    )
    row = request_line_fits(decode).iloc[0]
    assert row["mape_percent"] == pytest.approx(0, abs=1e-9)
    assert row["mape_test_percent"] == pytest.approx(0, abs=1e-9)
    assert row["mape_constant_percent"] > 1


def test_the_published_label_is_no_step_time(traces_folder):
    """What the report says of the label, with room for nothing but rounding."""
    study = studies.load_study(studies.LABEL_AUDIT, data=traces_folder)
    compared = study["label_vs_interval"]
    assert compared["ratio_median"].round().tolist() == [17, 70, 34]
    assert compared["wall_share_percent"].between(5, 15).all()
    assert compared["spearman"].between(0.83, 0.86).all()
    assert compared["pearson_raw"].between(0.08, 0.2).all()
    assert (study["steps_per_token"]["median"] - 1).abs().max() < 1e-3
    overloaded = study["by_run"].query("overloaded").set_index("experiment_id")["label_median_us"]
    assert (overloaded / 1000).round().sort_values().tolist() == [6, 13, 26, 32]


class TestRecordedTiming:
    timing = recorded.read_recorded("schedule_timing").tables["timing"].query("function == 'schedule'")

    def test_grows_by_the_labels_microseconds_a_request(self):
        alone = self.timing.query("waiting == 0 and busy_threads == 0")
        slope, level = np.polyfit(alone["running"], alone["p50_us"], 1)
        assert 3 < slope < 12, "the public label has 7 to 9"
        assert abs(level) < 5 * slope

    def test_does_not_scan_the_queue(self):
        full = self.timing.query("running == 128 and busy_threads == 0").set_index("waiting")["p50_us"]
        assert full[1000] < 1.2 * full[0]

    def test_loses_milliseconds_to_another_thread(self):
        tail = self.timing.query("busy_threads == 1")["p99_us"]
        assert (tail > 5000).all()
