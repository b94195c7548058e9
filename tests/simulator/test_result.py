"""What a simulation gives back: request table, step table, summary, progress and interruption."""

import json

import numpy as np
import pyarrow as pa
import pytest

from stepcal.simulator import (
    CompiledStepTime,
    LoadStage,
    ServerConfig,
    SimulationInterrupted,
    SimulationResult,
    Workload,
    make_requests,
    simulate,
)

WORKLOAD = Workload(
    n_groups=2,
    n_prompts_per_group=3,
    system_prompt_len=50,
    question_len=100,
    output_len=80,
    stages=(LoadStage(10.0, 10.0), LoadStage(30.0, 10.0)),
)
SERVER = ServerConfig(kv_blocks=200, max_num_seqs=16, max_num_batched_tokens=256)
STEP_TIME = CompiledStepTime(constant_us=5000.0, tokens_us=5.0, kv_us=0.5)

STEP_COLUMNS = [
    "experiment_id",
    "step_id",
    "ts_start_ns",
    "ts_end_ns",
    "duration_us",
    "running_depth",
    "waiting_depth",
    "num_prefill_reqs",
    "num_decode_reqs",
    "prefill_tokens",
    "decode_tokens",
    "num_finished",
    "num_preempted",
    "kv_blocks_total",
    "kv_blocks_free",
    "decode_kv_tokens",
    "prefill_kv_tokens",
    "decode_kv_lens",
    "prefill_chunk_tokens",
    "prefill_kv_lens",
]


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    return simulate(WORKLOAD.requests(seed=1), SERVER, STEP_TIME, record_steps=1.0, experiment_id="run-1")


def test_the_request_table_is_consistent(result: SimulationResult) -> None:
    table = result.request_table()
    assert len(table) == 400
    assert table["stage"].value_counts().sort_index().tolist() == [100, 300]
    assert (table["status"] == "finished").all()
    assert (table["arrival_s"] <= table["first_scheduled_s"]).all()
    assert (table["first_scheduled_s"] < table["first_token_s"]).all()
    assert (table["first_token_s"] < table["finish_s"]).all()
    assert np.allclose(table["e2e_s"], table["finish_s"] - table["arrival_s"])
    assert np.allclose(table["ttft_s"], table["first_token_s"] - table["arrival_s"])
    assert (table["generated_tokens"] == 80).all()
    assert table["preemptions"].sum() == result.preemptions


def test_the_step_table_has_the_schema_of_a_trace(result: SimulationResult) -> None:
    table = result.step_table()
    assert table.column_names == STEP_COLUMNS
    assert table.num_rows == result.steps
    assert table["experiment_id"].unique().to_pylist() == ["run-1"]
    assert table.schema.field("decode_kv_lens").type == pa.list_(pa.int32())
    steps = table.to_pandas()
    assert (np.diff(steps["step_id"]) > 0).all()
    assert np.allclose(steps["ts_end_ns"] - steps["ts_start_ns"], steps["duration_us"] * 1e3, atol=2.0)
    assert (steps["decode_tokens"] == steps["num_decode_reqs"]).all()
    assert (steps["decode_kv_lens"].map(len) == steps["num_decode_reqs"]).all()
    assert (steps["decode_kv_lens"].map(np.sum) == steps["decode_kv_tokens"]).all()
    assert (steps["prefill_chunk_tokens"].map(np.sum) == steps["prefill_tokens"]).all()
    assert (steps["prefill_kv_lens"].map(np.sum) == steps["prefill_kv_tokens"]).all()
    assert (steps["prefill_kv_lens"].map(len) == steps["num_prefill_reqs"]).all()
    assert (steps["kv_blocks_total"] == SERVER.kv_blocks).all()
    assert steps["num_finished"].sum() == 400
    assert steps["num_preempted"].sum() == result.preemptions
    tokens = steps["prefill_tokens"] + steps["decode_tokens"]
    expected = 5000.0 + 5.0 * tokens + 0.5 * steps["decode_kv_tokens"]
    assert np.allclose(steps["duration_us"], expected)


def test_a_sample_of_steps_is_a_part_of_all_steps(result: SimulationResult) -> None:
    sample = simulate(WORKLOAD.requests(seed=1), SERVER, STEP_TIME, record_steps=0.1, seed=2).step_table().to_pandas()
    every = result.step_table().to_pandas().set_index("step_id")
    assert len(sample) == pytest.approx(0.1 * len(every), rel=0.25)
    same = every.loc[sample["step_id"]].reset_index()
    for name in STEP_COLUMNS[2:17]:
        assert (same[name] == sample[name]).all(), name
    assert all(map(np.array_equal, same["decode_kv_lens"], sample["decode_kv_lens"]))


