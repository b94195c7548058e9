"""What a pool in CPU memory could give back beyond the GPU's own prefix cache."""

import numpy as np
import pytest

from stepcal.simulator import CompiledStepTime, ServerConfig, make_requests, simulate
from stepcal.studies.diagnosis.pool_hits import count_hits, prompt_tokens

STEP_TIME = CompiledStepTime(constant_us=1000.0)
PROMPTS = [[(1, 40), (10 + i % 3, 60)] for i in range(12)]
"""Three texts of 100 tokens behind one beginning of 40, one request after the other."""


def served(**limits: object):
    requests = make_requests(0.5 * np.arange(12), PROMPTS, 5)
    return simulate(
        requests, ServerConfig(**{"kv_blocks": 200, "max_num_seqs": 4, **limits}), STEP_TIME, record_steps=1.0
    )


def test_a_cache_that_has_everything_leaves_nothing() -> None:
    result = served()
    counts = count_hits(result, 16)
    assert prompt_tokens(result.requests).tolist() == [100] * 12
    assert counts["prompt_tokens"] == 1200
    # The first text is new, the next two begin with 32 known tokens in whole blocks, the other nine have 96.
    assert counts["gpu_hit_tokens"] == 2 * 32 + 9 * 96
    assert counts["pool_hit_tokens"] == 0


@pytest.mark.parametrize("limits", [{"enable_prefix_caching": False}, {"kv_blocks": 12}])
def test_what_the_cache_lacks_is_the_pools(limits: dict) -> None:
    counts = count_hits(served(**limits), 16)
    assert counts["gpu_hit_tokens"] + counts["pool_hit_tokens"] == 2 * 32 + 9 * 96
    assert counts["pool_hit_tokens"] > 0
    assert counts["admitted"] == 12


def test_tokens_computed_again_after_a_preemption_are_counted() -> None:
    requests = make_requests(np.zeros(2), [[(1, 64)], [(2, 64)]], 60)
    result = simulate(requests, ServerConfig(kv_blocks=13, max_num_seqs=2), STEP_TIME, record_steps=1.0)
    assert result.preemptions > 0
    counts = count_hits(result, 16)
    # Who is preempted has its prompt and some outputs; blocks that nobody took meanwhile are hits.
    assert 0 < counts["resumed_tokens"] < result.preemptions * (64 + 60)
    assert counts["pool_hit_tokens"] == 0


def test_steps_are_needed() -> None:
    requests = make_requests(np.zeros(1), [[(1, 64)]], 5)
    result = simulate(requests, ServerConfig(kv_blocks=13, max_num_seqs=2), STEP_TIME)
    with pytest.raises(ValueError, match="record_steps=1"):
        count_hits(result, 16)
