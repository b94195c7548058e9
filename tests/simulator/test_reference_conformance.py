"""The slow reference equals every recording of the real vLLM, step for step."""

import gzip
import json
from pathlib import Path

import pytest
from random_scenarios import random_scenario, random_timed_scenario
from vllm_reference import affine_step_time_us, simulate

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"


def recordings(folder: str) -> list:
    """Every recording of a folder as a pytest parameter, named by group and scenario."""
    paths = sorted((CONFORMANCE / folder).rglob("*.json.gz"))
    return [
        pytest.param(recording, id=f"{path.parent.name}/{path.name.removesuffix('.json.gz')}/{recording['name']}")
        for path in paths
        for recording in json.loads(gzip.decompress(path.read_bytes()))
    ]


STEP_RECORDINGS = recordings("recordings")
TIMED_RECORDINGS = recordings("recordings_timed")


def assert_equal_runs(actual: dict, expected: dict) -> None:
    """Compare row by row, so that a failure names the first step that differs."""
    for i, (actual_step, expected_step) in enumerate(zip(actual["steps"], expected["steps"], strict=False)):
        assert actual_step == expected_step, f"step {i}"
    assert len(actual["steps"]) == len(expected["steps"])
    assert actual["outcome"] == expected["outcome"]


@pytest.mark.parametrize("recording", STEP_RECORDINGS)
def test_reference_reproduces_recording(recording: dict) -> None:
    assert_equal_runs(simulate(recording), recording)


@pytest.mark.parametrize("recording", TIMED_RECORDINGS)
def test_reference_reproduces_timed_recording(recording: dict) -> None:
    assert_equal_runs(simulate(recording, affine_step_time_us(recording["step_time"])), recording)


def test_there_are_enough_recordings() -> None:
    assert len(STEP_RECORDINGS) >= 60
    assert all(p.values[0]["driver"] == "EngineCore" for p in [*STEP_RECORDINGS, *TIMED_RECORDINGS])


def test_recorded_random_scenarios_are_what_the_generator_makes() -> None:
    """So that the recorded seeds keep testing the generator that the property tests use."""
    for p in STEP_RECORDINGS:
        if p.values[0]["name"].startswith("random-"):
            made = random_scenario(int(p.values[0]["name"].removeprefix("random-")))
            config = {key: value for key, value in p.values[0]["config"].items() if key != "vllm_version"}
            assert made["config"] == config
            assert [r["prompt_segments"] for r in made["requests"]] == [
                r["prompt_segments"] for r in p.values[0]["requests"]
            ]
    for p in TIMED_RECORDINGS:
        if p.values[0]["name"].startswith("random-timed-"):
            made = random_timed_scenario(int(p.values[0]["name"].removeprefix("random-timed-")))
            assert made["requests"] == p.values[0]["requests"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_tokens": 0}, "at least 1"),
        ({"prompt_segments": []}, "at least 1"),
        ({"output_tokens": 60}, "max_model_len"),
        ({"output_tokens": 40}, "KV blocks"),
    ],
)
def test_reference_refuses_what_can_never_run(change: dict, message: str) -> None:
    request = {
        "index": 0,
        "arrival_step": 0,
        "prompt_segments": [[1, 10]],
        "output_tokens": 1,
        "output_content": None,
        "abort_step": None,
    }
    config = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 16,
        "num_gpu_blocks": 4,
        "block_size": 16,
        "max_model_len": 64,
        "enable_prefix_caching": True,
        "async_scheduling": False,
    }
    with pytest.raises(ValueError, match=message):
        simulate({"config": config, "requests": [request | change]})
