"""Runs whose arrivals were measured, request by request: they are replayed, and every output says so."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import PROFILE, SERVER, summary, write_run
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.experiments.experiment import Experiment, run_experiment
from stepcal.experiments.folders import read_experiment_folder
from stepcal.simulator import SimulationResult
from stepcal.step_time.coefficients import load_coefficients
from stepcal.studies.evidence_physical import h3_evidence

runner = CliRunner()
N_REQUESTS = 120
PER_REQUEST = "results/per_request_lifecycle_metrics.json"


def burst() -> np.ndarray:
    """All requests of a stage at once, which no Poisson process of 4 or 8 a second would send."""
    return np.concatenate([np.linspace(0.0, 0.5, 40), np.linspace(10.0, 10.5, 80)])


def simulated(experiment: Experiment, sent_s: np.ndarray) -> SimulationResult:
    """What the default predicts for requests sent at given times."""
    default = load_coefficients("default")
    clock = default.compile(experiment.deployment)
    rows = {"experiment_id": experiment.experiment_id, "index": np.arange(sent_s.size), "prompt_tokens": 150}
    table = pd.DataFrame({**rows, "arrival_time_us": np.rint(sent_s * 1e6).astype(int), "output_tokens": 21})
    own = Experiment(**{**vars(experiment), "requests": table.assign(has_error=False)})
    return run_experiment(own, clock, **default.api_overheads_us())


def records(sent_s: np.ndarray, e2e_s: np.ndarray, ttft_s: np.ndarray) -> list[dict]:
    return [
        {
            "start_time": 1000.0 + sent,
            "end_time": 1000.0 + sent + e2e,
            "request": "",
            "response": "",
            "info": {"input_tokens": 150, "output_tokens": 21, "output_token_times": [1000.0 + sent + ttft]},
            "error": None,
        }
        for sent, e2e, ttft in zip(sent_s, e2e_s, ttft_s, strict=True)
    ]


def rows(name: str, sent_s: np.ndarray, e2e_s: np.ndarray, ttft_s: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "experiment_id": name,
            "index": np.arange(sent_s.size),
            "arrival_time_us": np.rint(sent_s * 1e6).astype(int),
            "prompt_tokens": 150,
            "output_tokens": 21,
            "has_error": False,
            "e2e_s": e2e_s,
            "ttft_s": ttft_s,
        }
    )


@pytest.fixture
def truth(tmp_path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times of a burst that is measured exactly as the default predicts it: sent, E2E, TTFT (s)."""
    write_run(tmp_path / "plain")
    ((experiment, _),) = read_experiment_folder(tmp_path / "plain")
    result = simulated(experiment, burst())
    return burst(), result.e2e_us() / 1e6, result.ttft_us() / 1e6


@pytest.fixture
def folder(tmp_path, truth) -> Path:
    """Three runs of the burst: one with records, one with a table of its own, one with summaries only."""
    measured = {"results/summary_lifecycle_metrics.json": summary(N_REQUESTS, e2e_s=float(truth[1].mean()))}
    server = {**SERVER, "gpu": "h100-sxm"}
    root = tmp_path / "runs"
    write_run(root, "a-records", server=server, files={**measured, PER_REQUEST: records(*truth)})
    write_run(root, "b-table", server=server, files=measured)
    rows("b-table", *truth).to_parquet(root / "b-table" / "requests.parquet")
    write_run(root, "c-summary", server=server, files=measured)
    return root


