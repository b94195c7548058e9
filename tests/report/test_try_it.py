"""What the browser gets of a deployment adds up to what the Python model says."""

import numpy as np
import pytest

from stepcal.report.try_it import SAMPLINGS, deployments, exported
from stepcal.step_time.coefficients import load_coefficients


def term(part, batch, context):
    table = part["by_requests"][batch] if "by_requests" in part else 0.0
    return (
        table + part.get("constant", 0) + part.get("by_request", 0) * batch + part.get("by_token", 0) * batch * context
    )


@pytest.mark.parametrize(("model", "gpu"), [("llama-3.1-8b-instruct", "h100-sxm"), ("mixtral-8x7b-v0.1", "a100-80gb")])
def test_parts_add_up_to_the_step(model, gpu):
    default = load_coefficients("default")
    for one in deployments([model], [gpu]):
        own = exported(one, default)
        for batch, context in ((1, 1), (33, 1000), (128, 4000)):
            gpu_us = sum(term(p, batch, context) for p in own["parts"]) + own["sampler"]["none"][batch]
            expected = default.predict_us(one, decode_kv_lens=[context] * batch)
            assert max(gpu_us, own["host"] * batch) == pytest.approx(expected, rel=1e-12)
            assert term(own["floor"], batch, context) < gpu_us
        assert set(own["sampler"]) == set(SAMPLINGS)
        assert np.all(np.asarray(own["sampler"]["top_p"]) >= np.asarray(own["sampler"]["none"]))


def test_weights_that_do_not_fit_are_not_offered():
    names = {
        (d.architecture.name, d.accelerator.name, d.tensor_parallel) for d in deployments(["llama-2-70b"], ["l40s"])
    }
    assert names == {("llama-2-70b", "l40s", 4)}


def test_a_gpu_without_runs_says_so():
    (first, *_) = deployments(["llama-2-7b-hf"], ["l40s"])
    assert any(
        "had a part in the calibration" in note for note in exported(first, load_coefficients("default"))["notes"]
    )
