"""The simulator does what the real vLLM did, call for call, in every recorded scenario of every recorded release."""

import numpy as np
import pytest
from scenario_adapter import load_recordings, play_calls, play_timed, run_timed

from stepcal.simulator.versions import RELEASES

CALLS = load_recordings("recordings")
TIMED = load_recordings("recordings_timed")

_TIMES = ("first_scheduled_us", "first_token_us", "finish_us")


def name_of(recording: dict) -> str:
    return f"{recording['config']['vllm_version']}/{recording['name']}"


def assert_same(actual: dict, expected: dict) -> None:
    """Equal steps and outcomes, as far as the simulator reports them."""
    for i, (step, recorded) in enumerate(zip(actual["steps"], expected["steps"], strict=False)):
        assert step == {key: recorded[key] for key in step}, f"step {i}"
    assert len(actual["steps"]) == len(expected["steps"])
    for outcome, recorded in zip(actual["outcome"], expected["outcome"], strict=True):
        assert outcome == {key: recorded[key] for key in outcome}


@pytest.mark.parametrize("recording", CALLS, ids=name_of)
def test_every_call_is_that_of_the_real_scheduler(recording: dict) -> None:
    assert_same(play_calls(recording), recording)


@pytest.mark.parametrize("recording", TIMED, ids=name_of)
def test_every_call_and_its_time_are_those_of_the_real_engine(recording: dict) -> None:
    assert_same(play_timed(recording), recording)


@pytest.mark.parametrize("max_jump", [None, 1, 3])
@pytest.mark.parametrize("recording", TIMED, ids=name_of)
def test_jumping_ends_at_the_same_times(recording: dict, max_jump: int | None) -> None:
    expected = {**recording, "steps": []}
    assert_same(play_timed(recording, record=False, max_jump=max_jump), expected)


@pytest.mark.parametrize("recording", TIMED, ids=name_of)
def test_a_callable_step_time_gives_the_same_times(recording: dict) -> None:
    actual = play_timed(recording, record=False, ask=True)
    for outcome, recorded in zip(actual["outcome"], recording["outcome"], strict=True):
        assert outcome["status"] == recorded["status"]
        for key in _TIMES:
            assert np.isclose(outcome[key] or 0.0, recorded[key] or 0.0, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("recording", TIMED, ids=name_of)
def test_jumping_leaves_the_same_free_queue(recording: dict) -> None:
    """Which blocks survive where in the queue decides later hits, so it must not depend on how steps are advanced."""
    queues = []
    for max_jump in (None, 1):
        pool = run_timed(recording, record=False, max_jump=max_jump).pool
        queue, entry = [], int(pool.entries["next"][0])
        while entry:
            kind, count = int(pool.entries["node"][entry]), int(pool.entries["count"][entry])
            if queue and kind < 0 and queue[-1][0] == kind:
                queue[-1] = (kind, queue[-1][1] + count)
            else:
                queue.append((kind, count))
            entry = int(pool.entries["next"][entry])
        queues.append(queue)
    assert queues[0] == queues[1]


def test_there_are_enough_recordings() -> None:
    for release in RELEASES:
        for recordings, n in ((CALLS, 250), (TIMED, 50)):
            assert sum(r["config"]["vllm_version"] == release.version for r in recordings) >= n
    assert {recording["driver"] for recording in CALLS + TIMED} <= {"EngineCore", "own loop"}
    assert {recording["config"]["async_scheduling"] for recording in CALLS} == {False, True}
