"""Priorities and the threshold for long prefills, from the files and flags that ask for them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.datasets.request_traces import read_request_trace
from stepcal.errors import InputError, NotModelledError
from stepcal.experiments.vllm_flags import flags_of
from stepcal.simulator import LoadStage, ServerConfig, Workload, make_requests, replay_requests

SERVER = ["--architecture", "llama-2-7b", "--kv-blocks", "2000", "--coefficients", "default", "--max-num-seqs", "4"]


def trace(path: Path, priority: list[object]) -> Path:
    n = len(priority)
    table = {"arrival_s": np.arange(n) * 0.01, "prompt_tokens": 400, "output_tokens": 40, "priority": priority}
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def simulated(path: Path, *options: str) -> dict:
    run = CliRunner().invoke(app, ["simulate", *SERVER, "--requests", str(path), *options, "--json", "-"])
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)


def test_simulate_serves_by_the_priorities_of_a_table(tmp_path: Path) -> None:
    """One class of requests: priorities change who waits, not how much work there is."""
    path = trace(tmp_path / "t.csv", [i % 3 for i in range(60)])
    plain = simulated(path)
    by_priority = simulated(path, "--scheduling-policy", "priority")
    assert by_priority["overall"]["completed"] == plain["overall"]["completed"] == 60
    assert by_priority["overall"]["ttft_ms"]["p99"] > plain["overall"]["ttft_ms"]["p99"]
    assert by_priority["overall"]["ttft_ms"]["p50"] != plain["overall"]["ttft_ms"]["p50"]
    equal = trace(tmp_path / "equal.csv", [5] * 60)
    same = simulated(equal, "--scheduling-policy", "priority")["overall"]
    assert same["ttft_ms"] == pytest.approx(plain["overall"]["ttft_ms"], rel=1e-9)


def test_simulate_takes_a_threshold_and_whole_prompts(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.csv", [0] * 20)
    limits = ("--max-num-batched-tokens", "512", "--max-model-len", "512")
    plain = simulated(path, *limits)
    assert simulated(path, *limits, "--long-prefill-token-threshold", "64")["steps"] > plain["steps"]
    assert simulated(path, *limits, "--no-enable-chunked-prefill")["overall"]["completed"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduling-policy", "sjf"], "scheduling_policy"),
        (["--long-prefill-token-threshold", "-1"], "long_prefill_token_threshold"),
        (["--no-enable-chunked-prefill"], "max_num_batched_tokens"),
    ],
)
def test_simulate_refuses_what_vllm_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    path = trace(tmp_path / "t.csv", [0])
    run = CliRunner().invoke(app, ["simulate", *SERVER, "--requests", str(path), *options])
    assert run.exit_code != 0
    assert message in run.output


def test_priorities_without_effect_are_noted(tmp_path: Path) -> None:
    mixed, equal = trace(tmp_path / "a.csv", [0, 1]), trace(tmp_path / "b.csv", [4, 4])
    ordered = ("--scheduling-policy", "priority")
    assert any("have no effect" in note for note in simulated(mixed)["notes"])
    assert any("other than the others'" in note for note in simulated(equal, *ordered)["notes"])
    for notes in (simulated(mixed, *ordered)["notes"], simulated(equal)["notes"]):
        assert not any("priorit" in note.lower() for note in notes)


@pytest.mark.parametrize("priority", [[0.5, 1.0], [float("nan"), 0.0], [2**40, 0], ["a", "b"]])
def test_a_list_has_whole_priorities(priority: list) -> None:
    with pytest.raises(InputError, match=r"`priority` is .* whole numbers"):
        make_requests([0.0, 0.0], [[(0, 100)], [(0, 100)]], 5, priority=np.array(priority))
    with pytest.raises(InputError, match=r"`group_priorities` is .* whole numbers"):
        workload(group_priorities=tuple(priority))


def test_a_trace_has_priorities_or_none(tmp_path: Path) -> None:
    assert read_request_trace(trace(tmp_path / "a.csv", [2, -1, None])).table["priority"].tolist() == [2, -1, 0]
    table = pd.read_csv(trace(tmp_path / "b.csv", [1])).drop(columns="priority")
    table.to_csv(tmp_path / "c.csv", index=False)
    assert "priority" not in read_request_trace(tmp_path / "c.csv").table


@pytest.mark.parametrize("value", [0.5, "high", 2**40])
def test_a_priority_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match="row 2: `priority`"):
        read_request_trace(trace(tmp_path / "t.csv", [1, value]))


def workload(**changes: object) -> Workload:
    stages = (LoadStage(rate=10.0, duration_s=3.0),)
    sizes = {"n_groups": 2, "n_prompts_per_group": 3, "system_prompt_len": 100, "question_len": 50, "output_len": 20}
    return Workload(**{**sizes, "stages": stages, **changes})


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_workload_has_a_priority_for_each_group(is_chat: bool) -> None:
    requests = workload(group_priorities=(3, 1), multi_turn_chat=is_chat).requests("constant")
    assert requests.priority is not None
    assert requests.priority.tolist() == [3, 3, 3, 1, 1, 1] * 5
    assert workload(multi_turn_chat=is_chat).requests("constant").priority is None
    with pytest.raises(InputError, match="group_priorities"):
        workload(group_priorities=(1,))


def test_a_replayed_table_goes_before_its_workload() -> None:
    table = pd.DataFrame({"index": range(4), "arrival_time_us": range(4), "prompt_tokens": 160, "output_tokens": 20})
    groups = workload(group_priorities=(3, 1))
    assert replay_requests(table, groups).priority.tolist() == [3, 3, 3, 1]
    assert replay_requests(table.assign(priority=[5, 6, 7, 8]), groups).priority.tolist() == [5, 6, 7, 8]
    assert replay_requests(table.assign(priority=[5, 6, 7, 8])).priority.tolist() == [5, 6, 7, 8]
    assert replay_requests(table).priority is None


def test_flags_of_vllm_act() -> None:
    arguments = "--scheduling-policy priority --long-prefill-token-threshold 256"
    values, notes = flags_of({"args": arguments}, Path("exp-config.yaml"))
    assert values == {"scheduling_policy": "priority", "long_prefill_token_threshold": 256}
    assert not notes
    server = ServerConfig.from_vllm_arguments({"kv_blocks": 100, **values})
    assert (server.scheduling_policy, server.long_prefill_token_threshold) == ("priority", 256)
    with pytest.raises(NotModelledError, match="adaptive"):
        ServerConfig.from_vllm_arguments({"kv_blocks": 100, "long_prefill_token_threshold_adaptive": True})