def evaluate(*arguments: object) -> tuple[dict, str]:
    done = runner.invoke(app, ["evaluate", *map(str, arguments), "--json", "-"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return json.loads(done.stdout), done.stderr


def test_measured_arrivals_are_replayed_where_there_are_any(folder: Path) -> None:
    result, text = evaluate("--experiments", folder)
    found = {row["experiment_id"]: row for row in result["per_experiment"]}
    assert {name: row["arrivals"] for name, row in found.items()} == {
        "a-records": "replayed", "b-table": "replayed", "c-summary": "poisson"
    }  # fmt: skip
    assert result["arrivals"] == "mixed"
    for name in ("a-records", "b-table"):
        assert found[name]["e2e_error_percent"] == pytest.approx(0.0, abs=0.01)
    assert found["c-summary"]["e2e_error_percent"] < -10, "nobody waits at 4 and 8 requests a second"
    assert "default, mixed arrivals" in text
    assert "c-summary" in text and text.count("; poisson") == 1


def test_a_request_that_failed_was_sent_all_the_same(folder: Path, truth) -> None:
    entries = records(*truth)
    entries[7] |= {"info": None, "error": {"error_type": "TimeoutError", "error_msg": ""}}
    (folder / "a-records" / PER_REQUEST).write_text(json.dumps(entries))
    result, _ = evaluate("--experiments", folder)
    assert result["per_experiment"][0]["predicted"]["requests"] == N_REQUESTS
    assert result["per_experiment"][0]["e2e_error_percent"] == pytest.approx(0.0, abs=0.01)


def test_arrivals_that_are_asked_for_go_first(folder: Path) -> None:
    result, _ = evaluate("--experiments", folder, "--arrivals", "poisson")
    assert result["arrivals"] == "poisson"
    errors = [row["e2e_error_percent"] for row in result["per_experiment"]]
    assert errors[0] == errors[1] == errors[2]


def test_throughput_is_measured_and_predicted_alike(folder: Path, truth) -> None:
    """Records alone: the measured figures are theirs; from a summary, its own."""
    for name in ("summary", "stage_0", "stage_1"):
        (folder / "a-records" / "results" / f"{name}_lifecycle_metrics.json").unlink()
    result, _ = evaluate("--experiments", folder)
    records_only, _, summary_only = result["per_experiment"]
    sent, e2e, _ = truth
    per_s = N_REQUESTS / (sent + e2e).max()
    assert records_only["measured"]["requests_per_s"] == pytest.approx(per_s, rel=1e-6)
    assert records_only["predicted"]["requests_per_s"] == pytest.approx(per_s, rel=1e-3)
    assert records_only["measured"]["e2e_ms"]["p99"] == pytest.approx(np.quantile(e2e, 0.99) * 1e3, rel=1e-6)
    assert summary_only["measured"]["requests_per_s"] == 4.0


def test_evidence_says_which_arrivals(folder: Path) -> None:
    evidence = h3_evidence(folder, set()).set_index(["quantity", "unit"])
    values = evidence.loc["e2e_error_percent", "value"]
    assert values["a-records"] < 5  # measured as the default predicts it, judged by H3's coefficients
    assert values["c-summary"] > 10
    notes = evidence.loc["e2e_error_percent", "note"]
    assert notes["a-records"] == notes["b-table"]
    assert notes["a-records"].startswith("measured arrivals, replayed; `kv_offloading_size` is absent; 8 GiB")
    assert notes["c-summary"].startswith("Poisson arrivals, mean over seeds 0 to 4; `kv_offloading_size` is absent")
    done = runner.invoke(app, ["verdict", "h3", "--experiments", str(folder), "--json", "-"])
    assert json.loads(done.stdout)["notes"] == [f"{name}: {note}" for name, note in notes.items()]
    assert "  a-records: measured arrivals, replayed;" in done.stderr


def test_a_gpu_for_the_verdict_may_be_an_option(tmp_path) -> None:
    write_run(tmp_path)
    for options, variant in (((), "default_h100"), (("--accelerator", "l40s"), "default_l40s")):
        name = options[1] if options else None
        assert set(h3_evidence(tmp_path, set(), accelerator=name)["variant"]) == {variant}
        done = runner.invoke(app, ["verdict", "h3", "--experiments", str(tmp_path), *options, "--json", "-"])
        assert done.exit_code == 0, done.stderr
        assert ("no GPU is named" in done.stderr) == (not options)
    done = runner.invoke(app, ["verdict", "h2", "--accelerator", "l40s"])
    assert done.exit_code == 2
    assert "takes none" in done.stderr


def test_a_table_beside_the_runs_serves_all_of_them(folder: Path, truth) -> None:
    place = folder.parent / "requests"
    place.mkdir()
    rows("c-summary", *truth).to_parquet(place / "requests.parquet")
    found = {e.experiment_id: e for e, _ in read_experiment_folder(folder)}
    assert found["c-summary"].default_process == "replayed"
    assert len(found["c-summary"].requests) == N_REQUESTS


def test_a_table_that_is_cut_short_is_refused(folder: Path, truth) -> None:
    short = [values[:100] for values in truth]
    rows("b-table", *short).to_parquet(folder / "b-table" / "requests.parquet")
    with pytest.raises(
        InputError, match=r"requests\.parquet holds 100 requests, the summary of `b-table` counts 120.*Poisson"
    ):
        read_experiment_folder(folder)


def test_one_request_more_or_less_is_noted(folder: Path, truth) -> None:
    short = [values[:119] for values in truth]
    rows("b-table", *short).to_parquet(folder / "b-table" / "requests.parquet")
    notes = {e.experiment_id: e.notes for e, _ in read_experiment_folder(folder)}
    assert any("holds 119 requests, the summary of `b-table` counts 120" in note for note in notes["b-table"])


def test_a_table_of_other_runs_is_refused(folder: Path, truth) -> None:
    tables = pd.concat([rows(name, *truth) for name in ("x", "y")])
    tables.to_parquet(folder / "b-table" / "requests.parquet")
    with pytest.raises(InputError, match=r"holds several experiments, but no row of `b-table`"):
        read_experiment_folder(folder)


def test_records_of_another_kind_are_named(folder: Path) -> None:
    (folder / "a-records" / PER_REQUEST).write_text(json.dumps([{"start_time": 1.0}]))
    with pytest.raises(InputError, match=r"per_request_lifecycle_metrics\.json, entry 1: not a request record"):
        read_experiment_folder(folder)


def test_a_request_that_never_fits_names_its_run(tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "max_model_len": 100})
    done = runner.invoke(app, ["evaluate", "--experiments", str(tmp_path)])
    assert done.exit_code == 2
    assert "run-a: Request 0 has 150 prompt and 21 output tokens" in " ".join(done.stderr.split())


class TestLayout:
    def test_results_may_lie_deeper(self, tmp_path) -> None:
        run = write_run(tmp_path)
        deeper = run / "results" / "2026-11-24" / "job-1"
        deeper.mkdir(parents=True)
        for file in (run / "results").glob("*.json"):
            file.rename(deeper / f"mine_{file.name}")
        ((experiment, known),) = read_experiment_folder(tmp_path)
        assert not experiment.overloaded
        assert set(known["split"]) == {"whole", "stage 0", "stage 1"}

    def test_the_results_that_lie_highest_are_the_runs(self, tmp_path) -> None:
        run = write_run(tmp_path)
        (run / "results" / "warm-up").mkdir()
        (run / "results" / "warm-up" / "summary_lifecycle_metrics.json").write_text(json.dumps(summary(1)))
        ((_, known),) = read_experiment_folder(tmp_path)
        assert known.set_index(["split", "metric"])["value"]["whole", "completed"] == 100

    def test_two_results_are_refused(self, tmp_path) -> None:
        files = {"results/second_summary_lifecycle_metrics.json": summary()}
        write_run(tmp_path, files=files)
        with pytest.raises(InputError, match="not clear which is its own"):
            read_experiment_folder(tmp_path)

    def test_runs_may_lie_deeper_and_a_run_may_be_given_itself(self, tmp_path) -> None:
        write_run(tmp_path / "h100", "a")
        write_run(tmp_path / "l40s", "b")
        assert [e.experiment_id for e, _ in read_experiment_folder(tmp_path)] == ["a", "b"]
        assert [e.experiment_id for e, _ in read_experiment_folder(tmp_path / "l40s" / "b")] == ["b"]

    def test_runs_of_one_name_are_refused(self, tmp_path) -> None:
        for place in ("x", "y"):
            write_run(tmp_path / place, "a")
        with pytest.raises(InputError, match=r"x/a and .*y/a are runs of one name"):
            read_experiment_folder(tmp_path)

    @pytest.mark.parametrize("sign", ["profile.yaml", "results/summary_lifecycle_metrics.json"])
    def test_a_run_without_its_config_is_not_passed_over(self, sign: str, tmp_path) -> None:
        write_run(tmp_path, "a")
        names = ("exp-config.yaml", "profile.yaml", "results/summary_lifecycle_metrics.json")
        write_run(tmp_path, "b", files={name: None for name in names if name != sign})
        with pytest.raises(InputError, match=r"b lacks `exp-config\.yaml`, which names the model"):
            read_experiment_folder(tmp_path)

    def test_a_bad_workload_names_its_file(self, tmp_path) -> None:
        data = {"type": "shared_prefix", "shared_prefix": {**PROFILE["data"]["shared_prefix"], "output_len": "many"}}
        write_run(tmp_path, files={"profile.yaml": {**PROFILE, "data": data}})
        with pytest.raises(
            InputError, match=r"run-a/profile\.yaml: `data\.shared_prefix\.output_len` of the workload is 'many'"
        ):
            read_experiment_folder(tmp_path)
