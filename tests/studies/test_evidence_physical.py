"""Evidence of H1b and H2b on invented tables; H3 on invented folders, from the command line to the verdict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.evaluation.preregistration import load_preregistration
from stepcal.evaluation.verdict import judge
from stepcal.experiments.folders import read_experiment_folder
from stepcal.locations import data_folder
from stepcal.step_time import coefficients
from stepcal.step_time.coefficients import load_coefficients
from stepcal.studies import registry, verdicts
from stepcal.studies.evidence_physical import correlate_parts, h1b_evidence, h2b_evidence, h3_evidence
from stepcal.studies.results.provenance import Provenance
from stepcal.studies.study import Study

runner = CliRunner()
CRITERIA = {"h100_share", "h100_mean", "h100_mspe", "a100_each", "l40s_each"}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
SERVER = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256, "kv_blocks": 2000}
OUTPUT_TOKENS = 21
PROFILE = {
    "api": {"type": "completion", "streaming": True},
    "data": {
        "type": "shared_prefix",
        "shared_prefix": {
            "num_unique_system_prompts": 2, "num_users_per_system_prompt": 2, "system_prompt_len": 32, "question_len": 28,
            "output_len": OUTPUT_TOKENS,
        },
    },
    "load": {"type": "constant", "stages": [{"rate": 5, "duration": 20}]},
}  # fmt: skip
OFFERED = 100


def verdict(*arguments: object) -> tuple[dict, str]:
    done = runner.invoke(app, ["verdict", *map(str, arguments), "--json", "-"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return json.loads(done.stdout), done.stderr


def outcomes(result: dict) -> dict:
    return {row["name"]: row["met"] for row in result["criteria"]}


class TestH1b:
    @pytest.fixture
    def steps(self) -> tuple[pd.DataFrame, dict]:
        """Two runs of 200 test steps each; KV drives the step, weights are constant within a run."""
        rng = np.random.default_rng(0)
        n = 400
        kv = rng.uniform(1e3, 5e3, n)
        weights = np.repeat([4e3, 8e3], n // 2)
        parts = {"weights_gemm": weights, "kv": kv, "prefill_attention": np.zeros(n)}
        table = pd.DataFrame(
            {
                "experiment_id": np.repeat(["a", "b"], n // 2),
                "split": "test",
                "interval_us": kv + weights + rng.normal(0, 100, n),
                "prefill_tokens": 0,
                "decode_tokens": 8,
            }
        )
        return table, parts

    def test_parts_are_the_step_less_all_others(self, steps) -> None:
        table = correlate_parts(*steps).set_index(["quantity", "component", "scope"])["r"]
        assert table["r_part", "decode_attn", "pooled"] > 0.99
        assert table["r_pooled", "decode_attn", "pooled"] < 0.8
        assert table["r_pooled", "decode_attn", "a"] > 0.99
        assert table["r_part", "decode_gemm", "pooled"] > 0.99
        assert np.isnan(table["r_pooled", "decode_gemm", "a"])

    def test_fewer_than_30_steps_are_not_evaluable(self, steps) -> None:
        evidence = h1b_evidence(correlate_parts(*steps))
        assert len(evidence) == 8
        missing = evidence[evidence["unit"].str.startswith("prefill")]
        assert missing["value"].isna().all()
        assert set(missing["reason"]) == {"pure_prefill: 0 test steps, fewer than 30"}
        judged = judge(load_preregistration("h1b"), evidence)
        assert judged.verdict == "Inconclusive"
        assert [r.met for r in judged.criteria] == [None, True, False]

    def test_only_test_steps_count(self, steps) -> None:
        table, parts = steps
        assert h1b_evidence(correlate_parts(table.assign(split="train"), parts))["value"].isna().all()


class TestH2b:
    NAMES = tuple(f"run-{i:02}" for i in range(16))

    def tables(self, whole: float = 3.0, mspe: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        errors = pd.concat(
            [
                pd.DataFrame({"experiment_id": self.NAMES, "variant": variant, "split": split, "judged_percent": value})
                for variant, value in (("default", whole), ("training_mean", 99.0))
                for split in ("whole", "test")
            ]
        )
        folds = pd.concat(
            [
                pd.DataFrame({"experiment_id": names, "leave_out": kind, "judged_percent": 8.0})
                for kind, names in (("stage", self.NAMES[:8]), ("workload", self.NAMES), ("model", self.NAMES))
            ]
        )
        n = [100] * 13 + [0] * 3
        values = np.where(np.array(n) > 0, mspe, np.nan)
        about = {"mspe_percent": values, "mape_percent": values, "n": n, "n_measured": n, "reason": "none completed"}
        return errors, folds, pd.DataFrame({"experiment_id": self.NAMES, **about})

    def judged(self, *tables: pd.DataFrame):
        return judge(load_preregistration("h2b"), h2b_evidence(*tables))

    def test_all_rules_see_their_rows(self) -> None:
        evidence = h2b_evidence(*self.tables())
        sizes = evidence.groupby(["quantity", "variant"]).size().to_dict()
        assert sizes == {
            ("e2e_error_percent", "default"): 16,
            ("e2e_error_percent", "leave_one_model_out"): 16,
            ("e2e_error_percent", "leave_one_stage_out"): 8,
            ("e2e_error_percent", "leave_one_workload_out"): 16,
            ("e2e_test_error_percent", "default"): 13,
            ("mspe_percent", "default"): 13,
        }
        assert self.judged(*self.tables()).verdict == "Supported"

    def test_refuted_by_errors_or_bias(self) -> None:
        assert self.judged(*self.tables(whole=12.0)).verdict == "Refuted"
        assert self.judged(*self.tables(mspe=-11.0)).verdict == "Refuted"

    def test_a_missing_error_is_not_evaluable(self) -> None:
        errors, folds, intervals = self.tables()
        first = errors["experiment_id"].eq("run-00") & errors["variant"].eq("default")
        evidence = h2b_evidence(errors.assign(judged_percent=errors["judged_percent"].mask(first)), folds, intervals)
        assert evidence["reason"].ne("").sum() == 2
        assert self.judged(errors, folds, intervals.assign(mspe_percent=np.nan)).verdict == "Inconclusive"


def lifecycle(completed: int, e2e_s: float, failed: int = 0) -> dict:
    def seconds(value: float) -> dict:
        return {"mean": value, "median": value, "p90": value, "p99": value}

    latencies = ("request_latency", "time_to_first_token", "inter_token_latency", "time_per_output_token")
    names = ("requests_per_sec", "input_tokens_per_sec", "output_tokens_per_sec", "total_tokens_per_sec")
    return {
        "load_summary": {"count": completed + failed},
        "successes": {
            "count": completed,
            "latency": {key: seconds(e2e_s if key == "request_latency" else 0.01) for key in latencies},
            "prompt_len": seconds(60),
            "output_len": seconds(OUTPUT_TOKENS),
            "throughput": dict.fromkeys(names, completed / 20),
        }
        if completed
        else {"count": 0},
        "failures": {"count": failed},
    }


def write_run(
    folder: Path, name: str, gpu: str, e2e_s: float = 1.0, *, completed: int = OFFERED, **server: object
) -> None:
    run = folder / name
    (run / "results").mkdir(parents=True, exist_ok=True)
    config = {"model": "org/New-8B", "tensor_parallelism": 1, "gpu": gpu, **SERVER, **server}
    (run / "exp-config.yaml").write_text(yaml.safe_dump(config))
    (run / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    (run / "config.json").write_text(json.dumps(LLAMA))
    measured = json.dumps(lifecycle(completed, e2e_s, OFFERED - completed))
    (run / "results" / "summary_lifecycle_metrics.json").write_text(measured)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Five runs on three GPUs, measured exactly as the default predicts them (mean over seeds 0 to 4)."""
    from stepcal.evaluation.evaluate import evaluate

    folder = tmp_path / "new"
    gpus = {"a100": "a100-80gb", "h100-a": "h100-sxm", "h100-b": "h100-nvl", "h100-c": "h100-sxm", "l40s": "l40s"}
    for name, gpu in gpus.items():
        write_run(folder, name, gpu)
    cases = read_experiment_folder(folder)
    default = load_coefficients("default-2026-11-24")
    predicted = [
        [
            row["predicted"]["e2e_ms"]["mean"]
            for row in evaluate(default, cases, process="poisson", seed=s)["per_experiment"]
        ]
        for s in range(5)
    ]
    for (name, gpu), e2e_ms in zip(gpus.items(), np.mean(predicted, axis=0), strict=True):
        write_run(folder, name, gpu, e2e_ms / 1e3)
    return folder


