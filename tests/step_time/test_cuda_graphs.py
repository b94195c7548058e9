"""Captured CUDA graphs are those of each release's own code, and a step runs in the smallest that holds it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_defaults import VERSIONS, recorded_defaults

from stepcal.simulator import ServerConfig
from stepcal.step_time.cuda_graphs import graph_sizes, padded_tokens

NAMES = {"NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA B200": "b200"}


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_are_those_that_the_release_chose(version: str) -> None:
    rows = recorded_defaults(version)["capture_sizes"]
    assert len(rows) > 40
    for row in rows:
        limits = {name: row[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
        server = ServerConfig(kv_blocks=100, vllm_version=version, **limits)
        assert graph_sizes(server, NAMES[row["gpu"]]).tolist() == row["graphs"], row


@pytest.mark.parametrize("version", VERSIONS)
def test_the_largest_size_on_each_gpu_is_the_recorded_one(version: str) -> None:
    for row in recorded_defaults(version)["limits"]:
        if row["stepcal"] is not None:
            limits = {name: row[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
            server = ServerConfig(kv_blocks=100, vllm_version=version, **limits)
            assert graph_sizes(server, row["stepcal"])[-1] == row["largest_graph"], row


def test_releases_differ() -> None:
    """So that a rule which is not played cannot pass."""
    sizes = {v: [tuple(row["graphs"]) for row in recorded_defaults(v)["capture_sizes"]] for v in VERSIONS}
    assert sizes["0.15.1"] == sizes["0.20.0"]
    assert sizes["0.20.0"] != sizes["0.21.0"] == sizes["0.24.0"]
    assert sizes["0.24.0"] != sizes["0.29.0"] != sizes["0.33.0"]


@given(st.integers(0, 2000), st.integers(1, 1024), st.sampled_from(VERSIONS))
def test_a_step_runs_in_the_smallest_graph_that_holds_it(tokens: int, seqs: int, version: str) -> None:
    sizes = graph_sizes(
        ServerConfig(kv_blocks=100, max_num_seqs=seqs, max_num_batched_tokens=2048, vllm_version=version), "h100-sxm"
    ).tolist()
    holding = [size for size in sizes if size >= tokens]
    expected = holding[0] if holding and tokens else tokens
    assert padded_tokens(tokens, sizes) == expected
    assert (padded_tokens([tokens, tokens], sizes) == np.array([expected, expected])).all()
