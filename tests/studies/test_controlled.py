"""The controlled experiment: the truth is what the simulator ran on, and each fault does what its name says."""

import numpy as np
import pytest

from stepcal.studies.diagnosis import controlled as c
from stepcal.studies.published_runs import load_experiments

SMALL = c.SERVERS[2:4]


@pytest.fixture(scope="module")
def known():
    by_name = {e.experiment_id: c._shortened(e) for e in load_experiments()}
    return [c.known_steps(by_name[name], 0) for name in c.SERVERS]


def test_the_true_step_time_is_what_the_simulator_took(known):
    for server in known:
        assert np.allclose(server.true_us, server.table["duration_us"], rtol=1e-6, atol=0.01)


def test_without_noise_the_truth_is_recovered(known):
    joined = c.PhysicalFeatures.joined([k.features for k in known])
    fitted = c.fit_steps(joined, np.concatenate([k.true_us for k in known]))
    for p in c.LEARNED:
        assert fitted.values[p.name] == pytest.approx(c.TRUTH[p.name], rel=1e-4), p.name


def test_intervals_shrink_with_noise(known):
    rng = np.random.default_rng(0)
    quiet, loud = (c.recover(known, fault, rng).standard_errors for fault in (c.NONE, "noise"))
    ratio = np.median([loud[p.name] / quiet[p.name] for p in c.LEARNED])
    assert ratio == pytest.approx(c.HEAVY_NOISE / c.LABEL_NOISE, rel=0.3)


def test_without_decode_attention_other_numbers_take_its_time(known):
    fitted = c.recover(known, "no_decode_attention", np.random.default_rng(0))
    right = c.recover(known, c.NONE, np.random.default_rng(0))
    assert fitted.values["request_us"] > 2 * right.values["request_us"]


def test_one_fault_at_a_time():
    tables, _ = c.run_controlled((0,), judged_seeds=1, servers=SMALL)
    faults = tables["faults"].set_index("fault")
    assert set(faults.index) == set(c.FAULTS)
    assert faults.loc[c.NONE, "holds"] and faults.loc["noise", "holds"]
    assert not faults.loc["wrong_label", "holds"]
    assert faults.loc[c.NONE, "step_mape_percent"] < 0.5
    assert len(tables["end_to_end"]) == len(c.FAULTS) * len(SMALL)