def measured_s(folder: Path, name: str) -> float:
    content = json.loads((folder / name / "results" / "summary_lifecycle_metrics.json").read_text())
    return content["successes"]["latency"]["request_latency"]["mean"]


class TestH3:
    def test_without_a_folder_it_is_not_evaluated(self, monkeypatch, tmp_path) -> None:
        monkeypatch.setenv("STEPCAL_DATA", str(tmp_path))
        result, text = verdict("h4")
        assert result["verdict"] == "Not evaluated"
        assert result["evidence_from"] == "none"
        assert set(outcomes(result).values()) == {None}
        assert "Evidence: none yet." in text

    def test_exact_predictions_are_supported(self, runs) -> None:
        result, text = verdict("h3", "--experiments", runs)
        assert result["verdict"] == "Supported", text
        assert {name: outcomes(result)[name] for name in CRITERIA} == dict.fromkeys(CRITERIA, True)
        values = {row["name"]: row["value"] for row in result["criteria"]}
        assert values["h100_share"] == 1.0
        assert values["h100_mean"] == pytest.approx(0.0, abs=1e-6)
        assert "3 of 3 evaluable runs" in text
        assert result["evidence_from"] == "measured"
        assert result["data_sha256"] != ""

    def test_one_bad_board_is_not_supported(self, runs) -> None:
        write_run(runs, "l40s", "l40s", 2 * measured_s(runs, "l40s"))
        result, text = verdict("h3", "--experiments", runs)
        assert result["verdict"] == "Not supported"
        assert outcomes(result)["l40s_each"] is False
        assert "+50.0% (l40s)" in text

    def test_bad_h100_runs_refute_it(self, runs) -> None:
        write_run(runs, "h100-a", "h100-sxm", 2 * measured_s(runs, "h100-a"))
        result, _ = verdict("h3", "--experiments", runs)
        assert result["verdict"] == "Refuted"
        mspe = next(row for row in result["criteria"] if row["name"] == "h100_mspe")
        assert mspe["value"] == pytest.approx(-50 / 3, abs=1e-6)

    def test_what_the_simulator_refuses_is_listed(self, runs) -> None:
        write_run(runs, "a100-b", "a100-80gb", pipeline_parallel_size=2)
        result, text = verdict("h3", "--experiments", runs)
        assert result["verdict"] == "Inconclusive"
        assert outcomes(result)["a100_each"] is None
        assert outcomes(result)["h100_share"] is True
        assert "1 not evaluable: a100-b: `pipeline_parallel_size: 2` asks for what the simulator does not model" in text

    def test_a_gpu_without_runs_leaves_it_open(self, runs) -> None:
        shutil.rmtree(runs / "l40s")
        result, _ = verdict("h3", "--experiments", runs)
        assert result["verdict"] == "Inconclusive"
        assert outcomes(result)["l40s_each"] is None

    def test_an_overloaded_run_has_the_error_of_its_completions(self, runs) -> None:
        write_run(runs, "a100", "a100-80gb", measured_s(runs, "a100"), completed=50)
        evidence = h3_evidence(runs, set()).set_index(["quantity", "variant"])["value"]
        assert evidence["e2e_error_percent", "default_a100"] == pytest.approx(100.0)
        assert evidence["mspe_percent", "default_a100"] == pytest.approx(0.0, abs=1e-6)

    def test_nothing_completed_when_measured(self, runs) -> None:
        write_run(runs, "a100", "a100-80gb", completed=0)
        evidence = h3_evidence(runs, set()).set_index(["quantity", "variant"])
        assert np.isnan(evidence.loc[("e2e_error_percent", "default_a100"), "value"])
        assert "a100: No request completed" in evidence.loc[("e2e_error_percent", "default_a100"), "reason"]

    def test_runs_of_the_calibration_and_other_gpus_do_not_count(self, runs) -> None:
        write_run(runs, "b200", "b200")
        evidence = h3_evidence(runs, {"h100-a"})
        by_unit = evidence.groupby("unit")["variant"].unique().map(list)
        assert by_unit["h100-a"] == ["calibration"]
        assert by_unit["b200"] == ["other_gpu"]
        assert (evidence["variant"] == "default_h100").sum() == 4

    def test_changed_coefficients_are_refused(self, runs, tmp_path, monkeypatch) -> None:
        folder = tmp_path / "data"
        shutil.copytree(data_folder() / "coefficients", folder / "coefficients")
        file = folder / "coefficients" / "default-2026-11-24.json"
        file.write_text(file.read_text().replace('"value": 1', '"value": 2', 1))
        monkeypatch.setattr(coefficients, "data_folder", lambda: folder)
        done = runner.invoke(app, ["verdict", "h3", "--experiments", str(runs), "--json", "-"])
        assert done.exit_code == 2
        assert done.stdout == ""
        assert "was changed after it was frozen" in done.stderr

    def test_a_slip_in_a_folder_is_bad_input(self, runs) -> None:
        (runs / "a100" / "profile.yaml").unlink()
        done = runner.invoke(app, ["verdict", "h3", "--experiments", str(runs)])
        assert done.exit_code == 2
        assert "the workload is unknown" in done.stderr


@pytest.mark.parametrize("hypothesis", ["h1b", "h2b", "h3"])
def test_ours_have_no_published_figures(hypothesis) -> None:
    with pytest.raises(InputError, match="has no published figures"):
        verdicts.verdict_of(hypothesis, published=True)


def test_h1b_and_h2b_come_from_the_studies(monkeypatch) -> None:
    """Measured or recorded is the study's business; the verdict takes its tables and its provenance."""
    errors, folds, intervals = TestH2b().tables()
    provenance = Provenance("recorded", "0" * 64, 1, 16)
    tables = {"physical_model": {"errors": errors, "folds": folds}, "physical_evidence": {"intervals": intervals}}
    monkeypatch.setattr(verdicts, "load_study", lambda name, data=None: Study(name, tables[name], provenance))
    judged, source = verdicts.verdict_of("h2b")
    assert judged.verdict == "Supported"
    assert source.kind == "recorded"
    assert {"physical_model", "physical_evidence"} <= set(registry.STUDIES)
