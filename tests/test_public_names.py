"""The door: ten names, loaded when asked for, each where it says it is."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
from numpydoc.validate import validate

import stepcal
from stepcal.errors import InputError
from stepcal.simulator import make_requests

TEN = {
    *("ModelArchitecture", "Accelerator", "Deployment", "Workload", "Experiment", "StepTimeModel"),
    *("calibrate", "simulate", "evaluate", "judge"),
}


def test_there_are_ten():
    assert set(stepcal.__all__) == TEN
    assert set(dir(stepcal)) >= TEN


def test_types_and_run_time_agree():
    """What a type checker sees is what is loaded."""
    tree = ast.parse(Path(stepcal.__file__).read_text(encoding="utf-8"))
    (guarded,) = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == stepcal._HOMES


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"stepcal has no `Simulator`. It has .*StepTimeModel"):
        _ = stepcal.Simulator


@pytest.mark.parametrize("name", sorted(TEN))
def test_docstrings_are_numpydoc(name):
    value = getattr(stepcal, name)
    wanted = {"GL08", "PR01", "PR02", "PR03", "RT01", "SS01"}
    if inspect.isclass(value):
        wanted -= {"PR01", "PR02", "PR03"}  # fields may stand under Attributes
    home = stepcal._HOMES[name].replace(":", ".")
    errors = [error for error in validate(home)["errors"] if error[0] in wanted]
    assert errors == []


class TestPredict:
    @pytest.fixture
    def served(self) -> stepcal.Deployment:
        return stepcal.Deployment.of("llama-2-7b", "h100-sxm")

    @pytest.mark.parametrize("name", ["default", "global9", "phase16"])
    def test_without_a_server_the_usual_limits_hold(self, served, name):
        model = stepcal.StepTimeModel.load(name)
        step = {"decode_kv_lens": [100, 2000], "prefill_chunk_tokens": [64], "prefill_kv_lens": [128]}
        usual = stepcal.Deployment.of("llama-2-7b", "h100-sxm", kv_blocks=10_000)
        assert model.predict_us(served, **step) == pytest.approx(model.predict_us(usual, **step), rel=1e-12)
        assert model.predict_us(served, decode_kv_lens=[10] * 200, prefill_chunk_tokens=[4000]) > 0

    def test_more_work_takes_longer(self, served):
        model = stepcal.StepTimeModel.load("default")
        steps = [
            {"decode_kv_lens": [1000]},
            {"decode_kv_lens": [4000]},
            {"decode_kv_lens": [4000] * 8},
            {"decode_kv_lens": [4000] * 8, "prefill_chunk_tokens": [512]},
            {"decode_kv_lens": [4000] * 8, "prefill_chunk_tokens": [512], "prefill_kv_lens": [2048]},
        ]
        times = [model.predict_us(served, **step) for step in steps]
        assert np.all(np.diff(times) > 0)

    @pytest.mark.parametrize(
        "step",
        [
            {"decode_kv_lens": [0]},
            {"prefill_chunk_tokens": [-1]},
            {"prefill_chunk_tokens": [10], "prefill_kv_lens": [5]},
            {"prefill_chunk_tokens": [10], "prefill_kv_lens": [20, 30]},
            {"decode_kv_lens": [10], "waiting": -1},
        ],
    )
    def test_a_step_that_cannot_be_is_refused(self, served, step):
        with pytest.raises(InputError, match="lengths are at least 1"):
            stepcal.StepTimeModel.load("default").predict_us(served, **step)


def test_a_deployment_without_a_server_cannot_serve():
    with pytest.raises(InputError, match="names no `server`"):
        stepcal.simulate(
            make_requests([0.0], [[(0, 10)]], 5),
            stepcal.Deployment.of("llama-2-7b", "h100-sxm"),
            stepcal.StepTimeModel.load("default"),
        )


def test_nothing_to_calibrate_is_refused():
    with pytest.raises(InputError, match="nothing to fit"):
        stepcal.calibrate([])
