"""What sampling costs, by release: the sort where PyTorch sorts, bytes where newer kernels cut tokens off."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcal.simulator.versions import OLDEST, RELEASES
from stepcal.specs.deployment import Deployment
from stepcal.specs.sampling import NEUTRAL, Sampling
from stepcal.step_time.kernel_model import kernel_notes
from stepcal.step_time.sampler import sampler_costs, sampler_note

VERSIONS = [release.version for release in RELEASES]
TOP_P = Sampling(top_p=0.9)


def deployed(version: str | None, sampling: Sampling = TOP_P) -> Deployment:
    limits = {} if version is None else {"kv_blocks": 1000, "vllm_version": version}
    return replace(Deployment.of("llama-2-7b", "h100-sxm", **limits), sampling=sampling)


def test_the_oldest_release_sorts() -> None:
    """40 requests over 32,000 logits: 32 µs for scans of a row, 5 µs a request, 0.15 ns a logit."""
    assert sampler_costs(40, deployed(OLDEST)).cut_us[0] == pytest.approx(32 + 200 + 192)
    assert sampler_costs(40, deployed(None)).total_us[0] == sampler_costs(40, deployed(OLDEST)).total_us[0]


@pytest.mark.parametrize("sampling", [TOP_P, Sampling(top_k=20), Sampling(top_p=0.9, top_k=20)])
def test_newer_releases_cost_less_than_a_sort_and_no_less_than_their_bytes(sampling: Sampling) -> None:
    """4 bytes a logit over 3.35 TB/s is the least that a kernel which looks at all logits can take."""
    sort = sampler_costs(64, deployed("0.15.1", sampling)).total_us[0]
    for version in ("0.19.0", "0.24.0", "0.33.0"):
        costs = sampler_costs(64, deployed(version, sampling))
        assert 64 * 32_000 * 4 / 3.35e12 * 1e6 < costs.total_us[0] < 0.25 * sort


def test_triton_takes_over_from_eight_requests_on() -> None:
    requests = np.array([0, 7, 8, 9])
    oldest, newer = (sampler_costs(requests, deployed(version)).cut_us for version in ("0.15.1", "0.19.0"))
    assert (newer[:2] == oldest[:2]).all()
    assert newer[2] < newer[1]
    assert newer[3] > newer[2]


@given(st.integers(0, 500), st.sampled_from(VERSIONS), st.sampled_from([TOP_P, NEUTRAL, Sampling(top_k=5, top_p=0.5)]))
def test_nothing_costs_less_than_nothing_and_greedy_ones_are_not_cut(n: int, version: str, sampling: Sampling) -> None:
    costs = sampler_costs(n, deployed(version, sampling))
    assert (costs.total_us[0] > 0) == (n > 0)
    greedy = sampler_costs(n, deployed(version, replace(sampling, temperature=0.0)))
    assert greedy.cut_us[0] == 0
    assert greedy.plain_us[0] == costs.plain_us[0]
    assert sampler_costs(n, deployed(version, NEUTRAL)).total_us[0] == greedy.total_us[0]


@pytest.mark.parametrize(
    ("version", "kernel"), [("0.19.0", "Triton"), ("0.24.0", "FlashInfer"), ("0.33.0", "FlashInfer")]
)
def test_a_sampler_that_was_not_timed_is_said(version: str, kernel: str) -> None:
    note = sampler_note(deployed(version))
    assert note is not None
    assert f"{kernel} " in f"{note} "
    assert f"in vLLM {version}, which was not timed" in note
    assert note in kernel_notes(deployed(version))
    assert sampler_note(deployed(version, NEUTRAL)) is None


def test_the_sort_needs_no_note() -> None:
    assert sampler_note(deployed(OLDEST)) is None
    assert sampler_note(deployed(None)) is None
