"""From latencies to errors: tables against plain pandas, signs, splits, and the experiments as shipped and as published."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcal.datasets import load_requests
from stepcal.errors import InputError
from stepcal.evaluation.latency_errors import compare, judged_error_percent, mean_errors, pace_step_time, training_mean
from stepcal.experiments.experiment import CLIENT_TIMEOUT_S, Experiment, run_experiment
from stepcal.experiments.folders import read_experiment_folder
from stepcal.experiments.latencies import (
    LATENCIES,
    TEST,
    WHOLE,
    latency_summary,
    latency_table,
    measured_latencies,
    predicted_latencies,
    summary_latencies,
)
from stepcal.simulator import CompiledStepTime, LoadStage, ServerConfig, Workload
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.studies.published_runs import load_experiments

WORKLOAD = Workload(
    n_groups=2,
    n_prompts_per_group=3,
    system_prompt_len=20,
    question_len=30,
    output_len=11,
    stages=(LoadStage(4.0, 5.0), LoadStage(8.0, 5.0)),
    timeout_s=CLIENT_TIMEOUT_S,
)


def some_requests(n: int = 60, *, failed: tuple[int, ...] = (), seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    has_error = np.isin(np.arange(n), failed)
    ttft = np.where(has_error, np.nan, rng.uniform(0.01, 0.1, n))
    return pd.DataFrame(
        {
            "experiment_id": "run-a",
            "index": np.arange(n),
            "arrival_time_us": np.sort(rng.integers(0, 10_000_000, n)),
            "prompt_tokens": np.where(has_error, 0, 50),
            "output_tokens": np.where(has_error, 0, 11),
            "has_error": has_error,
            "e2e_s": np.where(has_error, 300.0, ttft + rng.uniform(0.1, 0.5, n)),
            "ttft_s": ttft,
        }
    )


def an_experiment(requests: pd.DataFrame | None = None, **changes: object) -> Experiment:
    plain = Experiment(
        experiment_id="run-a",
        deployment=Deployment(
            load_architecture("llama-2-7b"),
            load_accelerator("h100-sxm"),
            1,
            ServerConfig(kv_blocks=500, max_num_seqs=8, max_num_batched_tokens=64),
        ),
        workload=WORKLOAD,
        overloaded=False,
        requests=requests,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def by_key(table: pd.DataFrame) -> pd.Series:
    return table.set_index(["split", "metric", "statistic"])["value"]


LATENCY = st.one_of(st.just(float("nan")), st.floats(0.01, 300.0))


@given(e2e=st.lists(LATENCY, min_size=1, max_size=50), seed=st.integers(0, 9), output=st.integers(1, 40))
def test_the_latency_table_is_what_pandas_says(e2e: list[float], seed: int, output: int) -> None:
    rng = np.random.default_rng(seed)
    n = len(e2e)
    table = pd.DataFrame({"e2e": e2e, "ttft": np.array(e2e) * rng.uniform(0.1, 0.9, n)})
    table["tpot"] = (table["e2e"] - table["ttft"]) / max(output - 1, 1)
    stage = np.sort(rng.integers(0, 3, n))
    found = by_key(latency_table(table["e2e"].to_numpy(), table["ttft"].to_numpy(), output, stage))
    parts = {WHOLE: table, TEST: table.iloc[round(0.6 * n) + round(0.2 * n) :]}
    if len(set(stage)) > 1:
        parts |= {f"stage {s}": table[stage == s] for s in set(stage.tolist())}
    assert set(found.index.get_level_values("split")) == set(parts)
    for split, rows in parts.items():
        done = rows.dropna()
        assert found[split, "completed", "count"] == len(done)
        assert found[split, "failed", "count"] == len(rows) - len(done)
        for metric in LATENCIES:
            ms = done[metric] * 1000
            expected = {"mean": ms.mean(), "p50": ms.median(), "p90": ms.quantile(0.9), "p99": ms.quantile(0.99)}
            for statistic, value in expected.items():
                assert found[split, metric, statistic] == pytest.approx(value, rel=1e-9, nan_ok=True)


def test_a_split_without_a_completed_request_is_not_evaluable() -> None:
    """As in the overloaded runs, where nothing completed in the last fifth of arrivals."""
    e2e = np.where(np.arange(10) < 8, 1.0, np.nan)
    known = latency_table(e2e, e2e / 2, 5, np.zeros(10, int))
    compared = compare(latency_table(np.ones(10), np.ones(10) / 2, 5, np.zeros(10, int)), known)
    errors = by_key(compared.assign(value=compared["error_percent"]))
    assert errors[WHOLE, "e2e", "mean"] == 0.0
    assert np.isnan(errors[TEST, "e2e", "mean"])
    assert np.isnan(errors[TEST, "completed", "count"])
    about = compared.assign(experiment_id="run-a", variant="v", arrivals="replayed")
    assert mean_errors(about, WHOLE)["e2e_error_percent"].tolist() == [0.0]
    assert mean_errors(about, TEST).empty, "there is nothing to say of it"
    summary = latency_summary(known, TEST)
    assert (summary["requests"], summary["completed"], summary["failed"]) == (2, 0, 2)
    assert set(summary["e2e_ms"].values()) == {None}


def test_errors_are_signed_and_relative_to_the_measurement() -> None:
    stage = np.zeros(4, int)
    known = latency_table(np.full(4, 2.0), np.full(4, 0.5), 4, stage)
    predicted = latency_table(np.array([1.0, 1.0, 1.0, np.nan]), np.full(4, 0.75), 4, stage)
    compared = compare(predicted, known)
    assert list(compared) == ["split", "metric", "statistic", "predicted", "measured", "error_percent"]
    about = compared.assign(experiment_id="run-a", variant="v", arrivals="replayed")
    (row,) = mean_errors(about).to_dict("records")
    assert row["e2e_error_percent"] == pytest.approx(-50.0)
    assert row["ttft_error_percent"] == pytest.approx(+50.0)
    assert row["tpot_error_percent"] == pytest.approx(100 * (0.25 / 3 - 0.5) / 0.5)
    assert row["completed_error_percent"] == pytest.approx(-25.0)


def test_mean_errors_keep_experiments_and_variants_apart() -> None:
    stage = np.zeros(4, int)
    known = latency_table(np.full(4, 2.0), np.full(4, 0.5), 4, stage)
    parts = []
    for experiment, variant, factor in (("b", "v", 1.5), ("a", "v", 0.5), ("b", "w", 1.0)):
        compared = compare(latency_table(np.full(4, 2.0 * factor), np.full(4, 0.5), 4, stage), known)
        parts.append(compared.assign(experiment_id=experiment, variant=variant, arrivals="replayed"))
    errors = mean_errors(pd.concat(parts)).set_index(["experiment_id", "variant"])["e2e_error_percent"]
    assert errors.to_dict() == {("b", "v"): 50.0, ("a", "v"): -50.0, ("b", "w"): 0.0}


def test_an_overloaded_run_is_judged_by_its_completions_too() -> None:
    errors = pd.DataFrame(
        {
            "experiment_id": ["calm", "calm", "full", "full", "full"],
            "e2e_error_percent": [-5.0, np.nan, -5.0, 30.0, np.nan],
            "completed_error_percent": [50.0, 0.0, -40.0, 2.0, -100.0],
        }
    )
    judged = judged_error_percent(errors, {"calm": False, "full": True})
    np.testing.assert_array_equal(judged, [5.0, np.nan, 40.0, 30.0, 100.0])


def test_failed_requests_do_not_count_as_latencies() -> None:
    requests = some_requests(failed=(3, 50))
    known = by_key(measured_latencies(an_experiment(requests)))
    done = requests[~requests["has_error"]]
    assert known[WHOLE, "failed", "count"] == 2
    assert known[TEST, "failed", "count"] == 1
    assert known[WHOLE, "e2e", "mean"] == pytest.approx(done["e2e_s"].mean() * 1000)
    assert known[WHOLE, "tpot", "mean"] == pytest.approx(((done["e2e_s"] - done["ttft_s"]) / 10).mean() * 1000)
    assert known["stage 0", "completed", "count"] == 19, "the workload's first stage sends 20, of which one failed"


def test_the_yardsticks_see_the_first_60_percent_of_arrivals_only() -> None:
    requests = some_requests(failed=(3, 50))
    changed = requests.copy()
    late = changed.index >= 36
    changed.loc[late, ["e2e_s", "ttft_s"]] = [222.0, 111.0]
    changed.loc[changed.index == 40, "has_error"] = True
    one, other = an_experiment(requests), an_experiment(changed)
    pd.testing.assert_frame_equal(training_mean(one), training_mean(other))
    assert pace_step_time(one) == pace_step_time(other)
    early = requests.iloc[:36]
    early = early[~early["has_error"]]
    means = by_key(training_mean(one))
    for split in (WHOLE, TEST, "stage 0", "stage 1"):
        assert means[split, "e2e", "mean"] == pytest.approx(early["e2e_s"].mean() * 1000)
        assert means[split, "ttft", "mean"] == pytest.approx(early["ttft_s"].mean() * 1000)
    pace_us = ((early["e2e_s"] - early["ttft_s"]) / 10).mean() * 1e6
    assert pace_step_time(one).constant_us == pytest.approx(pace_us)
    assert means[WHOLE, "tpot", "mean"] == pytest.approx(pace_us / 1000)
    spoiled = requests.assign(e2e_s=requests["e2e_s"].where(requests.index != 35, 99.0))
    assert pace_step_time(an_experiment(spoiled)) != pace_step_time(one), "row 35 is the last of the first 60 percent"


def test_what_needs_requests_says_so() -> None:
    bare = an_experiment()
    for needs in (training_mean, pace_step_time):
        with pytest.raises(InputError, match=r"requests of `run-a` are not at hand.*STEPCAL_DATA"):
            needs(bare)
    with pytest.raises(InputError, match=r"`run-a`.*cannot be replayed.*`poisson`"):
        bare.arrivals("replayed")
    with pytest.raises(InputError, match=r"`process` is 'bursts'; it must be one of constant, gamma, poisson"):
        bare.arrivals("bursts")


def test_predictions_are_the_simulations_latencies() -> None:
    experiment = an_experiment(some_requests(failed=(3, 50)))
    result = run_experiment(experiment, CompiledStepTime(constant_us=20_000.0))
    predicted = by_key(predicted_latencies(result, 11))
    overall = result.summary()["overall"]
    assert predicted[WHOLE, "completed", "count"] == overall["completed"] == 60, (
        "all are served, also those that failed"
    )
    for metric, key in (("e2e", "e2e_ms"), ("ttft", "ttft_ms"), ("tpot", "tpot_ms")):
        for statistic in ("mean", "p50", "p90", "p99"):
            assert predicted[WHOLE, metric, statistic] == pytest.approx(overall[key][statistic], rel=1e-9)
    assert predicted["stage 0", "completed", "count"] == 20


def test_a_client_gives_up_at_the_timeout() -> None:
    experiment = an_experiment(some_requests(), workload=replace(WORKLOAD, timeout_s=0.5))
    result = run_experiment(experiment, CompiledStepTime(constant_us=100_000.0))
    predicted = by_key(predicted_latencies(result, 11))
    assert predicted[WHOLE, "failed", "count"] == 60
    assert np.isnan(predicted[WHOLE, "ttft", "mean"]), "a first token of a request that failed is no latency"


def test_generated_arrivals_follow_the_seed() -> None:
    experiment, clock = an_experiment(), CompiledStepTime(constant_us=20_000.0)
    runs = [run_experiment(experiment, clock, process="poisson", seed=seed).rows.tobytes() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def summaries(stages: tuple[int, ...], completed: float = 5.0) -> pd.DataFrame:
    rows = []
    for stage in stages:
        rows += [(stage, "requests", "completed", completed), (stage, "requests", "failed", 2.0)]
        rows += [(stage, "requests", "requested", 7.0)]
        if completed:
            rows += [(stage, "e2e", "mean", 500.0), (stage, "e2e", "p99", 900.0), (stage, "ttft", "mean", 100.0)]
            rows += [(stage, "tpot", "mean", 1.0), (stage, "itl", "mean", 1.0)]
    return pd.DataFrame(rows, columns=["stage", "metric", "statistic", "value"])


def test_summaries_take_the_shape_of_the_latency_table() -> None:
    table = by_key(summary_latencies(summaries((-1, 0, 1)), 11))
    assert set(table.index.get_level_values("split")) == {WHOLE, "stage 0", "stage 1"}
    assert table[WHOLE, "tpot", "mean"] == 40.0, "from the means, not from stream events"
    assert table[WHOLE, "completed", "count"] == 5
    assert table["stage 1", "e2e", "p99"] == 900.0
    assert {"itl"}.isdisjoint(table.index.get_level_values("metric"))
    assert set(summary_latencies(summaries((-1, 0)), 11)["split"]) == {WHOLE}, "one stage is the whole run"


def test_summaries_of_a_run_in_which_nothing_completed() -> None:
    table = summary_latencies(summaries((-1,), completed=0.0), 11)
    summary = latency_summary(table, WHOLE)
    assert (summary["completed"], summary["failed"]) == (0, 2)
    assert set(summary["tpot_ms"].values()) == {None}


def test_a_latency_summary_has_the_shape_of_simulate() -> None:
    table = latency_table(np.array([1.0, np.nan]), np.array([0.5, np.nan]), 6, np.zeros(2, int))
    summary = latency_summary(table, WHOLE, span_s=4.0)
    simulated = run_experiment(an_experiment(some_requests()), CompiledStepTime(constant_us=1e4)).summary()["overall"]
    assert list(summary) == list(simulated)
    for key in ("e2e_ms", "ttft_ms", "itl_ms", "tpot_ms"):
        assert list(summary[key]) == list(simulated[key]) == ["mean", "p50", "p90", "p99"]
    assert summary["requests"] == 2
    assert summary["e2e_ms"]["p90"] == 1000.0
    assert summary["tpot_ms"]["mean"] == summary["itl_ms"]["mean"] == pytest.approx(100.0)
    assert summary["requests_per_s"] == 0.25


def test_shipped_experiments_are_complete() -> None:
    cases = load_experiments()
    assert len({c.experiment_id for c in cases}) == 16
    assert sorted({c.architecture.name for c in cases}) == [
        "codellama-34b",
        "llama-2-70b",
        "llama-2-7b",
        "mixtral-8x7b",
    ]
    assert all(c.requests is None for c in cases)
    assert sum(stage.n_requests for c in cases for stage in c.workload.stages) == 151_200
    assert sum(c.overloaded for c in cases) == 4
    assert all("reasoning" in c.experiment_id for c in cases if c.overloaded)


@pytest.fixture(scope="module")
def real(traces_folder: Path) -> list[Experiment]:
    return load_experiments(load_requests(traces_folder))


def test_shipped_tables_say_what_the_public_folder_says(traces_folder: Path) -> None:
    shipped = {c.experiment_id: c for c in load_experiments()}
    read = read_experiment_folder(traces_folder / "experiments")
    assert [c.experiment_id for c, _ in read] == sorted(shipped)
    for found, known in read:
        expected = shipped[found.experiment_id]
        assert found.requests is not None and len(found.requests) == len(found.arrivals("replayed"))
        for field in fields(Experiment):
            if field.name in ("requests", "notes"):
                continue
            ours, theirs = getattr(found, field.name), getattr(expected, field.name)
            if field.name == "workload":
                # How the client sends stands in the folder only; the cap of 224 x 100 is never reached.
                assert (ours.max_in_flight, ours.stage_interval_s) == (22_400, 1.0)
                ours = replace(ours, max_in_flight=None, stage_interval_s=None)
            assert ours == theirs, (found.experiment_id, field.name)
        ours, theirs = by_key(known), by_key(measured_latencies(expected))
        pd.testing.assert_series_equal(ours.sort_index(), theirs.sort_index(), rtol=1e-12)


def test_requests_and_summaries_tell_the_same_means(real: list[Experiment]) -> None:
    for experiment in real:
        of_requests = by_key(measured_latencies(experiment))
        of_summaries = by_key(measured_latencies(replace(experiment, requests=None)))
        both = of_summaries[of_summaries.index.isin(of_requests.index)]
        assert len(both) == len(of_summaries)
        means = both[both.index.get_level_values("statistic").isin(["mean", "count"])]
        np.testing.assert_allclose(
            of_requests[means.index], means, rtol=5e-3, err_msg=f"{experiment.experiment_id}\n{means}"
        )
        served = both.xs("throughput", level="metric")
        assert len(served) in (1, 3)
        np.testing.assert_allclose(of_requests.xs("throughput", level="metric")[served.index], served, rtol=5e-3)


def test_a_replay_sends_every_measured_request(real: list[Experiment]) -> None:
    assert sum(len(c.arrivals("replayed")) for c in real) == 151_200
    overloaded = next(c for c in real if c.overloaded)
    assert overloaded.requests is not None
    requests = overloaded.arrivals("replayed")
    assert requests.prompt_tokens.min() > 100, "failed rows, with zero lengths in the trace, take those of their prompt"
    failed = int(measured_latencies(overloaded).query("split == 'whole' and metric == 'failed'")["value"].iloc[0])
    assert failed == int(overloaded.requests["has_error"].sum()) > 1000


def test_three_of_the_overloaded_runs_complete_nothing_at_the_end(real: list[Experiment]) -> None:
    empty = 0
    for experiment in real:
        known = by_key(measured_latencies(experiment))
        empty += known[TEST, "completed", "count"] == 0
        assert np.isnan(known[TEST, "e2e", "mean"]) == (known[TEST, "completed", "count"] == 0)
    assert empty == 3
