"""The command line: JSON alone on standard output, messages on standard error, exit status 0, 1 or 2."""

import json

import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app

runner = CliRunner()
GENERAL = "20260217-202857-llama-2-70b-tp4-general"


def run(*arguments):
    return runner.invoke(app, list(arguments))


def test_fit_prints_the_anchor_as_json(traces_folder):
    done = run("fit", "blackbox", "--experiment", GENERAL, "--data", str(traces_folder), "--json", "-")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["variant"] == "blackbox"
    (row,) = result["per_experiment"]
    assert row["experiment_id"] == GENERAL
    assert (row["n_train"], row["n_test"]) == (3595, 1199)
    assert row["mape_percent"] == pytest.approx(61.154177880328795, rel=1e-9)
    assert {"name", "value", "unit", "low", "high", "identified"} <= set(result["parameters"][0])
    assert len(result["data_sha256"]) == 64
    assert "MAPE" in done.stderr


def test_fit_marks_what_is_not_identified(traces_folder, tmp_path):
    out = tmp_path / "fit.json"
    done = run("fit", "global9", "--data", str(traces_folder), "--json", str(out))
    assert done.exit_code == 0
    assert done.stdout == ""
    result = json.loads(out.read_text())
    parameters = {p["name"]: p for p in result["parameters"]}
    assert len(parameters) == 9
    assert parameters["decode_attn_factor"]["identified"] is False
    assert parameters["decode_attn_factor"]["low"] is None
    quotients = {c["name"]: c for c in result["combinations"]}
    decode = quotients["decode_gemm_factor / decode_gemm_mfu"]
    assert decode["identified"]
    assert decode["low"] < decode["value"] < decode["high"]


def test_fit_reads_a_trace_file_of_ones_own(tmp_path):
    from stepcal.datasets import simulated_step_rows

    rows = simulated_step_rows(seed=1, n_steps=60)
    file = tmp_path / "mine.parquet"
    rows.to_parquet(file)
    done = run("fit", "constant", "--data", str(file), "--json", "-")
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["per_experiment"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "global99"), "Unknown variant `global99`"),
        (("fit", "raw", "--experiment", "nope"), "No steps of experiment `nope`"),
        (("verdict", "h99"), "Unknown hypothesis `h99`"),
    ],
)
def test_bad_names_exit_with_2_and_write_nothing(arguments, message, traces_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPCAL_DATA", str(traces_folder))
    out = tmp_path / "out.json"
    done = run(*arguments, "--json", str(out))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_exits_with_2(tmp_path):
    done = run("verdict", "h2", "--published", "--json", str(tmp_path / "no" / "such" / "folder.json"))
    assert done.exit_code == 2
    assert "Cannot write" in done.stderr


def test_corrupt_data_exit_with_2_and_name_the_file(tmp_path):
    file = tmp_path / "broken.parquet"
    file.write_bytes(b"not parquet")
    done = run("fit", "raw", "--data", str(file))
    assert done.exit_code == 2
    assert "broken.parquet" in done.stderr


def test_fit_without_traces_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("stepcal.datasets.catalogue.cache_folder", lambda: tmp_path)
    done = run("fit", "raw", "--data", str(tmp_path))
    assert done.exit_code == 2
    assert "STEPCAL_DATA" in done.stderr


def test_verdict_json_has_a_row_a_criterion():
    done = run("verdict", "h2", "--published", "--json", "-")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["hypothesis"] == "h2"
    assert result["verdict"] == "Inconclusive"
    assert len(result["preregistration_sha256"]) == 64
    for criterion in result["criteria"]:
        assert {"name", "threshold", "value", "met", "evidence"} <= set(criterion)
    by_name = {c["name"]: c for c in result["criteria"]}
    assert by_name["mspe"]["met"] is True
    assert by_name["e2e_mean_error"]["met"] is None


def test_record_check_finds_a_difference(traces_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("stepcal.studies.results.records.data_folder", lambda: tmp_path)
    done = run("record", "--check", "--data", str(traces_folder))
    assert done.exit_code == 1
    assert "was never recorded" in done.stderr
    assert list(tmp_path.iterdir()) == [], "a check writes nothing"


def test_help_teaches():
    assert "Fit a step-time model" in run("--help").stdout
    assert "Example" in run("fit", "--help").stdout
