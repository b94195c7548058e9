"""Which release a version is simulated as."""

import numpy as np
import pytest

from stepcal.errors import InputError, NotModelledError
from stepcal.simulator import CompiledStepTime, ServerConfig, make_requests, simulate
from stepcal.simulator.versions import NEWEST, OLDEST, RELEASES, release_of, version_note


def test_recorded_releases_are_themselves() -> None:
    for release in RELEASES:
        assert release_of(release.version) is release
        assert version_note(release.version) is None


@pytest.mark.parametrize(
    ("version", "simulated"), [("0.18.1", "0.15.1"), ("0.23.0", "0.19.0"), ("v0.30.0", "0.24.0"), ("1.2.3", NEWEST)]
)
def test_others_are_the_nearest_earlier_one_with_a_note(version: str, simulated: str) -> None:
    assert ServerConfig(kv_blocks=10, max_num_seqs=1, vllm_version=version).release.version == simulated
    note = version_note(version)
    assert note is not None
    assert simulated in note


def test_older_ones_are_refused() -> None:
    with pytest.raises(NotModelledError, match=f"older than the oldest .* {OLDEST}"):
        ServerConfig(kv_blocks=10, max_num_seqs=1, vllm_version="0.11.0")


@pytest.mark.parametrize("version", ["", "latest", "0.15", "0.15.1; rm"])
def test_what_is_no_release_is_refused(version: str) -> None:
    with pytest.raises(InputError, match="must be a release"):
        release_of(version)


@pytest.mark.parametrize(("version", "is_slower"), [("0.15.1", True), ("0.19.0", True), ("0.24.0", False)])
def test_a_full_offload_pool_costs_time_where_blocks_are_held(version: str, is_slower: bool) -> None:
    requests = make_requests(np.zeros(8), [[(i, 200)] for i in range(8)], 100)
    step_time = CompiledStepTime(constant_us=1000.0, host_rejected_us=500.0)
    times = []
    for offload_blocks in (0, 20):
        server = ServerConfig(kv_blocks=500, vllm_version=version, offload_blocks=offload_blocks)
        times.append(simulate(requests, server, step_time).simulated_s)
    assert (times[1] > times[0]) == is_slower
