"""Planted numbers come back from simulated experiments, and the frozen default is what it was."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from planted_runs import PLANTED, simulated

from stepcal.calibration.closed_loop import (
    calibrate,
    interval_jacobian,
    interval_residuals,
    prepare_runs,
    run_latencies_s,
    workload_residuals,
)
from stepcal.calibration.optimal_design import rank_next_experiments
from stepcal.calibration.robust import soft, soft_slope
from stepcal.calibration.training_rows import request_level, training_rows
from stepcal.calibration.uncertainty import parameter_table, singular_values
from stepcal.datasets import experiments, have_traces, load_requests
from stepcal.errors import InputError
from stepcal.evaluation.cross_validation import LEAVE_OUT, compare_runs, errors_by_run, folds
from stepcal.locations import data_folder
from stepcal.reconstruction.timeline import decode_intervals
from stepcal.simulator import simulate
from stepcal.step_time.coefficients import (
    FROZEN,
    PHYSICAL_DEFAULT,
    frozen_default_sha256,
    frozen_values,
    load_coefficients,
)
from stepcal.step_time.physical_parameters import PARAMETERS, as_array, by_name
from stepcal.studies.physical_model import first_requests, request_scores
from stepcal.studies.published_runs import load_experiments


@pytest.fixture(scope="module")
def planted():
    own = [simulated(e, PLANTED) for e in load_experiments() if not e.overloaded]
    table = pd.concat([e.requests for e in own], ignore_index=True)
    runs = experiments()
    runs = runs[runs["experiment_id"].isin(table["experiment_id"])]
    return prepare_runs(own), request_level(decode_intervals(table, runs), own)


@pytest.fixture(scope="module")
def fitted(planted):
    runs, level = planted
    rows = training_rows(level)
    return calibrate(runs=runs, level=rows, start=calibrate(level=rows).values)


def test_at_the_truth_nothing_is_left(planted):
    runs, _ = planted
    assert np.abs(workload_residuals(runs, PLANTED)[0]).max() < 0.01  # sigmas; arrivals are rounded to microseconds


def test_planted_numbers_come_back(fitted):
    found = {name: value / PLANTED[name] for name, value in fitted.values.items()}
    for name, ratio in found.items():
        if name not in (
            "mixed_layer_us",
            "offload_scan_us",
            "kv_block_ns",
        ):  # few prompts, no rejections, one block size
            assert ratio == pytest.approx(1.0, abs=0.1 if name == "collective_us" else 0.05), name
    assert fitted.level == "joint"


def test_latencies_of_planted_runs_come_back(planted, fitted):
    runs, _ = planted
    errors = errors_by_run(compare_runs(runs, fitted.values, "default"), runs, "whole")
    assert errors["e2e_error_percent"].abs().max() < 0.3


def test_the_same_input_gives_the_same_numbers(planted):
    rows = training_rows(planted[1])
    assert calibrate(level=rows).values == calibrate(level=rows).values


def test_the_interval_jacobian_is_the_derivative(planted):
    rows = training_rows(planted[1])
    x = np.log(as_array(PLANTED) * 1.05)
    jacobian = interval_jacobian(rows, by_name(np.exp(x)))
    for j in range(x.size):
        step = np.zeros(x.size)
        step[j] = 1e-5
        up, down = (interval_residuals(rows, by_name(np.exp(x + sign * step))) for sign in (1.0, -1.0))
        slope = (up - down) / 2e-5
        assert np.allclose(jacobian[:, j], slope, rtol=1e-3, atol=1e-6)


def test_soft_residuals_are_quadratic_then_linear():
    assert soft(np.array([0.01, -0.01])) == pytest.approx([0.01, -0.01], rel=1e-4)
    assert soft(np.array([200.0]))[0] ** 2 == pytest.approx(2 * 2.0 * 200.0, rel=0.02)
    x = np.array([-7.0, -1.0, 0.0, 1e-6, 0.3, 40.0])
    assert soft_slope(x) == pytest.approx((soft(x + 1e-6) - soft(x - 1e-6)) / 2e-6, rel=1e-4)


def test_validation_and_test_requests_are_not_fitted(planted):
    rows = training_rows(planted[1]).rows
    assert set(rows["split"]) == {"train"}


def test_what_an_interval_and_a_singular_value_say(fitted):
    table, draws = parameter_table(fitted)
    known = table[table["identified"]]
    assert (known["low"] <= known["value"] * 1.01).all()
    assert (known["value"] <= known["high"]).all()
    assert {"hbm_read_factor", "layer_us"} <= set(known["name"])
    assert draws.shape[1] == len(PARAMETERS)
    assert singular_values(fitted)["singular_value"].is_monotonic_decreasing
    assert rank_next_experiments(fitted)["gain_nats"].is_monotonic_decreasing


def test_folds_never_judge_what_they_fitted(planted):
    runs, level = planted
    assert {f.leave_out for kind in LEAVE_OUT for f in folds(runs, kind)} == set(LEAVE_OUT)
    for kind in ("workload", "model"):
        judged = [name for f in folds(runs, kind) for name in f.judged]
        assert sorted(judged) == sorted(r.experiment.experiment_id for r in runs)
        assert all(not set(f.train) & set(f.judged) for f in folds(runs, kind))
    (stage,) = folds(runs, "stage")
    assert stage.only_stage == 0
    assert set(request_scores(level, PLANTED)["split"]) >= {"train", "valid", "test"}


def test_nothing_to_fit_is_refused():
    with pytest.raises(InputError, match="nothing to fit"):
        calibrate()


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_coefficients_are_what_was_frozen(name):
    content = (data_folder() / "coefficients" / f"{name}.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == frozen_default_sha256(name)


def test_the_frozen_physical_model_lies_within_its_bounds_and_intervals():
    assert list(frozen_values()) == [p.name for p in PARAMETERS]
    content = (data_folder() / "coefficients" / f"{PHYSICAL_DEFAULT}.json").read_bytes()
    for p, entry in zip(PARAMETERS, json.loads(content)["parameters"], strict=True):
        assert entry["name"] == p.name
        assert p.low <= entry["value"] <= p.high
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_a_changed_default_is_refused(monkeypatch, tmp_path):
    import stepcal.step_time.coefficients as module

    (tmp_path / "coefficients").mkdir()
    for name in ("default.json", "frozen.json"):
        (tmp_path / "coefficients" / name).write_bytes((data_folder() / "coefficients" / name).read_bytes())
    with open(tmp_path / "coefficients" / "default.json", "a", encoding="utf-8") as file:
        file.write(" ")
    monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="was changed after it was frozen"):
        load_coefficients("default")


def test_the_default_drives_a_simulation():
    coefficients = load_coefficients("default")
    assert set(coefficients.api_overheads_us()) == {"api_before_us"}
    e = load_experiments()[0]
    clock = coefficients.compile(e.deployment)
    result = simulate(
        e.workload.requests("poisson", seed=0), e.server, clock, timeout_s=300.0, **coefficients.api_overheads_us()
    )
    measured_s = 2.08  # data/measured.csv, whole run
    assert np.nanmean(result.e2e_us()) / 1e6 == pytest.approx(measured_s, rel=0.05)


@pytest.mark.skipif(not have_traces(), reason="needs the public requests")
def test_the_default_meets_the_figures_of_the_closing_note():
    runs = [run for run in prepare_runs(load_experiments(load_requests())) if not run.experiment.overloaded]
    errors = errors_by_run(compare_runs(runs, frozen_values(), "default"), runs, "whole")
    assert errors["e2e_error_percent"].abs().mean() == pytest.approx(0.598, abs=0.01)
    assert errors["e2e_error_percent"].abs().max() < 2.2
    assert errors["ttft_error_percent"].abs().mean() < 10
    assert errors["tpot_error_percent"].abs().mean() < 2
    assert np.isfinite(run_latencies_s(runs[0], frozen_values())[0]).all()


def test_first_requests_of_a_planted_run_are_explained(planted):
    table = first_requests(planted[0], PLANTED)
    assert len(table) == 12
    assert np.allclose(table["explained_percent"], 100, atol=1)
    assert (table["first_ttft_ms"] > table["later_ttft_ms"]).all()
