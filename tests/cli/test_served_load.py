"""What `stepcal simulate` serves and how its clients behave, with 10 ms a step so that times can be counted by hand."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stepcal.cli.main import app

SHARED = {"num_groups": 5, "num_prompts_per_group": 1, "system_prompt_len": 16, "question_len": 16, "output_len": 100}
TRACE = [{"arrival_s": i, "prompt_tokens": 10, "output_tokens": 50} for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("ten-ms.json").write_text('{"variant": "affine", "parameters": [{"name": "constant_us", "value": 10000}]}')
    Path("trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRACE))
    return tmp_path


def workload(load: dict, **shared: object) -> None:
    data = {"type": "shared_prefix", "shared_prefix": {**SHARED, **shared}}
    Path("w.yaml").write_text(yaml.safe_dump({"data": data, "load": load}))


def simulated(*options: object, of: str = "--workload") -> dict:
    source = "w.yaml" if of == "--workload" else "trace.jsonl"
    fixed = ["simulate", "--architecture", "llama-2-7b", "--kv-blocks", "5000", "--coefficients", "ten-ms.json"]
    done = CliRunner().invoke(app, [*fixed, of, source, "--json", "-", "--arrivals", "constant", *map(str, options)])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refused(*options: object, of: str = "--workload") -> str:
    source = "w.yaml" if of == "--workload" else "trace.jsonl"
    fixed = ["simulate", "--architecture", "llama-2-7b", "--kv-blocks", "5000", "--coefficients", "ten-ms.json"]
    done = CliRunner().invoke(app, [*fixed, of, source, *map(str, options)])
    assert done.exit_code == 2, done.output
    return done.stderr


@pytest.mark.usefixtures("folder")
def test_what_exceeds_the_clients_cap_waits_outside_the_latency() -> None:
    load = {"type": "constant", "stages": [{"rate": 10, "duration": 10}]}
    workload({**load, "num_workers": 1, "worker_max_concurrency": 1})
    capped = simulated("--max-num-seqs", 4)
    assert capped["overall"]["e2e_ms"]["mean"] == pytest.approx(1000.0)
    workload(load)
    assert simulated("--max-num-seqs", 4)["overall"]["e2e_ms"]["mean"] > 5000.0
    assert simulated("--max-num-seqs", 4, "--max-in-flight", 1) == {**capped, "wall_s": pytest.approx(0, abs=60)}


@pytest.mark.usefixtures("folder")
def test_a_stage_ends_when_its_requests_have_and_then_the_interval_passes() -> None:
    stages = [{"rate": 3, "duration": 20}, {"rate": 0.5, "duration": 20}]
    workload({"type": "constant", "interval": 600, "stages": stages})
    result = simulated("--max-num-seqs", 1)
    assert result["stages"][1]["e2e_ms"]["mean"] == pytest.approx(1000.0)
    # 60 requests of 1 s one after the other, the pause, 10 requests one every 2 s.
    assert result["simulated_s"] == pytest.approx(60 + 600 + 18 + 1)


@pytest.mark.usefixtures("folder")
def test_turns_that_outgrow_the_server_are_rejected_and_counted() -> None:
    workload({"type": "constant", "stages": [{"rate": 1, "duration": 20}]}, enable_multi_turn_chat=True)
    grown = simulated()
    assert (grown["overall"]["completed"], grown["overall"]["failed"]) == (20, 0)
    result = simulated("--max-model-len", 300)  # 32, 148 and 264 tokens of prompt, and 100 of answer
    assert (result["overall"]["requests"], result["overall"]["completed"], result["overall"]["failed"]) == (20, 10, 10)
    assert "10 of 20 turns outgrow `max_model_len` (300 tokens)" in result["notes"][0]


@pytest.mark.usefixtures("folder")
def test_turns_that_overtake_their_answers_are_noted() -> None:
    workload({"type": "constant", "stages": [{"rate": 10, "duration": 2}]}, enable_multi_turn_chat=True)
    # Five users, a turn each half a second; an answer takes one second.
    assert any("15 of 15 later turns were sent before the answer" in note for note in simulated()["notes"])
    workload({"type": "constant", "stages": [{"rate": 1, "duration": 20}]}, enable_multi_turn_chat=True)
    assert "notes" not in simulated()


@pytest.mark.usefixtures("folder")
def test_a_closed_loop_sends_as_answers_come() -> None:
    result = simulated("--concurrency", 2, of="--requests")
    # Five rounds of 50 steps, two at a time, whatever the arrival times are.
    assert result["overall"]["e2e_ms"]["mean"] == pytest.approx(500.0, rel=0.02)
    assert result["simulated_s"] == pytest.approx(2.5, rel=0.02)
    thinking = simulated("--concurrency", 2, "--think-s", 1.5, of="--requests")
    assert thinking["simulated_s"] == pytest.approx(2.5 + 4 * 1.5, rel=0.02)


@pytest.mark.usefixtures("folder")
def test_a_trace_is_cut_and_scaled() -> None:
    assert simulated(of="--requests")["simulated_s"] == pytest.approx(9.5)
    assert simulated("--first", 3, of="--requests")["overall"]["requests"] == 3
    assert simulated("--from", 2, "--until", 6, of="--requests")["overall"]["requests"] == 4
    assert simulated("--rate-scale", 10, of="--requests")["simulated_s"] == pytest.approx(0.9 + 0.5, rel=0.05)


@pytest.mark.usefixtures("folder")
def test_the_format_of_a_trace_is_noted() -> None:
    assert simulated(of="--requests")["notes"] == ["`trace.jsonl` was read as a trace of the format `table`."]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "of", "message"),
    [
        (["--concurrency", 2, "--max-in-flight", 2], "--requests", "Give one."),
        (["--think-s", 2], "--requests", "needs clients that wait for answers"),
        (["--concurrency", 0], "--requests", "`--concurrency` is 0; it must be at least 1"),
        (["--max-in-flight", -1], "--requests", "`--max-in-flight` is -1; it must be at least 1"),
        (["--concurrency", 2, "--think-s", -1], "--requests", "`think_s` has the value -1.0"),
        (["--first", 2], "--workload", "`--first` cuts or scales a trace"),
        (["--format", "azure"], "--requests", "lacks `TIMESTAMP`"),
        (["--experiment", "x"], "--requests", "has no `experiment_id`"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list, of: str, message: str) -> None:
    workload({"type": "constant", "stages": [{"rate": 1, "duration": 2}]})
    assert message in refused(*options, of=of)
