"""Which release a version is simulated as."""

import numpy as np
import pytest
from recorded_defaults import (
    ABSENT,
    VERSIONS,
    limits_of_api_servers,
    recorded_defaults,
    recorded_offloading,
)

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


@pytest.mark.parametrize("version", VERSIONS)
def test_limits_are_those_that_the_release_chose_on_each_gpu(version: str) -> None:
    release = release_of(version)
    rows = limits_of_api_servers(version)
    assert len(rows) == 13
    for row in rows:
        found = release.limits_on(row["stepcal"] or row["gpu"].lower(), row["memory_mib"] / 1024)
        assert found.max_num_batched_tokens == row["max_num_batched_tokens"], row
        assert found.max_num_seqs == row["max_num_seqs"], row


@pytest.mark.parametrize("version", VERSIONS)
def test_other_defaults_are_those_that_the_release_chose(version: str) -> None:
    release = release_of(version)
    recorded = recorded_defaults(version)
    assert recorded["vllm_version"] == version
    assert recorded["cache"]["gpu_memory_utilization"] == release.gpu_memory_utilization
    assert recorded["scheduler"]["scheduler_reserve_full_isl"] == (True if release.admits_whole_sequences else ABSENT)
    server = ServerConfig(kv_blocks=10, max_num_seqs=1, vllm_version=version)
    assert recorded["cache"]["block_size"] == server.block_size
    assert {row["block_size"] for row in recorded["limits"]} == {server.block_size}
    assert recorded["cache"]["enable_prefix_caching"] == server.enable_prefix_caching
    assert recorded["scheduler"]["async_scheduling"] == server.async_scheduling
    # What is not modelled is off by default, so that a server without flags is simulated as it runs.
    scheduler = recorded["scheduler"]
    assert scheduler["enable_chunked_prefill"] is True
    assert scheduler["policy"] == "fcfs"
    assert scheduler["long_prefill_token_threshold"] == 0
    assert scheduler["max_num_partial_prefills"] in (1, ABSENT)
    assert scheduler["watermark"] in (0.0, ABSENT)
    assert scheduler["prefill_schedule_interval"] in (1, ABSENT)
    for name in ("max_num_active_seqs", "max_num_queued_reqs", "max_num_queued_tokens"):
        assert scheduler[name] in (None, ABSENT)
    assert recorded["performance_mode"] in ("balanced", ABSENT)
    assert recorded["cache"]["kv_offloading_size"] is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_sampler_is_the_one_that_the_release_called(version: str) -> None:
    release = release_of(version)
    names = {"sort": "PyTorch sort", "triton": "Triton", "flashinfer": "FlashInfer"}
    for row in recorded_defaults(version)["sampler"]:
        assert len(row["gpus"]) == 13, row
        if row["cut"] == "none":
            assert row["kernels"] == [], row
        elif row["kernels"] != ["PyTorch top-k"]:  # 0.15.1 sorts less for top-k alone
            path = next(p for p in release.samplers if row["requests"] >= p.from_requests)
            assert row["kernels"] == [names[path.kernel]], row


@pytest.mark.parametrize("version", VERSIONS)
def test_the_offload_pool_is_the_one_that_the_release_had(version: str) -> None:
    """A running request filled the pool; another one's blocks wait for its end, or for the end of a copy."""
    release = release_of(version)
    recorded = recorded_offloading(version)
    assert recorded["vllm_version"] == version
    for kind in ("sync", "async"):
        for name, copy_steps in (("refused", 1), ("refused_slow", 20)):
            refused, end_of_copy = recorded[kind][name], 0 + copy_steps + 1
            if release.holds_offloaded_blocks:
                assert refused["last_refused"] > refused["first_ends"]
            else:
                assert (refused["last_refused"] or 0) <= end_of_copy < refused["first_ends"]
    stored = recorded["async"]["stored"]
    n_stored = sum(stored["blocks_by_call"].values())
    assert n_stored == (stored["full_blocks"] if release.offloads_outputs else stored["prompt_blocks"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_load_from_the_pool_takes_a_prompt_and_holds_up_nobody_else(version: str) -> None:
    """What the simulator leaves out, as recorded: four blocks come back, the request waits, and one beside it runs on."""
    for kind in ("sync", "async"):
        recorded = recorded_offloading(version)[kind]
        _, _, n_computed, n_loaded, _ = recorded["loaded"]["found"][0]
        assert (n_computed, n_loaded) == (0, 64)
        assert [tokens for _, tokens in recorded["loaded"]["of_request"]][-4:] == [1, 1, 1, 1]
        waits = [call for call, tokens in recorded["waiting"]["of_request"] if tokens == "load"]
        assert len(waits) >= 5
        assert set(waits) <= {call for call, _ in recorded["waiting"]["beside"]}


@pytest.mark.parametrize(("version", "is_slower"), [("0.15.1", True), ("0.19.0", True), ("0.24.0", False)])
def test_a_full_offload_pool_costs_time_where_blocks_are_held(version: str, is_slower: bool) -> None:
    requests = make_requests(np.zeros(8), [[(i, 200)] for i in range(8)], 100)
    step_time = CompiledStepTime(constant_us=1000.0, host_rejected_us=500.0)
    times = []
    for offload_blocks in (0, 20):
        server = ServerConfig(kv_blocks=500, vllm_version=version, offload_blocks=offload_blocks)
        times.append(simulate(requests, server, step_time).simulated_s)
    assert (times[1] > times[0]) == is_slower
