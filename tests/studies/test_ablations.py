"""Variants of the physical model: judged as the default is, chosen by the rule, compared on data of a known form."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stepcal.calibration.closed_loop import calibrate, prepare_runs, run_latencies_s
from stepcal.calibration.training_rows import RequestLevel, request_level
from stepcal.datasets import experiments, measured
from stepcal.errors import InputError
from stepcal.evaluation.cross_validation import compare_runs, errors_by_run
from stepcal.reconstruction.timeline import decode_intervals
from stepcal.simulator import LoadStage, StepBatch, simulate
from stepcal.step_time.physical import PhysicalFeatures, batch_features, compile_physical, physical_features
from stepcal.step_time.physical_parameters import PARAMETERS, STEP_PARAMETERS, by_name
from stepcal.studies.ablation_scores import (
    MIN_GAIN_POINTS,
    Fitted,
    choose,
    compile_variant,
    errors_of,
    split_errors,
    summarise,
)
from stepcal.studies.ablations import fit_model, is_informed_by_data, numbers_table, summary_runs
from stepcal.studies.diagnosis.controlled import CACHED_PROMPTS, NEW_PROMPTS, sums_against_requests
from stepcal.studies.model_forms import FORMS, PHASES, SHIPPED, SUPPORTED, compare_forms, fit_form
from stepcal.studies.published_runs import load_experiments

VALUES = by_name([1.1, 3.0, 40.0, 45.0, 5.0, 1.8, 14.0, 6.0, 0.08, 7_000.0])
SLOWER = VALUES | {"hbm_read_factor": 1.05 * VALUES["hbm_read_factor"]}
LLAMA = "20260217-155451-llama-2-7b-tp1-codegen"
CODELLAMA = "20260218-150304-codellama-34b-tp2-general"
SUM = next(form for form in FORMS if form.name == "sum_weights_gemm")


def simulated(experiment):
    """The experiment, shortened, with what a simulation measures in place of what clients did."""
    stages = tuple(LoadStage(s.rate, 100.0) for s in experiment.workload.stages)
    experiment = replace(experiment, workload=replace(experiment.workload, stages=stages))
    step_time = compile_physical(VALUES, experiment.deployment)
    requests = experiment.workload.requests("poisson", seed=3)
    api_us = VALUES["api_before_us"]
    result = simulate(requests, experiment.server, step_time, timeout_s=300.0, api_before_us=api_us).request_table()
    columns = {
        "experiment_id": experiment.experiment_id,
        "index": np.arange(len(result)),
        "arrival_time_us": np.rint(result["arrival_s"] * 1e6).astype(int),
        "has_error": result["e2e_s"].isna(),
        "e2e_s": result["e2e_s"].fillna(300.0),
        "ttft_s": result["ttft_s"].fillna(300.0),
    }
    return replace(experiment, requests=result[["prompt_tokens", "output_tokens"]].assign(**columns))


@pytest.fixture(scope="module")
def known():
    own = [simulated(e) for e in load_experiments() if e.experiment_id in (LLAMA, CODELLAMA)]
    table = pd.concat([e.requests for e in own], ignore_index=True)
    chosen = experiments()[experiments()["experiment_id"].isin(table["experiment_id"])]
    return prepare_runs(own), request_level(decode_intervals(table, chosen), own)


def variant(values, *models, form=SHIPPED):
    return Fitted("ours", "", len(values), dict.fromkeys(models or ("llama-2-7b", "codellama-34b"), values), form)


def test_the_truth_has_no_error_and_a_slower_memory_has_one(known):
    right, wrong = (errors_of(variant(values), *known) for values in (VALUES, SLOWER))
    assert right[["e2e_percent", "ttft_percent", "tpot_percent", "completed_percent"]].abs().max().max() < 0.05
    assert (wrong["e2e_percent"] > 1).all()


def test_test_part_and_whole_run_are_judged_as_the_default_is(known):
    runs, level = known
    comparisons, ours = compare_runs(runs, SLOWER, "ours"), errors_of(variant(SLOWER), runs, level)
    for split in ("test", "whole"):
        theirs = errors_by_run(comparisons, runs, split).set_index("experiment_id")
        mine = ours[ours["split"] == split].set_index("experiment_id").reindex(theirs.index)
        for name in ("e2e", "ttft", "tpot", "completed"):
            assert mine[f"{name}_percent"].to_numpy() == pytest.approx(
                theirs[f"{name}_error_percent"].to_numpy(), abs=1e-9
            )


def test_training_validation_and_test_share_the_completions(known):
    run = known[0][0]
    e2e, ttft = run_latencies_s(run, VALUES)
    lost = np.where(np.arange(e2e.size) < e2e.size // 2, np.nan, e2e)
    errors = split_errors(run, lost, ttft)
    assert errors["train"]["completed_percent"] == pytest.approx(-100 * 0.5 / 0.6, abs=0.2)
    assert errors["valid"]["completed_percent"] == errors["test"]["completed_percent"] == 0.0


def test_without_requests_nothing_can_be_judged(known):
    run = known[0][0]
    e2e, ttft = run_latencies_s(run, VALUES)
    with pytest.raises(InputError, match="are not at hand"):
        split_errors(replace(run, experiment=replace(run.experiment, requests=None)), e2e, ttft)


def test_numbers_of_one_model_predict_no_other(known):
    with pytest.raises(InputError, match="no numbers for `codellama-34b`; it was fitted to llama-2-7b"):
        errors_of(variant(VALUES, "llama-2-7b"), *known)


def test_a_model_alone_learns_what_its_runs_tell_and_no_more(known):
    fitted = fit_model("llama-2-7b", *known)
    names = np.array([p.name for p in PARAMETERS])
    silent = {"mixture_layer_us", "collective_us", "collective_bytes_factor", "offload_scan_us"}
    assert set(names[~is_informed_by_data(fitted)]) == silent  # dense, one rank, nothing rejected
    assert fitted.values["layer_us"] == pytest.approx(40.0, rel=0.1)
    table = numbers_table({"joint": fitted, "again": fitted})
    assert (table["sigmas"] == 0).all()
    assert table["agrees"].all()


@pytest.mark.parametrize(("gain", "preferred"), [(MIN_GAIN_POINTS, "global"), (MIN_GAIN_POINTS + 0.01, "variant")])
def test_more_numbers_are_preferred_only_if_they_gain_enough(gain, preferred):
    scores = pd.DataFrame({"fit": ["global", "more"] * 2, "split": ["valid"] * 2 + ["test"] * 2})
    scores["e2e_percent"] = [2.0, 2.0 - gain, 9.0, 1.0]  # the test part has no say
    (row,) = choose(scores, {"global": 9, "more": 30}, [("more", "global")]).to_dict("records")
    assert row["preferred"] == preferred
    assert row["gain_points"] == pytest.approx(gain)


def test_a_summary_leaves_out_what_did_not_complete():
    row = {"fit": "f", "split": "valid", "ttft_percent": 1.0, "tpot_percent": 1.0, "interval_mape_percent": 1.0}
    errors = pd.DataFrame(
        [
            row | {"overloaded": False, "e2e_percent": -2.0, "completed_percent": 0.0},
            row | {"overloaded": True, "e2e_percent": 6.0, "completed_percent": -10.0},
            row | {"overloaded": True, "e2e_percent": np.nan, "completed_percent": np.nan},
        ]
    )
    found = summarise(errors).iloc[0]
    assert (found["e2e_percent"], found["e2e_all_percent"], found["mspe_percent"]) == (2.0, 4.0, 2.0)
    assert (found["completed_percent"], found["n_completed"], found["n_all"]) == (10.0, 1, 2)


def test_phases_with_the_same_numbers_are_the_global_model(known):
    runs, level = known
    same = SLOWER | {"mixed_hbm_read_factor": SLOWER["hbm_read_factor"], "mixed_request_us": SLOWER["request_us"]}
    theirs, ours = errors_of(variant(SLOWER), runs, level), errors_of(variant(same, form=PHASES), runs, level)
    pd.testing.assert_frame_equal(theirs, ours, rtol=1e-9)


@pytest.mark.parametrize("prefill", [[], [120]])
def test_the_step_time_of_phases_is_its_form(prefill):
    experiment = next(e for e in load_experiments() if e.experiment_id == CODELLAMA)
    values = VALUES | {"mixed_hbm_read_factor": 1.4, "mixed_request_us": 25.0}
    chunk = np.array(prefill, dtype=np.int32)
    batch = StepBatch(chunk, chunk + 32, np.full(40, 500, dtype=np.int32), 0)
    rows = batch_features(batch, experiment.deployment)
    phases, base = (
        compile_variant(variant(values, form=PHASES), experiment),
        compile_variant(variant(VALUES), experiment),
    )
    change = PHASES.predict_us(values, rows)[0] - SHIPPED.predict_us(values, rows)[0]
    prefilled = len(prefill) * (values["mixed_request_us"] - values["request_us"])  # costs as elsewhere once compiled
    assert sum(phases(batch).values()) - sum(base(batch).values()) == pytest.approx(change - prefilled, abs=1e-6)
    assert (change > 0) == bool(prefill)


def made_level(form, values):
    """Intervals of a form on invented batches of all 16 servers, without noise."""
    rows, parts = [], []
    rng = np.random.default_rng(5)
    for e in load_experiments():
        n = 200
        batch = rng.integers(2, 128, n).astype(float)
        parts.append(
            physical_features(
                e.deployment,
                decode_requests=batch,
                kv_tokens=batch * rng.integers(300, 1500, n),
                prefill_requests=rng.uniform(0, 0.4, n),
                prefill_tokens=rng.uniform(0, 20, n),
            )
        )
        about = {"experiment_id": e.experiment_id, "overloaded": e.overloaded}
        rows.append(pd.DataFrame({**about, "split": np.where(np.arange(n) < 120, "train", "valid")}))
    features = PhysicalFeatures.joined(parts)
    return RequestLevel(
        pd.concat(rows, ignore_index=True).assign(interval_us=form.predict_us(values, features)), features
    )


def test_the_form_that_made_the_data_is_the_one_supported():
    table, values = compare_forms(made_level(SUM, VALUES), (SHIPPED, SUM))
    assert table.set_index("form").loc[SUM.name, "verdict"] == SUPPORTED
    found = values[values["form"] == SUM.name].set_index("name")["value"]
    assert found["layer_us"] == pytest.approx(40.0, rel=0.05)


def test_no_alternative_is_supported_on_data_of_the_shipped_form():
    table, _ = compare_forms(made_level(SHIPPED, VALUES))
    verdicts = table.set_index("form")["verdict"]
    assert SUPPORTED not in set(verdicts)
    assert verdicts["sum_weights_gemm"] == "contradicted"
    assert verdicts["no_offload"] == "cannot tell"  # nothing is rejected in these batches


def test_the_shipped_form_is_fitted_as_the_request_level_is(known):
    level = known[1]
    train = level.subset((level.rows["split"] == "train").to_numpy())
    whole = calibrate(level=train).values
    for name, value in fit_form(SHIPPED, train).values.items():
        assert value == pytest.approx(whole[name], rel=0.05), name
    with pytest.raises(InputError, match="no request to fit"):
        fit_form(SHIPPED, level.subset(np.zeros(len(level.rows), dtype=bool)))


def test_sums_miss_cached_contexts_and_lose_little_of_the_step():
    one = [e for e in load_experiments() if e.experiment_id == CODELLAMA]
    table = sums_against_requests(one).set_index("prompts")
    assert table.loc[CACHED_PROMPTS, "pairs_ratio"] < 0.9  # a chunk attends to the cached prefix, which P^2 / 2 misses
    assert table.loc[NEW_PROMPTS, "pairs_ratio"] > 1.0  # prompts that share a step do not attend to each other
    assert table["mixed_percent"].between(0.001, 1.0).all()
    assert (table["rounding_percent"] < 0.1).all()


def test_summaries_are_enough_to_calibrate():
    runs = summary_runs(load_experiments())
    known = measured().set_index(["experiment_id", "stage", "metric", "statistic"])["value"]
    for run in runs:
        name = run.experiment.experiment_id
        assert run.experiment.requests is None
        assert run.experiment.workload.prompt_len == round(known[name, -1, "prompt_len", "p50"])
        for target in run.targets:
            assert target.values["e2e"] == pytest.approx(known[name, target.stage, "e2e", "mean"] / 1e3)
            assert target.values["completed"] <= target.chosen.sum()
    own = [run for run in runs if run.experiment.experiment_id == LLAMA]
    fitted = calibrate(runs=own)
    assert fitted.level == "workload"
    e2e, _ = run_latencies_s(own[0], fitted.values)
    assert e2e.mean() == pytest.approx(known[LLAMA, -1, "e2e", "mean"] / 1e3, rel=0.02)


def test_an_experiment_without_summaries_is_refused():
    unknown = replace(load_experiments()[0], experiment_id="mine")
    with pytest.raises(InputError, match=r"measured\.csv has no figures of `mine`"):
        summary_runs([unknown])


def test_forms_have_a_number_for_every_parameter():
    for form in (*FORMS, PHASES):
        assert form.parameters[: len(STEP_PARAMETERS)] == STEP_PARAMETERS
        assert len({p.name for p in form.parameters}) == len(form.parameters)
