"""``stepcal evaluate``: measured experiments against their simulation, ours and others', as JSON and in words."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.locations import data_folder
from stepcal.step_time.coefficients import load_coefficients

runner = CliRunner()
SUMMARY = {"requests", "completed", "failed", "e2e_ms", "ttft_ms", "itl_ms", "tpot_ms", "requests_per_s"}
ERRORS = ("e2e_error_percent", "ttft_error_percent", "tpot_error_percent")


def run(*arguments: object):
    return runner.invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def no_traces(monkeypatch, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("STEPCAL_DATA", str(empty))
    monkeypatch.setattr("stepcal.datasets.catalogue.cache_folder", lambda: empty / "no cache")


def check(result: dict) -> None:
    assert {"per_experiment", "mean_abs_e2e_error_percent", "n_below_10_percent", "mspe_percent"} <= set(result)
    for row in result["per_experiment"]:
        assert {"experiment_id", "measured", "predicted", *ERRORS} <= set(row)
        assert set(row["measured"]) == SUMMARY
        if row["predicted"] is None:
            assert row["reason"]
            assert [row[key] for key in ERRORS] == [None, None, None]
        else:
            assert set(row["predicted"]) == SUMMARY
            assert set(row["predicted"]["e2e_ms"]) == {"mean", "p50", "p90", "p99"}


def test_with_traces_arrivals_are_replayed(traces_folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("STEPCAL_DATA", str(traces_folder))
    done = run("--coefficients", "model36", "--json", "-")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    check(result)
    assert (result["coefficients"], result["arrivals"]) == ("model36", "replayed")
    assert len(result["per_experiment"]) == 16
    evaluable = [row for row in result["per_experiment"] if row["predicted"]]
    assert len(evaluable) == 8
    assert [row["predicted"]["requests"] for row in evaluable] == [row["measured"]["requests"] for row in evaluable]
    assert "8 evaluable experiments below 10%" in done.stderr
    assert "not evaluable" in done.stderr


def test_the_default_speaks_of_all_16(traces_folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("STEPCAL_DATA", str(traces_folder))
    done = run("--json", "-")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    check(result)
    assert (result["coefficients"], result["arrivals"]) == ("default", "replayed")
    assert [row["predicted"] is None for row in result["per_experiment"]] == [False] * 16
    calm = [row for row in result["per_experiment"] if not row["overloaded"]]
    assert len(calm) == 12
    assert max(abs(row["e2e_error_percent"]) for row in calm) < 5


@pytest.mark.usefixtures("no_traces")
def test_without_traces_arrivals_are_generated(tmp_path) -> None:
    out = tmp_path / "out.json"
    done = run("--coefficients", "global9", "--json", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    result = json.loads(out.read_text())
    check(result)
    assert result["arrivals"] == "poisson"
    assert len(result["per_experiment"]) == 16
    assert sum(row["predicted"]["requests"] for row in result["per_experiment"]) == 151_200
    signed = [row["e2e_error_percent"] for row in result["per_experiment"]]
    assert result["mspe_percent"] == pytest.approx(sum(signed) / 16)
    assert result["mean_abs_e2e_error_percent"] == pytest.approx(sum(map(abs, signed)) / 16)


@pytest.mark.usefixtures("no_traces")
def test_a_replay_without_requests_is_refused(tmp_path) -> None:
    out = tmp_path / "out.json"
    done = run("--arrivals", "replayed", "--json", out)
    assert done.exit_code == 2
    assert "STEPCAL_DATA" in done.stderr
    assert not out.exists()


def lifecycle(completed: int, e2e_s: float, failed: int = 0) -> dict:
    def seconds(value: float) -> dict:
        return {"mean": value, "median": value, "p90": value, "p99": value}

    latencies = ("request_latency", "time_to_first_token", "inter_token_latency", "time_per_output_token")
    names = ("requests_per_sec", "input_tokens_per_sec", "output_tokens_per_sec", "total_tokens_per_sec")
    successes = {
        "count": completed,
        "latency": {key: seconds(e2e_s if key == "request_latency" else 0.01) for key in latencies},
        "prompt_len": seconds(60),
        "output_len": seconds(21),
        "throughput": dict.fromkeys(names, 5.0),
    }
    return {
        "load_summary": {"count": completed + failed},
        "successes": successes if completed else {"count": 0},
        "failures": {"count": failed},
    }


@pytest.fixture
def others(tmp_path) -> Path:
    """Two runs of somebody else: 20 decode steps of 10 ms each, measured as such in one and twice as long in the other."""
    folder = tmp_path / "mine"
    server = {
        "model": "llama-2-7b", "tensor_parallelism": 1, "max_model_len": 1024, "max_num_seqs": 16,
        "max_num_batched_tokens": 256, "kv_blocks": 500,
    }  # fmt: skip
    lengths = {"num_groups": 2, "num_prompts_per_group": 2, "system_prompt_len": 32, "question_len": 28}
    profile = {
        "data": {"type": "shared_prefix", "shared_prefix": {**lengths, "output_len": 21}},
        "load": {"type": "constant", "stages": [{"rate": 5, "duration": 20}]},
    }
    for name, e2e_s in (("exact", 0.215), ("slow", 0.43)):
        (folder / name / "results").mkdir(parents=True)
        (folder / name / "exp-config.yaml").write_text(yaml.safe_dump(server))
        (folder / name / "profile.yaml").write_text(yaml.safe_dump(profile))
        (folder / name / "results" / "summary_lifecycle_metrics.json").write_text(json.dumps(lifecycle(100, e2e_s)))
    pace = {"variant": "affine", "parameters": [{"name": "constant_us", "value": 10_000.0}]}
    (tmp_path / "pace.json").write_text(json.dumps(pace))
    return folder


def test_a_folder_of_others(others: Path) -> None:
    done = run("--experiments", others, "--coefficients", others.parent / "pace.json", "--json", "-")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    check(result)
    assert result["arrivals"] == "poisson"
    exact, slow = result["per_experiment"]
    assert (exact["experiment_id"], slow["experiment_id"]) == ("exact", "slow")
    assert exact["predicted"]["completed"] == exact["measured"]["completed"] == 100
    assert abs(exact["e2e_error_percent"]) < 5
    assert slow["e2e_error_percent"] == pytest.approx(-50, abs=3)
    assert exact["overloaded"] is False
    assert result["n_below_10_percent"] == 1
    assert result["mspe_percent"] == pytest.approx((exact["e2e_error_percent"] + slow["e2e_error_percent"]) / 2)
    assert "1 of 2 evaluable experiments below 10%" in done.stderr
    assert "failed 0 (measured 0)" in done.stderr


def test_the_api_overheads_of_coefficients_reach_the_client(others: Path) -> None:
    """The learned time between client and engine adds to TTFT and E2E alike, and leaves the time per token alone."""
    content = json.loads((data_folder() / "coefficients" / "default.json").read_text())
    number = next(p for p in content["parameters"] if p["name"] == "api_before_us")
    means = []
    for value in (number["value"], 0.001):
        number["value"] = value
        (others.parent / "mine.json").write_text(json.dumps(content))
        done = run("--experiments", others, "--coefficients", others.parent / "mine.json", "--json", "-")
        predicted = json.loads(done.stdout)["per_experiment"][0]["predicted"]
        means.append({m: predicted[m]["mean"] for m in ("e2e_ms", "ttft_ms", "tpot_ms")})
    frozen = load_coefficients("default").api_overheads_us()["api_before_us"] / 1e3
    for metric, expected in (("e2e_ms", frozen), ("ttft_ms", frozen), ("tpot_ms", 0.0)):
        assert means[0][metric] - means[1][metric] == pytest.approx(expected, abs=1e-3)
    plain = json.loads(run("--experiments", others, "--json", "-").stdout)
    assert plain["coefficients"] == "default"
    assert plain["per_experiment"][0]["predicted"]["ttft_ms"]["mean"] == means[0]["ttft_ms"]


def test_the_same_seed_gives_the_same_bytes(others: Path) -> None:
    outputs = [
        run("--experiments", others, "--coefficients", "global9", "--seed", seed, "--json", "-").stdout
        for seed in (1, 1, 2)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_folder_of_a_family_that_was_never_fitted(others: Path) -> None:
    done = run("--experiments", others, "--coefficients", "model36", "--json", "-")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    check(result)
    assert result["mean_abs_e2e_error_percent"] is None
    assert result["mspe_percent"] is None
    assert result["n_below_10_percent"] == 0
    assert "exact: not evaluable. `model36` was fitted to" in done.stderr


def test_a_run_in_which_nothing_completed_is_not_evaluable(others: Path) -> None:
    file = others / "slow" / "results" / "summary_lifecycle_metrics.json"
    file.write_text(json.dumps(lifecycle(0, 1.0, failed=100)))
    done = run("--experiments", others, "--coefficients", others.parent / "pace.json", "--json", "-")
    assert done.exit_code == 0, (done.stderr, done.exception)
    result = json.loads(done.stdout)
    check(result)
    assert result["per_experiment"][1]["e2e_error_percent"] is None
    assert result["per_experiment"][1]["measured"]["failed"] == 100
    assert "slow: not evaluable. No request completed" in done.stderr


def test_the_accelerator_is_an_option(others: Path) -> None:
    arguments = ("--experiments", others, "--coefficients", "global9", "--json", "-")
    fast, slow = (json.loads(run(*arguments, "--accelerator", gpu).stdout) for gpu in ("b200", "a100-80gb"))
    means = [r["per_experiment"][0]["predicted"]["e2e_ms"]["mean"] for r in (fast, slow)]
    assert means[0] < means[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--coefficients", "model99"),
            "`model99` is neither a file nor a set of coefficients. Known: default",
        ),
        (("--experiments", "no such folder"), "holds no experiments"),
        (("--arrivals", "bursts"), "`--arrivals` is 'bursts'"),
        (("--arrivals", "replayed", "--experiments", "mine"), "cannot be replayed"),
        (("--accelerator", "tpu", "--experiments", "mine"), "Unknown accelerator `tpu`"),
        (("--seed", -1), "--seed"),
        (("--json", "no/such/folder.json"), "Cannot write no/such/folder.json"),
    ],
)
@pytest.mark.usefixtures("no_traces", "others")
def test_bad_input_exits_with_2_and_writes_nothing(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    options = arguments if "--json" in arguments else (*arguments, "--json", "out.json")
    done = run("--coefficients", "global9", *options)
    assert done.exit_code == 2, (done.stderr, done.exception)
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("others")
def test_coefficients_that_lack_a_parameter_are_bad_input(tmp_path) -> None:
    """Not sixteen experiments that cannot be evaluated."""
    file = tmp_path / "half.json"
    file.write_text(json.dumps({"variant": "blackbox", "parameters": [{"name": "intercept", "value": 1.0}]}))
    done = run("--experiments", tmp_path / "mine", "--coefficients", file, "--json", "-")
    assert done.exit_code == 2
    assert "half.json lacks `prefill_tokens`" in done.stderr
