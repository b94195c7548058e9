"""The simulator equals the independent slow reference on random scenarios, for each recorded release of vLLM.

``STEPCAL_RANDOM_CASES=2500 pytest tests/simulator/test_random_scenarios.py`` is the full run; normally a fixed subset
is played.
"""

import os

import pytest
import vllm_reference
from random_scenarios import random_scenario, random_timed_scenario
from scenario_adapter import play_calls, play_timed
from test_conformance import assert_same

from stepcal.simulator.versions import RELEASES

N_CASES = int(os.environ.get("STEPCAL_RANDOM_CASES", "75"))
_BATCH = 25

BATCHES = [range(first, min(first + _BATCH, N_CASES)) for first in range(0, N_CASES, _BATCH)]
VERSIONS = [release.version for release in RELEASES]


def of_version(scenario: dict, version: str) -> dict:
    return {**scenario, "config": {**scenario["config"], "vllm_version": version}}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_calls_equal_those_of_the_reference(seeds: range, version: str) -> None:
    for seed in seeds:
        scenario = of_version(random_scenario(seed), version)
        assert_same(play_calls(scenario), vllm_reference.simulate(scenario))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_times_equal_those_of_the_reference(seeds: range, version: str) -> None:
    for seed in seeds:
        scenario = of_version(random_timed_scenario(seed), version)
        expected = vllm_reference.simulate(scenario, vllm_reference.affine_step_time_us(scenario["step_time"]))
        assert_same(play_timed(scenario), expected)
        assert_same(play_timed(scenario, record=False), {**expected, "steps": []})


def test_releases_differ() -> None:
    """So that a rule which is not played cannot pass."""
    played = {}
    for version in VERSIONS:
        scenarios = [of_version(random_scenario(seed), version) for seed in range(100)]
        played[version] = [play_calls(scenario)["steps"] for scenario in scenarios]
    assert played["0.15.1"] != played["0.19.0"] != played["0.24.0"] == played["0.33.0"]