def test_a_callable_records_the_same_steps(result: SimulationResult) -> None:
    asked = simulate(WORKLOAD.requests(seed=1), SERVER, lambda b: STEP_TIME(b), record_steps=1.0, experiment_id="run-1")
    expected, actual = result.step_table(), asked.step_table()
    for name in STEP_COLUMNS:
        if name in ("ts_start_ns", "ts_end_ns", "duration_us"):
            assert np.allclose(expected[name].to_numpy(), actual[name].to_numpy(), rtol=1e-9)
        else:
            assert expected[name].equals(actual[name]), name


def test_no_step_table_without_a_record() -> None:
    result = simulate(WORKLOAD.requests(seed=1), SERVER, STEP_TIME)
    with pytest.raises(ValueError, match="No steps were recorded"):
        result.step_table()


def test_the_summary_is_that_of_the_request_table(result: SimulationResult) -> None:
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert list(summary) == ["overall", "stages", "steps", "preemptions", "simulated_s", "wall_s"]
    assert [s["requests"] for s in summary["stages"]] == [100, 300]
    table = result.request_table()
    for part, rows in ((summary["overall"], table), (summary["stages"][1], table[table["stage"] == 1])):
        assert list(part) == [
            "requests",
            "completed",
            "failed",
            "e2e_ms",
            "ttft_ms",
            "itl_ms",
            "tpot_ms",
            "requests_per_s",
        ]
        tpot = (rows["e2e_s"] - rows["ttft_s"]) / 79 * 1e3
        for name, values in (("e2e_ms", rows["e2e_s"] * 1e3), ("ttft_ms", rows["ttft_s"] * 1e3), ("tpot_ms", tpot)):
            assert part[name]["mean"] == pytest.approx(values.mean())
            for quantile, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                assert part[name][quantile] == pytest.approx(values.quantile(q))
        assert part["itl_ms"]["mean"] == pytest.approx(tpot.mean())
    assert summary["overall"]["requests_per_s"] == pytest.approx(
        400 / (table["finish_s"].max() - table["arrival_s"].min())
    )


def test_quantiles_of_gaps_are_exact_to_a_part_in_a_thousand() -> None:
    """Of one request at a time, the gaps are the durations of its decode steps."""
    requests = make_requests(np.arange(5) * 10.0, [[(i, 30)] for i in range(5)], 200)
    result = simulate(requests, SERVER, STEP_TIME, record_steps=1.0)
    steps = result.step_table().to_pandas()
    gaps = steps.loc[steps["num_decode_reqs"] == 1, "duration_us"] / 1e3
    itl = result.summary()["overall"]["itl_ms"]
    assert itl["mean"] == pytest.approx(gaps.mean(), rel=1e-9)
    for quantile, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert itl[quantile] == pytest.approx(gaps.quantile(q), rel=2e-3)


def test_a_run_without_a_completed_request_has_no_latencies() -> None:
    requests = make_requests(np.arange(3) * 1e-3, [[(i, 100)] for i in range(3)], 100)
    summary = simulate(requests, SERVER, STEP_TIME, timeout_s=0.05).summary()["overall"]
    assert (summary["completed"], summary["failed"]) == (0, 3)
    assert summary["e2e_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert summary["requests_per_s"] is None


def test_no_requests_is_an_empty_result() -> None:
    result = simulate(make_requests([], [[(0, 4)]], 5), SERVER, STEP_TIME, record_steps=1.0)
    assert result.steps == 0
    assert result.summary()["overall"]["requests"] == 0
    assert result.step_table().num_rows == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_s": 0.0}, "`timeout_s` is 0.0"),
        ({"timeout_s": np.nan}, "`timeout_s` is nan"),
        ({"api_before_us": -1.0}, "`api_before_us` is -1.0"),
        ({"api_after_us": np.inf}, "`api_after_us` is inf"),
        ({"record_steps": 0.0}, "`record_steps` is 0.0"),
        ({"record_steps": 1.5}, "`record_steps` is 1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(WORKLOAD.requests(), SERVER, STEP_TIME, **arguments)


def test_an_interrupted_run_says_how_far_it_came() -> None:
    n_asked = 0

    def step_time(batch: object) -> float:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 1000:
            raise KeyboardInterrupt
        return 5000.0

    with pytest.raises(SimulationInterrupted, match=r"after \d+ of 400 requests \(999 steps\); there is no result"):
        simulate(WORKLOAD.requests(), SERVER, step_time)


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    requests = make_requests(np.arange(100_000) * 0.05, [[(i, 20)] for i in range(50)], 4)
    simulate(requests, SERVER, STEP_TIME, on_progress=lambda ended, total: seen.append((ended, total)))
    assert seen
    assert all(0 < ended <= total == 100_000 for ended, total in seen)
