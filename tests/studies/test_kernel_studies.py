"""The kernel model's studies: the recordings are what is computed today, H4 takes only runs that had not been seen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from run_folders import SERVER, write_run

from stepcal.calibration.closed_loop import calibrate, prepare_runs
from stepcal.datasets import experiments, load_requests, transfer_runs
from stepcal.evaluation.preregistration import load_preregistration
from stepcal.evaluation.verdict import judge
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.coefficients import load_coefficients
from stepcal.step_time.kernel_model import compile_kernels
from stepcal.step_time.learned import KERNELS
from stepcal.studies import registry as studies
from stepcal.studies.kernels import kernel_tables, kernel_transfer, kernel_uncertainty, transfer
from stepcal.studies.kernels.evidence_kernels import NO_TABLES, SEEN, h4_evidence, h4_variant
from stepcal.studies.published_runs import load_experiments
from stepcal.studies.verdicts import verdict_of

FASTEST = "26-llama-3-1-8b-tp2-general-2"


@pytest.fixture(scope="module")
def on_the_31():
    return studies.load_study(studies.KERNEL_TRANSFER)


def test_a_recorded_error_is_what_the_simulator_gives_today(on_the_31):
    again = transfer.transfer_errors(load_coefficients("default"), transfer.transfer_cases((FASTEST,)))
    keys = ["split", "metric", "statistic"]
    recorded = on_the_31["errors"].query("experiment_id == @FASTEST").set_index(keys)["error_percent"]
    assert np.allclose(recorded, again.set_index(keys)["error_percent"].reindex(recorded.index), rtol=1e-6)


def test_the_rules_of_h4_are_judged_on_all_31_post_hoc(on_the_31):
    judged = judge(load_preregistration("h4"), on_the_31["evidence"])
    assert all(r.met is not None for r in judged.criteria)
    units = on_the_31["evidence"].groupby("variant")["unit"].nunique()
    assert units.to_dict() == {
        "kernel_against_predecessor": 31, "kernel_fp8": 3, "kernel_h100": 25, "kernel_other_gpu": 3,
    }  # fmt: skip


def test_h4_waits_for_runs():
    verdict, provenance = verdict_of("h4")
    assert verdict.verdict == "Not evaluated"
    assert provenance.kind == "none"


def test_runs_that_had_been_seen_do_not_count(tmp_path):
    write_run(tmp_path, FASTEST, server=SERVER | {"gpu": "h100-sxm"})
    write_run(tmp_path, "new-h100", server=SERVER | {"gpu": "h100-sxm"})
    write_run(tmp_path, "new-nvl", server=SERVER | {"gpu": "h100-nvl"})
    seen = set(experiments()["experiment_id"]) | set(transfer_runs()["experiment_id"])
    by_run = h4_evidence(tmp_path, seen).groupby("unit")["variant"].unique().map(set)
    assert by_run[FASTEST] == {SEEN}
    assert by_run["new-h100"] == {"kernel_h100", "kernel_against_predecessor"}
    assert NO_TABLES in by_run["new-nvl"]
    assert h4_variant(Deployment(load_architecture("llama-2-7b"), load_accelerator("gb300"))) == "kernel_other_gpu"


def test_every_ablation_changes_what_it_takes_away(on_the_31):
    table = kernel_transfer.ablation_summary(on_the_31.tables).set_index("variant")
    frozen = table.loc[kernel_transfer.FROZEN]
    assert (table.drop(kernel_transfer.FROZEN)["all 31"] > frozen["all 31"]).all()
    even = on_the_31["ablations"].query("variant == 'even routing' and metric == 'e2e'").set_index("experiment_id")
    same = on_the_31["ablations"].query("variant == 'frozen' and metric == 'e2e'").set_index("experiment_id")
    dense = even.index.str.contains("llama-3|qwen|codellama|nemo|llama-2")
    moved = (even["error_percent"] - same["error_percent"]).abs()
    assert moved[~dense].max() > 1.0
    assert moved[dense].max() < 1.0, "a dense model has no routing; only the number of seeds differs"


def test_intervals_widen_with_the_queue_and_hold_most_measurements():
    table = studies.load_study(studies.KERNEL_UNCERTAINTY)["intervals"]
    assert len(table) == 47
    half = np.log(table["high_ms"] / table["low_ms"]) / 2
    sd = table["amplification"] * np.hypot(table["kernel_log_sd"], table["left_out_log_sd"])
    assert np.allclose(half, 1.959964 * sd, rtol=1e-5, atol=1e-12)
    inside = (table["low_ms"] <= table["measured_ms"]) & (table["measured_ms"] <= table["high_ms"])
    assert (inside == table["is_inside"]).all()
    assert kernel_uncertainty.coverage(table).iloc[-1]["inside"] == inside.sum()


def test_a_slower_gpu_leaves_the_host_alone():
    server = load_experiments()[0].deployment
    step_time = compile_kernels(load_coefficients("default").values, server)
    slower = kernel_uncertainty.scaled(step_time, 1.1)
    assert np.allclose(slower.tokens_us, 1.1 * np.asarray(step_time.tokens_us))
    assert slower.kv_us == pytest.approx(1.1 * step_time.kv_us)
    assert slower.host_requests_us == step_time.host_requests_us


def test_the_frozen_parameters_predict_what_those_of_a_converged_fit_do(traces_folder):
    """They were frozen before fits ran to convergence: small terms trade, what is predicted stays."""
    from stepcal.calibration.closed_loop import run_latencies_s

    table = studies.load_study(studies.KERNEL_MODEL)["parameters"]
    frozen = load_coefficients("default").values
    assert dict(zip(table["name"], table["frozen"], strict=True)) == frozen
    again = dict(zip(table["name"], table["value"], strict=True))
    chosen = [e for e in load_experiments(load_requests()) if not e.overloaded][:4]
    for run in prepare_runs(chosen):
        before, after = (np.nanmean(run_latencies_s(run, values, KERNELS)[0]) for values in (frozen, again))
        assert after == pytest.approx(before, rel=0.01)


def test_planted_parameters_are_found_through_the_simulator(traces_folder):
    """One run, measured exactly as other parameters predict it."""
    from dataclasses import replace

    from stepcal.calibration.closed_loop import run_latencies_s, stage_means

    runs = prepare_runs(
        [e for e in load_experiments(load_requests()) if "codellama-34b-tp2-codegen" in e.experiment_id]
    )
    truth = load_coefficients("default").values | {"layer_us": 25.0, "api_before_us": 5_000.0}
    e2e, ttft = run_latencies_s(runs[0], truth, KERNELS)
    targets = tuple(replace(t, values=stage_means(runs[0], t, e2e, ttft)) for t in runs[0].targets)
    parameters = tuple(replace(p, prior_log_sd=1e-6, start=truth[p.name]) for p in KERNELS.parameters)
    free = tuple(
        replace(p, prior_log_sd=1.0, start=15.0 if p.name == "layer_us" else 8_000.0)
        if p.name in ("layer_us", "api_before_us")
        else p
        for p in parameters
    )
    fitted = calibrate(runs=[replace(runs[0], targets=targets)], model=replace(KERNELS, parameters=free))
    assert fitted.values["layer_us"] == pytest.approx(25.0, rel=0.02)
    assert fitted.values["api_before_us"] == pytest.approx(5_000.0, rel=0.06)


def test_every_number_of_the_model_has_a_source():
    table = kernel_tables.parameter_sources()
    known = {"datasheet", "kernel table", "code reading", "fitted on the 16", "our timing", "suggested by the 31"}
    assert set(table["source"]) <= known
    assert (table["source"] == "fitted on the 16").sum() == len(KERNELS.parameters)


def test_what_ships_of_the_tables_is_what_the_constants_were_fitted_to():
    samples, constants = kernel_tables.samples(), kernel_tables.constants()
    measured = constants[constants["n_rows"] > 0].set_index(["gpu", "kernel", "precision"])
    logs = samples.assign(log=np.log(samples["fitted_us"] / samples["measured_us"]).abs())
    spread = 1.4826 * logs.groupby(["gpu", "kernel", "precision"])["log"].median()
    assert set(spread.index) == set(measured.index)
    ratio = spread / measured["residual_log_sd"].reindex(spread.index)
    assert ratio.between(0.3, 3.0).mean() > 0.9
    assert isinstance(kernel_tables.datasheet_differences(), pd.DataFrame)
