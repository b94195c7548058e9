"""Rows that parameters are learned from."""

import numpy as np

from stepcal.calibration.training_rows import batch_rejections
from stepcal.studies.published_runs import load_experiments


def test_requests_are_rejected_by_a_small_pool_in_releases_that_hold_it() -> None:
    """The same pool rejects nobody where blocks are given back once they are copied, as in the simulator."""
    overloaded = next(e for e in load_experiments() if e.overloaded and e.server.offload_blocks)
    running, kv_tokens = np.array([10.0, 100.0]), np.array([5_000.0, 150_000.0])
    rejected = {
        version: batch_rejections(overloaded.with_server(vllm_version=version), running, kv_tokens)
        for version in ("0.15.1", "0.20.0", "0.21.0", "0.33.0")
    }
    assert rejected["0.15.1"][0] == 0
    assert rejected["0.15.1"][1] > 50
    assert (rejected["0.20.0"] == rejected["0.15.1"]).all()
    assert not rejected["0.21.0"].any()
    assert not rejected["0.33.0"].any()
    none = overloaded.with_server(offload_blocks=0)
    assert not batch_rejections(none, running, kv_tokens).any()
