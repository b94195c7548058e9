"""Steps against the interval between samples: means over the gap recover the truth where the sampled step cannot."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated_requests import TIMEOUT_S, measured_table

from stepcal.calibration.closed_loop import fit_steps
from stepcal.calibration.training_rows import step_features
from stepcal.datasets import experiments
from stepcal.errors import InputError
from stepcal.reconstruction.labelled_steps import (
    FEATURES,
    GAP_MEAN,
    GPU_LAG_STEPS,
    SAMPLED_STEP,
    gap_means,
    labelled_steps,
    rebuilt_steps,
)
from stepcal.reconstruction.labels import step_intervals
from stepcal.simulator import LoadStage, simulate
from stepcal.step_time.physical import PhysicalModel, compile_physical
from stepcal.step_time.physical_parameters import PARAMETERS, priors
from stepcal.studies.physical_model import step_scores
from stepcal.studies.published_runs import load_experiments

NAMES = ("20260217-202857-llama-2-70b-tp4-general", "20260218-150304-codellama-34b-tp2-general")
PRIOR = priors()
PLANTED = {p.name: max(p.low, p.start * (1.08, 0.92)[i % 2]) for i, p in enumerate(PARAMETERS)}
SECONDS = 60.0
BUSY = 10
"""Requests in the batch above which steps are compared: below, a run begins, and its prompts are not cached."""


def simulated(experiment):
    """Measured requests and every step of a shortened run, at the planted numbers, in the form of a trace."""
    stages = tuple(LoadStage(s.rate, SECONDS) for s in experiment.workload.stages)
    workload = replace(experiment.workload, stages=stages)
    result = simulate(
        workload.requests("poisson", seed=3),
        experiment.server,
        compile_physical(PLANTED, experiment.deployment),
        timeout_s=TIMEOUT_S,
        api_before_us=PLANTED["api_before_us"],
        record_steps=1.0,
        experiment_id=experiment.experiment_id,
    )
    requests = measured_table(result, experiment.experiment_id)
    steps = result.step_table().to_pandas()
    # The record has when the GPU began a step; a trace has when the scheduler was called, one step earlier.
    called = steps["ts_start_ns"].shift(GPU_LAG_STEPS)
    steps = steps.assign(ts_start_ns=called, experiment_id=experiment.experiment_id, model=experiment.architecture.name)
    return requests, steps.iloc[GPU_LAG_STEPS:].astype({"ts_start_ns": "int64"})


@pytest.fixture(scope="module")
def world():
    """Experiments, requests, every step, and a tenth of the steps as a trace."""
    chosen = [e for e in load_experiments() if e.experiment_id in NAMES]
    requests, steps = (pd.concat(tables, ignore_index=True) for tables in zip(*map(simulated, chosen), strict=True))
    sampled = steps[np.random.default_rng(5).random(len(steps)) < 0.1]
    return chosen, requests, steps, sampled


@pytest.fixture(scope="module")
def trace(world):
    """Labelled steps of the sample, and all steps rebuilt."""
    _, requests, _, sampled = world
    return labelled_steps(sampled, requests, experiments()), rebuilt_steps(sampled, requests, experiments())


def error_percent(table, values, features):
    predicted = PhysicalModel().predict_us(values, features)
    return 100 * np.abs(predicted / table["interval_us"].to_numpy() - 1.0)


def test_the_truth_is_recovered_from_the_gap_and_not_from_the_sample(world, trace):
    chosen, (table, rebuilt) = world[0], trace
    busy = (table["decode_tokens"] >= BUSY).to_numpy()
    gap = error_percent(table, PLANTED, step_features(table, chosen, rebuilt))[busy]
    sampled = error_percent(table, PLANTED, step_features(table, chosen))[busy]
    assert np.median(gap) < 0.05
    assert np.median(sampled) > 0.3
    assert gap.mean() < 0.5 * sampled.mean()


def test_a_fit_to_the_steps_finds_the_truth_only_in_the_gap(world, trace):
    chosen, (table, rebuilt) = world[0], trace
    test = ((table["split"] == "test") & (table["decode_tokens"] >= BUSY)).to_numpy()
    error = {}
    for kind, every in ((GAP_MEAN, rebuilt), (SAMPLED_STEP, None)):
        features = step_features(table, chosen, every)
        fitted = fit_steps(table, features, chosen)
        assert fitted.level == "step"
        assert fitted.values["api_before_us"] == pytest.approx(PRIOR["api_before_us"]), "no step says anything about it"
        error[kind] = np.median(error_percent(table, fitted.values, features)[test])
        error[kind, "prior"] = np.median(error_percent(table, PRIOR, features)[test])
    assert error[GAP_MEAN] < 0.2 * error[GAP_MEAN, "prior"]
    assert error[GAP_MEAN] < 0.9 * error[SAMPLED_STEP]


def test_rebuilt_steps_are_the_steps_that_ran(world, trace):
    _, _, every, sampled = world
    both = trace[1].merge(every, on=["experiment_id", "step_id"], suffixes=("", "_true"), validate="one_to_one")
    assert len(both) >= sampled.groupby("experiment_id")["step_id"].agg(np.ptp).sum()
    for name, within in (("decode_tokens", 0.02), ("num_prefill_reqs", 0.02), ("kv_tokens", 0.02)):
        true = both["decode_kv_tokens" if name == "kv_tokens" else f"{name}_true"]
        assert both[name].mean() == pytest.approx(true.mean(), rel=within), name
    assert (both["num_prefill_reqs"] == both["num_prefill_reqs_true"]).mean() > 0.95


def test_gap_means_follow_the_gpu():
    rebuilt = pd.DataFrame({"experiment_id": "a", "step_id": np.arange(4, 12), "decode_tokens": np.arange(40, 48)})
    table = pd.DataFrame({"experiment_id": "a", "step_id": [5, 8], "gap_steps": [3, 2], "decode_tokens": 0.0})
    assert gap_means(table, rebuilt)["decode_tokens"].tolist() == [41.0, 43.5], "steps 4 to 6, and 7 and 8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment_id": "b"}, "no steps of `a`"),
        ({"step_id": [4, 5, 6, 8]}, "every step of every gap"),
        ({"step_id": [5, 6, 7, 8]}, "every step of every gap"),
    ],
)
def test_gap_means_refuse_what_they_lack(change, message):
    rebuilt = pd.DataFrame({"experiment_id": "a", "step_id": np.arange(4, 8), "decode_tokens": 1.0}).assign(**change)
    table = pd.DataFrame({"experiment_id": "a", "step_id": [5], "gap_steps": [3]})
    with pytest.raises(InputError, match=message):
        gap_means(table, rebuilt)


def test_a_fit_needs_features_of_the_same_steps(world, trace):
    chosen, (table, _) = world[0], trace
    features = step_features(table, chosen)
    with pytest.raises(InputError, match="one for each step"):
        fit_steps(table.iloc[1:], features, chosen)
    with pytest.raises(InputError, match="nothing to fit"):
        fit_steps(table.assign(split="test"), features, chosen)


class TestScores:
    def test_both_kinds_of_features_and_every_training_set(self, world, trace):
        table, rebuilt = trace
        without = {"llama-2-70b": PRIOR}
        scores = step_scores(table, world[0], PLANTED, without, rebuilt=rebuilt)
        assert tuple(scores["features"].unique()) == FEATURES
        physical = scores[scores["variant"] == "physical"]
        assert set(physical["trained_on"]) == {"all runs", "steps of all runs", "other models"}
        assert set(physical.query("trained_on == 'other models'")["experiment_id"]) == {NAMES[0]}
        assert set(scores.loc[scores["features"] == GAP_MEAN, "label"]) == {"corrected"}
        assert not scores.duplicated(["experiment_id", "label", "features", "trained_on", "variant"]).any()
        own = scores.query("label == 'corrected' and trained_on in ('own run', 'all runs') and variant != 'constant'")
        mape = own.pivot_table(index=["experiment_id", "variant"], columns="features", values="mape_percent")
        assert (mape[GAP_MEAN] < mape[SAMPLED_STEP]).all()

    def test_without_rebuilt_steps_only_the_sampled_ones(self, world, trace):
        scores = step_scores(trace[0], world[0], PLANTED)
        assert scores["features"].unique().tolist() == [SAMPLED_STEP]
        assert set(scores["label"]) == {"corrected", "published"}

    def test_one_model_has_no_others(self, world, trace):
        own = trace[0].query("experiment_id == @NAMES[0]")
        assert "other models" not in set(step_scores(own, world[0], PLANTED)["trained_on"])

    def test_refuses_a_split_with_no_steps(self, world, trace):
        with pytest.raises(InputError, match="split='later'"):
            step_scores(trace[0], world[0], PLANTED, split="later")


def test_gaps_with_a_change_of_load_are_left_out_by_default(world, monkeypatch):
    _, requests, _, sampled = world
    rate = requests.groupby("experiment_id").size()
    stages = pd.DataFrame({"experiment_id": np.repeat(NAMES, 2), "stage": [0, 1, 0, 1], "requests": 200})
    assert (rate > 200).all()
    monkeypatch.setattr("stepcal.reconstruction.labelled_steps.load_stages", lambda: stages)
    runs = experiments()
    kept = labelled_steps(sampled, requests, runs, stage_starts_ns={})
    left = labelled_steps(sampled, requests, runs)
    assert len(kept) - len(left) == len(NAMES)
    lost = kept.merge(left[["experiment_id", "step_id"]], how="left", indicator=True).query("_merge == 'left_only'")
    intervals = step_intervals(sampled).set_index(["experiment_id", "step_id"])
    arrival = requests.groupby("experiment_id")["arrival_time_us"].nth(200).to_numpy() * 1e3
    begin = lost["ts_start_ns"].to_numpy(dtype=float)
    length = intervals.loc[list(zip(lost["experiment_id"], lost["step_id"], strict=True))]
    end = begin + 1e3 * (length["interval_us"] * length["gap_steps"]).to_numpy()
    # The clock is only known to within a step.
    assert ((begin - 30e6 < arrival) & (arrival < end + 30e6)).all()
