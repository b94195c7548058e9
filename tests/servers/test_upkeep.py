"""`design` and `drift`: a recipe tells what it promises, a server that changed is noticed, another is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.servers.calibration import calibrate_server
from stepcal.servers.coefficient_file import SHIPPED_VALIDITY, KnownModel
from stepcal.servers.demo import Load, demo_truth, simulated_log
from stepcal.servers.design import design
from stepcal.servers.drift import drift_of
from stepcal.servers.log import ServedLog
from stepcal.servers.priors import prior_of
from stepcal.simulator import LoadStage
from stepcal.specs.deployment import Deployment

RUNNER = CliRunner()
MakeLog = Callable[..., ServedLog]
TRUE = KnownModel(demo_truth(), SHIPPED_VALIDITY, 0.02, "test")


def changed(log: ServedLog, factor: float, first: int) -> ServedLog:
    assert log.e2e_s is not None
    slower = np.where(np.arange(len(log.e2e_s)) >= first, factor, 1.0)
    return replace(log, e2e_s=log.e2e_s * slower)


def test_coefficients_fit_the_server_that_they_are_of(exact_log: MakeLog) -> None:
    found = drift_of(exact_log((6.0,)), TRUE)
    assert not found.has_drifted
    assert found.since_s is None
    assert found.error_percent == pytest.approx(0.0, abs=1e-6)


def test_a_server_that_became_slower_is_noticed(exact_log: MakeLog) -> None:
    found = drift_of(changed(exact_log((6.0,)), 1.10, 0), TRUE)
    assert found.has_drifted
    assert found.error_percent == pytest.approx(-9.1, abs=0.2)
    small = drift_of(changed(exact_log((6.0,)), 1.02, 0), TRUE)
    assert not small.has_drifted  # within the coefficients' own error


def test_a_change_in_the_middle_is_dated(exact_log: MakeLog) -> None:
    log = exact_log((6.0,), seconds=200.0)
    n = len(log.requests)
    found = drift_of(changed(log, 1.3, n // 2), TRUE)
    assert found.has_drifted
    assert found.since_s is not None
    assert abs(found.since_s - log.requests.arrival_s[n // 2]) < 25.0


def test_drift_needs_single_requests(exact_log: MakeLog) -> None:
    with pytest.raises(InputError, match="summaries only"):
        drift_of(replace(exact_log((3.0,)), e2e_s=None), TRUE)


def test_a_recipe_narrows_every_interval_and_knows_what_is_known(deployment: Deployment) -> None:
    prior, parameters = prior_of("default")
    recipe = design(prior, parameters, deployment, n_stages=4, total_s=400.0)
    assert len(recipe.stages) == 4
    assert sum(s.duration_s for s in recipe.stages) == pytest.approx(400.0)
    for e in recipe.expected:
        assert e.prior_low <= e.low < e.value < e.high <= e.prior_high
    assert any(e.is_determined for e in recipe.expected)
    assert all(e.gains > 0 for e in recipe.expected)
    tight = design(prior, parameters, deployment, n_stages=1, known_log_sd={"layer_us": 1e-3})
    layer = next(e for e in tight.expected if e.name == "layer_us")
    assert layer.gains < 0.01  # nothing is left to learn of it


def test_logs_of_a_recipe_tell_what_it_promised(deployment: Deployment) -> None:
    prior, parameters = prior_of("default")
    recipe = design(prior, parameters, deployment, n_stages=5, total_s=500.0)
    logs = []
    for i, s in enumerate(recipe.stages):
        load = Load(
            (LoadStage(s.rate_per_s, min(s.duration_s, 600.0 / s.rate_per_s)),),
            (s.prompt_tokens,) * 2,
            (s.output_tokens,) * 2,
        )
        logs.append(simulated_log(deployment, demo_truth(), load, seed=i, run=f"stage-{i}"))
    masks = [np.ones(len(log.requests), dtype=bool) for log in logs]
    fitted = calibrate_server(logs, prior, parameters, masks=masks, n_blocks=1)
    for e in recipe.expected:
        low, high = fitted.interval(e.name)
        promised, found = np.log(e.high / e.low), np.log(high / low)
        assert found < 2.5 * promised, e.name  # the fit also knows its own misfit
    assert set(fitted.determined) >= {e.name for e in recipe.expected if e.is_determined and e.gains > 0.8}


def test_the_commands_write_files_for_three_tools(tmp_path: Path) -> None:
    arguments = ["--architecture", "llama-2-7b", "--accelerator", "h100-sxm", "--max-num-seqs", "64"]
    result = RUNNER.invoke(app, ["design", *arguments, "--stages", "2", "--minutes", "2", "--out", str(tmp_path / "r")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r" / "vllm-bench.sh").read_text().count("vllm bench serve") == 2
    assert (tmp_path / "r" / "guidellm.sh").read_text().count("guidellm run") == 2
    config = yaml.safe_load((tmp_path / "r" / "inference-perf-0.yaml").read_text())
    assert config["load"]["stages"][0]["rate"] > 0
    result = RUNNER.invoke(app, ["design", *arguments, "--coefficients", "global9"])
    assert result.exit_code == 2
    assert "have no priors" in result.output
    result = RUNNER.invoke(app, ["design", *arguments, "--max-model-len", "64"])
    assert result.exit_code == 2
    assert "max_model_len" in result.output
