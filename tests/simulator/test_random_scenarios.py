"""The simulator equals the independent slow reference on random scenarios.

``STEPCAL_RANDOM_CASES=2000 pytest tests/simulator/test_random_scenarios.py`` is the full run; normally a fixed subset
is played.
"""

import os

import pytest
import vllm_reference
from random_scenarios import random_scenario, random_timed_scenario
from scenario_adapter import play_calls, play_timed
from test_conformance import assert_same

N_CASES = int(os.environ.get("STEPCAL_RANDOM_CASES", "150"))
_BATCH = 25

BATCHES = [range(first, min(first + _BATCH, N_CASES)) for first in range(0, N_CASES, _BATCH)]


@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_calls_equal_those_of_the_reference(seeds: range) -> None:
    for seed in seeds:
        scenario = random_scenario(seed)
        assert_same(play_calls(scenario), vllm_reference.simulate(scenario))


@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_times_equal_those_of_the_reference(seeds: range) -> None:
    for seed in seeds:
        scenario = random_timed_scenario(seed)
        expected = vllm_reference.simulate(scenario, vllm_reference.affine_step_time_us(scenario["step_time"]))
        assert_same(play_timed(scenario), expected)
        assert_same(play_timed(scenario, record=False), {**expected, "steps": []})
