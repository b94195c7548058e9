"""Experiments of one's own: the layout that is read, and what is said of a folder that is not laid out so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import PROFILE, QWEN, SERVER, summary, write_run
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.errors import InputError
from stepcal.experiments.experiment import CLIENT_TIMEOUT_S
from stepcal.experiments.folders import read_experiment_folder, read_usable_runs
from stepcal.experiments.latencies import measured_latencies


def test_a_run_is_read_whole(tmp_path) -> None:
    write_run(tmp_path)
    ((experiment, known),) = read_experiment_folder(tmp_path)
    assert experiment.experiment_id == "run-a"
    assert experiment.architecture.name == "llama-2-7b"
    assert experiment.deployment.accelerator.name == "h100-sxm"
    assert experiment.deployment.tensor_parallel == 1
    assert experiment.server.kv_blocks == 7462
    assert experiment.server.block_size == 16
    assert experiment.server.enable_prefix_caching and experiment.server.async_scheduling
    assert experiment.workload.prompt_len == 150
    assert [s.n_requests for s in experiment.workload.stages] == [40, 80]
    assert experiment.workload.timeout_s == CLIENT_TIMEOUT_S
    assert not experiment.overloaded
    assert experiment.requests is None
    values = known.set_index(["split", "metric", "statistic"])["value"]
    assert values["whole", "e2e", "mean"] == 1000.0
    assert values["whole", "tpot", "mean"] == pytest.approx(900.0 / 20)
    assert values["stage 1", "completed", "count"] == 50


def test_runs_come_in_order_of_their_names_and_other_folders_are_left_alone(tmp_path) -> None:
    for name in ("b", "c", "a"):
        write_run(tmp_path, name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("x")
    assert [e.experiment_id for e, _ in read_experiment_folder(tmp_path)] == ["a", "b", "c"]


def test_the_workload_as_run_wins_over_the_one_asked_for(tmp_path) -> None:
    as_run = json.loads(json.dumps(PROFILE))
    as_run["data"]["shared_prefix"]["num_unique_system_prompts"] = 10
    as_run["load"]["request_timeout"] = 60
    write_run(tmp_path, files={"results/config.yaml": as_run})
    ((experiment, _),) = read_experiment_folder(tmp_path)
    assert experiment.workload.n_groups == 10
    assert experiment.workload.timeout_s == 60.0


def test_what_the_server_was_started_with_is_used(tmp_path) -> None:
    more = {"block_size": 32, "enable_prefix_caching": False, "async_scheduling": False, "gpu": "a100-80gb"}
    write_run(tmp_path, server={**SERVER, **more, "tensor_parallelism": 4})
    ((experiment, _),) = read_experiment_folder(tmp_path, accelerator="b200")
    assert experiment.server.block_size == 32
    assert not experiment.server.enable_prefix_caching
    assert not experiment.server.async_scheduling
    assert experiment.deployment.accelerator.name == "a100-80gb", "the run's own word wins"
    assert experiment.deployment.tensor_parallel == 4


def test_the_accelerator_of_runs_that_do_not_name_one(tmp_path) -> None:
    write_run(tmp_path)
    assert read_experiment_folder(tmp_path, accelerator="l40s")[0][0].deployment.accelerator.name == "l40s"


def test_a_config_json_beside_gives_the_architecture(tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "model": "mine/tiny"}, files={"config.json": QWEN})
    ((experiment, _),) = read_experiment_folder(tmp_path)
    assert experiment.architecture.hidden_size == 512
    assert experiment.architecture.num_kv_heads == 4
    assert experiment.architecture.name == "mine/tiny"


def test_a_model_that_does_not_ship_needs_its_config(tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, "model": "mine/tiny"})
    with pytest.raises(InputError, match=r"run-a: the model `mine/tiny` does not ship\. Put its .*`config\.json`"):
        read_experiment_folder(tmp_path)


@pytest.mark.parametrize("place", ["server_settings.csv", "../requests/server_settings.csv"])
def test_kv_blocks_may_come_from_a_table(place: str, tmp_path) -> None:
    folder = tmp_path / "experiments"
    write_run(folder, server={k: v for k, v in SERVER.items() if k != "kv_blocks_total_gpu"})
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("experiment_id,kv_blocks_total_gpu\nother,7\nrun-a,555\n")
    assert read_experiment_folder(folder)[0][0].server.kv_blocks == 555


@pytest.mark.parametrize("table", ["", "a,b\n1,2\n", "experiment_id,blocks\nrun-a,3\n",
                                   "experiment_id,kv_blocks_total_gpu\nrun-a,many\n"])  # fmt: skip
def test_a_settings_table_of_another_kind_is_refused(table: str, tmp_path) -> None:
    write_run(tmp_path, server={k: v for k, v in SERVER.items() if k != "kv_blocks_total_gpu"})
    (tmp_path / "server_settings.csv").write_text(table)
    with pytest.raises(InputError, match=r"server_settings\.csv cannot be read.*`kv_blocks_total_gpu`"):
        read_experiment_folder(tmp_path)


def test_a_folder_without_runs_says_what_one_needs(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "no such"):
        with pytest.raises(InputError, match=r"holds no experiments.*`exp-config\.yaml`"):
            read_experiment_folder(folder)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"max_num_batched_tokens": "lots"}, "`max_num_batched_tokens` is 'lots'; it must be a whole number"),
        ({"max_num_seqs": 12.5}, "`max_num_seqs` is 12.5; it must be a whole number"),
        ({"max_num_seqs": True}, "`max_num_seqs` is True"),
        ({"max_num_seqs": 0}, "`max_num_seqs` is 0; it must be at least 1"),
        ({"max_num_batched_tokens": 64}, r"`max_num_batched_tokens` \(64\) is below `max_num_seqs`"),
        ({"kv_blocks_total_gpu": 1}, "`kv_blocks` is 1; it must be at least 2"),
        ({"tensor_parallelism": 3}, "`tensor_parallel=3` does not divide the 32 attention heads"),
        ({"tensor_parallelism": "two"}, "`tensor_parallelism` is 'two'"),
        ({"model": None}, "lacks `model`"),
        ({"gpu": "tpu-v5"}, "Unknown accelerator `tpu-v5`. Known: "),
        ({"enable_prefix_caching": "no thanks"}, "`enable_prefix_caching` is 'no thanks'; it must be true or false"),
        ({"pipeline_parallel_size": 2}, "`pipeline_parallel_size: 2` asks for what the simulator does not model"),
        ({"vllm_version": "0.11.0"}, "older than the oldest release"),
        ({"vllm_version": "newest"}, "must be a release of three numbers, like"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(server: dict, message: str, tmp_path) -> None:
    write_run(tmp_path, server={**SERVER, **server})
    with pytest.raises(InputError, match=message):
        read_experiment_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"profile.yaml": None}, r"run-a has neither `results/config\.yaml` nor `profile\.yaml`"),
        ({"results/summary_lifecycle_metrics.json": None}, r"results lacks `summary_lifecycle_metrics\.json`"),
        ({"results/summary_lifecycle_metrics.json": "{"}, r"summary_lifecycle_metrics\.json, line 1: not JSON"),
        ({"results/summary_lifecycle_metrics.json": {"successes": {}}}, "lacks `successes.count`"),
        ({"exp-config.yaml": "a: [1"}, r"exp-config\.yaml cannot be read as YAML"),
        ({"exp-config.yaml": "- a\n- b\n"}, r"exp-config\.yaml holds a list; a file of settings is a mapping"),
        ({"profile.yaml": "just words"}, r"profile\.yaml holds a str"),
        ({"profile.yaml": {**PROFILE, "lora": {"a": 1}}}, "Unknown workload field `lora`"),
        ({"config.json": "{"}, r"config\.json, line 1: not JSON"),
        (
            {"config.json": {**QWEN, "hidden_size": "wide"}},
            r"config\.json: `hidden_size` is 'wide'; it must be a whole number",
        ),
    ],
)
def test_missing_and_broken_files_are_named(files: dict, message: str, tmp_path) -> None:
    write_run(tmp_path, files=files)
    with pytest.raises(InputError, match=message):
        read_experiment_folder(tmp_path)


def test_no_results_at_all(tmp_path) -> None:
    names = ("summary", "stage_0", "stage_1")
    write_run(tmp_path, files={f"results/{name}_lifecycle_metrics.json": None for name in names})
    with pytest.raises(InputError, match="there is nothing to compare with"):
        read_experiment_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "overloaded"),
    [
        ({}, False),
        ({"results/stage_1_lifecycle_metrics.json": summary(50, requests_per_s=7.5)}, True),
        ({"results/stage_1_lifecycle_metrics.json": None}, False),
        # Only the whole run has figures: 120 requests in 20 s were asked for.
        ({"results/stage_0_lifecycle_metrics.json": None, "results/stage_1_lifecycle_metrics.json": None,
          "results/summary_lifecycle_metrics.json": summary(120, requests_per_s=5.9)}, False),
        ({"results/stage_0_lifecycle_metrics.json": None, "results/stage_1_lifecycle_metrics.json": None,
          "results/summary_lifecycle_metrics.json": summary(120, requests_per_s=5.0)}, True),
    ],
)  # fmt: skip
def test_a_run_served_more_slowly_than_asked_is_overloaded(files: dict, overloaded: bool, tmp_path) -> None:
    write_run(tmp_path, files=files)
    assert read_experiment_folder(tmp_path)[0][0].overloaded is overloaded


def test_a_run_in_which_nothing_completed_is_read(tmp_path) -> None:
    nothing = summary(0, failed=120)
    names = ("summary", "stage_0", "stage_1")
    write_run(tmp_path, files={f"results/{name}_lifecycle_metrics.json": nothing for name in names})
    ((experiment, known),) = read_experiment_folder(tmp_path)
    assert experiment.overloaded
    values = known.set_index(["split", "metric", "statistic"])["value"]
    assert values["whole", "completed", "count"] == 0
    assert values["whole", "failed", "count"] == 120
    assert set(known["metric"]) == {"completed", "failed"}


def test_the_public_folder_reads_like_any_other(traces_folder: Path) -> None:
    runs = read_experiment_folder(traces_folder / "experiments")
    assert len(runs) == 16
    assert sum(e.overloaded for e, _ in runs) == 4
    assert all(e.requests is not None for e, _ in runs), "requests/requests.parquet lies beside the folder"
    summaries = measured_latencies(replace(runs[0][0], requests=None))
    assert summaries.shape == runs[0][1].shape


def test_generated_arrivals_bring_prompts_as_long_as_measured(tmp_path) -> None:
    longer = summary()
    longer["successes"]["prompt_len"] = {"mean": 171.0, "median": 170.0, "p90": 180.0, "p99": 190.0}
    write_run(tmp_path, files={"results/summary_lifecycle_metrics.json": longer})
    ((experiment, _),) = read_experiment_folder(tmp_path)
    assert experiment.workload.prompt_len == 170
    assert (np.asarray(experiment.arrivals("poisson").prompt_tokens) == 170).all()
    assert "Prompts have 170 tokens, as measured; 150 were asked for." in experiment.notes


class TestOneBadRun:
    """A bad run is named and does not hide the others."""

    def folder(self, tmp_path: Path) -> Path:
        write_run(tmp_path, "run-a")
        write_run(tmp_path, "run-b", files={"config.json": "{"})
        write_run(tmp_path, "run-c", files={"profile.yaml": None})
        write_run(tmp_path, "run-d", server={**SERVER, "enable_lora": True})
        write_run(tmp_path, "run-e", files={"exp-config.yaml": None})
        return tmp_path

    def test_the_others_are_read(self, tmp_path) -> None:
        cases, bad = read_usable_runs(self.folder(tmp_path))
        assert [experiment.experiment_id for experiment, _ in cases] == ["run-a"]
        assert set(bad) == {"run-b", "run-c", "run-d", "run-e"}
        assert "line 1: not JSON" in bad["run-b"]
        assert "the workload is unknown" in bad["run-c"]
        assert "LoRA" in bad["run-d"]
        assert "lacks `exp-config.yaml`" in bad["run-e"]

    def test_the_command_judges_the_rest_and_exits_with_1(self, tmp_path) -> None:
        done = CliRunner().invoke(app, ["evaluate", "--experiments", str(self.folder(tmp_path)), "--json", "-"])
        assert done.exit_code == 1, done.stderr
        result = json.loads(done.stdout)
        assert [row["experiment_id"] for row in result["per_experiment"]] == ["run-a"]
        assert {row["experiment_id"] for row in result["bad_runs"]} == {"run-b", "run-c", "run-d", "run-e"}
        assert "run-c: cannot be used." in done.stderr

    def test_none_that_can_be_used_is_bad_input(self, tmp_path) -> None:
        write_run(tmp_path, "run-b", files={"config.json": "{"})
        done = CliRunner().invoke(app, ["evaluate", "--experiments", str(tmp_path)])
        assert done.exit_code == 2
        assert "run-b" in done.stderr

    def test_answers_of_another_length_than_asked_for_are_noted(self, tmp_path) -> None:
        long = summary()
        long["successes"]["output_len"] = dict.fromkeys(("mean", "median", "p90", "p99"), 5000.0)
        write_run(tmp_path, files={"results/summary_lifecycle_metrics.json": long})
        ((experiment, _),) = read_experiment_folder(tmp_path)
        assert any("Answers have 5,000 tokens as measured" in note for note in experiment.notes)


def test_a_run_without_streaming_is_judged_by_its_e2e(tmp_path) -> None:
    unary = summary()
    for name in ("time_to_first_token", "inter_token_latency", "time_per_output_token"):
        unary["successes"]["latency"][name] = None
    stages = {f"results/stage_{i}_lifecycle_metrics.json": None for i in (0, 1)}
    write_run(tmp_path, files={"results/summary_lifecycle_metrics.json": unary, **stages})
    done = CliRunner().invoke(app, ["evaluate", "--experiments", str(tmp_path), "--json", "-"])
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)["per_experiment"]
    assert row["e2e_error_percent"] is not None
    assert row["ttft_error_percent"] is row["tpot_error_percent"] is None
    assert row["measured"]["ttft_ms"]["mean"] is row["measured"]["tpot_ms"]["mean"] is None
