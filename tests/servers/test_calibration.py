"""`calibrate`: known parameters of simulated logs are found, and intervals hold the truth as often as they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.servers.calibration import calibrate_server, gpu_speed
from stepcal.servers.coefficient_file import load_known
from stepcal.servers.demo import DEMO_FACTORS, Load, demo_truth, simulated_log, write_demo
from stepcal.servers.inference.blocks import blocks_of, figures_of, training_mask
from stepcal.servers.inference.error_model import STAGE_ERRORS, arrivals_log_sd, error_model_at, factor_slopes
from stepcal.servers.inference.learning import GPU_SPEED, OFF_GPU
from stepcal.servers.judgement import judge_calibration
from stepcal.servers.log import ServedLog
from stepcal.servers.priors import prior_of
from stepcal.servers.replay import replayed_latencies_s, with_values
from stepcal.simulator import LoadStage
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.step_time.learned import LEARNED_MODELS

RUNNER = CliRunner()
MakeLog = Callable[..., ServedLog]


def test_known_parameters_of_an_exact_log_are_found(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default")
    fitted = calibrate_server([exact_log((1.0, 3.0, 6.0, 9.0))], prior, parameters)
    assert set(DEMO_FACTORS) == set(fitted.learned) == set(fitted.moved)
    assert fitted.log_odds > 0
    for name, factor in DEMO_FACTORS.items():
        truth = prior.values[name] * factor
        low, high = fitted.interval(name)
        assert low <= truth <= high
        assert fitted.coefficients.values[name] == pytest.approx(truth, rel=0.1)
    assert fitted.residual_log_sd["tpot"] < 0.01
    untouched = prior.values.keys() - DEMO_FACTORS.keys()
    assert all(fitted.coefficients.values[name] == prior.values[name] for name in untouched)


def test_a_log_that_agrees_with_the_prior_teaches_nothing(deployment: Deployment) -> None:
    """Errors of a stage that the prior is known to make are no news, however many requests they are a mean over."""
    prior, parameters = prior_of("default")
    for seed in range(4):
        log = simulated_log(
            deployment, prior, Load((LoadStage(6.0, 600.0),)), seed=seed, stage_error=STAGE_ERRORS["kernels"]
        )
        fitted = calibrate_server([log], prior, parameters)
        assert fitted.learned == {}
        assert fitted.coefficients == prior


@pytest.mark.parametrize("rates", [(6.0,), (3.0, 6.0, 9.0)])
def test_a_slower_gpu_is_learned_from_one_stage(deployment: Deployment, rates: tuple[float, ...]) -> None:
    prior, parameters = prior_of("default")
    slower = slower_gpu(prior, 1.2)
    load = Load(tuple(LoadStage(rate, 150.0) for rate in rates))
    log = simulated_log(deployment, slower, load, seed=1, stage_error=STAGE_ERRORS["kernels"])
    fitted = calibrate_server([log], prior, parameters)
    assert fitted.learned[GPU_SPEED] == pytest.approx(1.2, abs=0.06)
    elsewhere = simulated_log(deployment, slower, Load((LoadStage(9.0, 100.0),)), seed=2)
    errors = {
        name: abs(np.log(np.nanmean(replayed_latencies_s(elsewhere, model)[0]) / np.nanmean(elsewhere.e2e_s)))
        for name, model in (("before", prior), ("after", fitted.coefficients))
    }
    assert errors["after"] < 0.35 * errors["before"]


def test_a_wrong_overhead_is_learned_and_moves_nothing_else(deployment: Deployment) -> None:
    prior, parameters = prior_of("default")
    other = with_values(prior, {"api_before_us": 2.5 * prior.values["api_before_us"]})
    load = Load((LoadStage(2.0, 150.0), LoadStage(4.0, 150.0), LoadStage(6.0, 150.0)))
    log = simulated_log(deployment, other, load, seed=3, stage_error=STAGE_ERRORS["kernels"])
    fitted = calibrate_server([log], prior, parameters)
    assert set(fitted.learned) == {"api_before_us"}
    assert fitted.learned["api_before_us"] == pytest.approx(2.5, rel=0.25)


def test_where_a_queue_grows_the_first_token_says_little(exact_log: MakeLog) -> None:
    """Near saturation 1% of step time is many percent of TTFT, so its expected error is many times as large there."""
    prior, _ = prior_of("default")
    logs = [exact_log((3.0,)), exact_log((11.0,), max_num_seqs=16)]
    blocks = blocks_of(logs, [np.ones(len(log.requests), dtype=bool) for log in logs], 1)
    slopes = dict(zip([(b.log, n) for b, n in figures_of(blocks)], factor_slopes(logs, blocks, prior), strict=True))
    assert 1.0 < slopes[0, "tpot"] < 2.0
    assert slopes[0, "ttft"] < 2.0
    assert slopes[1, "ttft"] > 3.0


def test_unknown_arrivals_have_an_error_of_their_own(exact_log: MakeLog) -> None:
    prior, _ = prior_of("default")
    log = exact_log((6.0,), seconds=60.0)
    blocks = blocks_of([log], [np.ones(len(log.requests), dtype=bool)], 1)
    assert (arrivals_log_sd([log], blocks, prior) == 0.0).all()
    others = tuple(exact_log((6.0,), seconds=60.0, seed=seed).requests for seed in range(1, 5))
    drawn = arrivals_log_sd([replace(log, redraws=others)], blocks, prior)
    assert (drawn > 1e-3).all()
    assert (drawn < 0.5).all()


def test_correlated_errors_are_whitened_as_their_covariance_says(exact_log: MakeLog) -> None:
    """Rotated errors and variances give the same misfit as the covariance matrix written out."""
    prior, _ = prior_of("default")
    log = exact_log((3.0, 6.0))
    blocks = blocks_of([log], [np.ones(len(log.requests), dtype=bool)])
    model, figures = error_model_at([log], blocks, prior), figures_of(blocks)
    slopes, size = factor_slopes([log], blocks, prior), STAGE_ERRORS["kernels"]
    errors = np.random.default_rng(0).normal(size=len(figures)) * 0.02
    for factor in (0.5, 1.0, 2.0):
        covariance = np.zeros((len(figures), len(figures)))
        for i, (a, name) in enumerate(figures):
            for j, (b, other) in enumerate(figures):
                if (a.log, a.stage) != (b.log, b.stage):
                    continue
                covariance[i, j] = (factor * size.step_log_sd) ** 2 * slopes[i] * slopes[j]
                covariance[i, j] += (factor * size.ttft_log_sd) ** 2 * (name == other == "ttft")
                covariance[i, j] += a.log_sd[name] ** 2 * (i == j)
        misfit = (model.rotated(errors) ** 2 / model.variance(factor)).sum()
        assert misfit == pytest.approx(errors @ np.linalg.solve(covariance, errors), rel=1e-9)


def test_what_changes_nothing_on_this_server_is_not_learned(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default-2026-11-24")
    fitted = calibrate_server([exact_log((4.0,))], prior, parameters)
    names = {p.name for p in fitted.parameters}
    assert "collective_us" not in names  # one rank
    assert "mixture_layer_us" not in names  # a dense model
    assert fitted.coefficients.values["collective_us"] == prior.values["collective_us"]


def test_threads_and_seeds_change_no_bit_but_the_draws(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default")
    logs = [exact_log((2.0,)), exact_log((5.0,))]
    one = calibrate_server(logs, prior, parameters, workers=1)
    two = calibrate_server(logs, prior, parameters, workers=2)
    assert one.coefficients == two.coefficients
    np.testing.assert_array_equal(one.draws, two.draws)
    other = calibrate_server(logs, prior, parameters, seed=1)
    assert other.coefficients == one.coefficients
    assert not np.array_equal(other.draws, one.draws)


def test_intervals_hold_truths_drawn_from_the_prior(deployment: Deployment) -> None:
    """Twelve seeds; `benchmarks/calibration_coverage.py` runs 200."""
    prior, parameters = prior_of("default")
    load = Load((LoadStage(4.0, 90.0), LoadStage(7.0, 90.0)))
    held = []
    for seed in range(12):
        rng = np.random.default_rng([seed, 3])
        moved = rng.normal() * gpu_speed(parameters)
        truth = {
            p.name: float(
                np.clip(prior.values[p.name] * np.exp(rng.normal() * p.prior_log_sd + moved[i]), 1.01 * p.low, p.high)
            )
            for i, p in enumerate(parameters)
        }
        log = simulated_log(deployment, with_values(prior, truth), load, seed=seed, stage_error=STAGE_ERRORS["kernels"])
        fitted = calibrate_server([log], prior, parameters, seed=seed)
        for p in fitted.parameters:
            low, high = fitted.interval(p.name)
            held.append(low <= truth[p.name] <= high)
    # 60 intervals of 95%: fewer than 85% held has a probability below 1 in 1,000 if they were independent.
    assert np.mean(held) > 0.85


def slower_gpu(prior: StepTimeModel, factor: float) -> StepTimeModel:
    """A server all of whose GPU times are longer."""
    parameters = LEARNED_MODELS[prior.variant].parameters
    return with_values(prior, {p.name: factor * prior.values[p.name] for p in parameters if p.name not in OFF_GPU})


def test_it_does_better_where_it_was_not_fitted(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default")
    judged = judge_calibration([exact_log((3.0, 6.0, 9.0), truth=slower_gpu(prior, 1.15))], prior, parameters)
    for table in (judged.errors[judged.errors["part"] == "test"], judged.left_out):
        rows = table[table["metric"] == "e2e"]
        size = rows.assign(size=rows["error_percent"].abs()).groupby("model")["size"].mean()
        assert size["after"] < 0.25 * size["before"]
    assert set(judged.left_out["part"]) == {"stage 0", "stage 1", "stage 2"}
    assert judged.log_sd < 0.02
    assert judged.validity.accelerators == ("h100-sxm",)


def test_the_training_part_ends_before_the_rest_begins(exact_log: MakeLog) -> None:
    log = exact_log((6.0,))
    mask = training_mask(log)
    assert log.e2e_s is not None
    ended = log.requests.arrival_s + log.e2e_s
    assert ended[mask].max() <= log.requests.arrival_s[round(0.6 * len(mask))]
    later = log.e2e_s.copy()
    later[~mask] *= 1.5  # what comes later changes nothing that is learned
    prior, parameters = prior_of("default")
    changed = replace(log, e2e_s=later)
    masks = [mask]
    a = calibrate_server([log], prior, parameters, masks=masks)
    b = calibrate_server([changed], prior, parameters, masks=masks)
    assert a.coefficients == b.coefficients


def test_the_file_drives_the_simulator_and_carries_its_error(tmp_path: Path) -> None:
    files = write_demo(tmp_path / "raw", rates_per_s=(3.0, 6.0), stage_s=60.0)
    mine, out = tmp_path / "mine", tmp_path / "c.json"
    assert RUNNER.invoke(app, ["ingest", *map(str, files), "--out", str(mine)]).exit_code == 0
    (mine / "exp-config.yaml").write_text((tmp_path / "raw" / "exp-config.yaml").read_text())
    result = RUNNER.invoke(app, ["calibrate", str(mine), "--out", str(out), "--json", "-"])
    assert result.exit_code == 0, result.output
    known = load_known(str(out))
    assert known.coefficients.values.keys() == load_coefficients("default").values.keys()
    assert 0.0 < known.log_sd < 0.05
    assert known.validity.architectures == ("llama-2-7b",)
    document = json.loads(out.read_text())
    assert set(document["provenance"]["runs_sha256"]) == {"bench-3-per-s", "bench-6-per-s"}
    again = RUNNER.invoke(app, ["calibrate", str(mine), "--out", str(tmp_path / "d.json")])
    assert again.exit_code == 0
    assert (tmp_path / "d.json").read_bytes() == out.read_bytes()


def test_no_used_value_is_called_learned_outside_of_its_interval(tmp_path: Path) -> None:
    """A log read with a setting that is not the server's: a few differences and all parameters free disagree."""
    files = write_demo(tmp_path / "raw")
    mine, out = tmp_path / "mine", tmp_path / "c.json"
    assert RUNNER.invoke(app, ["ingest", *map(str, files), "--out", str(mine)]).exit_code == 0
    (mine / "exp-config.yaml").write_text((tmp_path / "raw" / "exp-config.yaml").read_text())
    arguments = ["calibrate", str(mine), "--out", str(out), "--vllm-version", "0.33.0", "--kv-cache-dtype", "fp8"]
    result = RUNNER.invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {p["name"]: p for p in found["parameters"] if "low" in p}
    assert set(found["learned"]) == {GPU_SPEED}
    doubtful = set()
    for name, row in rows.items():
        assert row["low"] <= row["median"] <= row["high"]
        if not row["low"] <= row["value"] <= row["high"]:
            doubtful.add(name)
            assert row["state"].startswith("in doubt")
            assert not row["identified"]
            assert "outside of the interval" in row["reason"]
        elif name not in OFF_GPU:
            assert row["state"] == f"moves with {GPU_SPEED}"
            assert row["value"] == pytest.approx(found["learned"][GPU_SPEED] * row["prior"])
    assert doubtful == {"api_before_us"}
    assert rows["api_before_us"]["value"] == rows["api_before_us"]["prior"]
    assert set(found["determined"]) == {name for name, row in rows.items() if row["identified"]}
    assert "1 of 5 used values are outside of what all parameters together allow" in result.stderr
    assert f"{GPU_SPEED} moves all times of the GPU" in result.stderr


def test_summaries_alone_cannot_be_calibrated(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default")
    with pytest.raises(InputError, match="needs single requests"):
        calibrate_server([replace(exact_log((3.0,)), e2e_s=None)], prior, parameters)
    with pytest.raises(InputError, match="have no priors"):
        prior_of("global9")


def test_a_truth_predicts_itself(exact_log: MakeLog) -> None:
    log = exact_log((5.0,))
    e2e, _ = replayed_latencies_s(log, demo_truth())
    np.testing.assert_allclose(e2e, log.e2e_s, rtol=1e-12)


def test_a_parameter_at_its_bound_is_said_to_be(exact_log: MakeLog) -> None:
    """A log that no value of a parameter explains points to a mistake, not to the parameter."""
    prior, parameters = prior_of("default")
    log = exact_log((3.0,), seconds=60.0)
    assert log.e2e_s is not None
    assert log.ttft_s is not None
    seconds_for_minutes = replace(log, e2e_s=log.e2e_s / 60.0, ttft_s=log.ttft_s / 60.0)
    fitted = calibrate_server([seconds_for_minutes], prior, parameters)
    assert any("look for a mistake" in fitted.state(name) for name in fitted.moved)
