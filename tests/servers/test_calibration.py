"""`calibrate`: known parameters of simulated logs are found, and intervals hold the truth as often as they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.servers.calibration import calibrate_server, training_mask
from stepcal.servers.coefficient_file import load_known
from stepcal.servers.demo import DEMO_FACTORS, Load, demo_truth, simulated_log, write_demo
from stepcal.servers.judgement import judge_calibration
from stepcal.servers.log import ServedLog
from stepcal.servers.priors import prior_of
from stepcal.servers.replay import replayed_latencies_s, with_values
from stepcal.simulator import LoadStage
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import load_coefficients

RUNNER = CliRunner()
MakeLog = Callable[..., ServedLog]


def test_known_parameters_of_an_exact_log_are_found(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default")
    fitted = calibrate_server([exact_log((1.0, 3.0, 6.0, 9.0))], prior, parameters)
    assert set(DEMO_FACTORS) <= set(fitted.determined)
    for name, factor in DEMO_FACTORS.items():
        truth = prior.values[name] * factor
        low, high = fitted.interval(name)
        assert low <= truth <= high
        assert fitted.coefficients.values[name] == pytest.approx(truth, rel=0.1)
    assert fitted.residual_log_sd["tpot"] < 0.005


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
        truth = {
            p.name: float(np.clip(prior.values[p.name] * np.exp(rng.normal() * p.prior_log_sd), 1.01 * p.low, p.high))
            for p in parameters
        }
        log = simulated_log(deployment, with_values(prior, truth), load, seed=seed)
        fitted = calibrate_server([log], prior, parameters, seed=seed)
        for p in fitted.parameters:
            low, high = fitted.interval(p.name)
            held.append(low <= truth[p.name] <= high)
    # 72 intervals of 95%: fewer than 85% held has a probability below 1 in 1,000 if they were independent.
    assert np.mean(held) > 0.85


def test_it_does_better_where_it_was_not_fitted(exact_log: MakeLog) -> None:
    prior, parameters = prior_of("default")
    judged = judge_calibration([exact_log((3.0, 6.0, 9.0))], prior, parameters)
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
    from dataclasses import replace

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


def test_summaries_alone_cannot_be_calibrated(exact_log: MakeLog) -> None:
    from dataclasses import replace

    prior, parameters = prior_of("default")
    with pytest.raises(InputError, match="needs single requests"):
        calibrate_server([replace(exact_log((3.0,)), e2e_s=None)], prior, parameters)
    with pytest.raises(InputError, match="have no priors"):
        prior_of("global9")


def test_a_truth_predicts_itself(exact_log: MakeLog) -> None:
    log = exact_log((5.0,))
    e2e, _ = replayed_latencies_s(log, demo_truth())
    np.testing.assert_allclose(e2e, log.e2e_s, rtol=1e-12)
