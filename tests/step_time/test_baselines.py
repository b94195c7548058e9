import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcal.datasets.splits import temporal_split
from stepcal.errors import InputError
from stepcal.metrics import mape_percent
from stepcal.step_time.baselines import Blackbox, BucketMedianRatio, ConstantStep, GradientBoosting, RawAnalytical
from stepcal.step_time.decomposition import decompose

ANCHORS = {
    "20260217-202857-llama-2-70b-tp4-general": 61.154177880328795,
    "20260217-203421-llama-2-70b-hf-tp4-codegen": 90.75831902128996,
    "20260218-150304-codellama-34b-tp2-general": 151.06270494181769,
}


@pytest.mark.parametrize("experiment", ANCHORS)
def test_the_blackbox_reproduces_its_published_error_on_the_real_traces(traces, experiment):
    split = temporal_split(traces[traces["experiment_id"] == experiment])
    model = Blackbox().fit(split.train, split.valid)
    error = mape_percent(model.predict_us(split.test), split.test["duration_us"])
    assert error == pytest.approx(ANCHORS[experiment], rel=1e-9)


@given(st.floats(-50, 500), st.floats(-5, 5), st.floats(-5, 5))
def test_the_blackbox_recovers_a_plane(make_steps, intercept, per_prefill, per_decode):
    rng = np.random.default_rng(0)
    steps = make_steps(rng.integers(0, 50, 30), rng.integers(0, 50, 30))
    steps["duration_us"] = intercept + per_prefill * steps["prefill_tokens"] + per_decode * steps["decode_tokens"]
    model = Blackbox().fit(steps, steps)
    np.testing.assert_allclose(model.predict_us(steps), steps["duration_us"], atol=1e-8)
    learned = model.parameters()
    assert [learned[n][0] for n in learned] == pytest.approx([intercept, per_prefill, per_decode], abs=1e-8)
    assert learned["decode_tokens"][1] == "us/token"


def test_the_blackbox_has_no_floor(make_steps):
    train = make_steps([0, 0, 0], [10, 20, 30], duration_us=[10.0, 20.0, 30.0])
    model = Blackbox().fit(train.assign(duration_us=train["duration_us"] - 9.0), train)
    assert model.predict_us(make_steps([0], [1]))[0] == pytest.approx(-8.0)


def test_the_raw_analytical_time_is_the_sum_of_the_components(make_steps, h100):
    steps = make_steps([0, 500, 3], [20, 0, 7])
    model = RawAnalytical(h100).fit(steps, steps)
    np.testing.assert_array_equal(model.predict_us(steps), decompose(steps, h100).sum(axis=1))
    assert model.predict_us(make_steps([0], [0])).tolist() == [1.0]
    assert model.parameters() == {}


def test_the_constant_is_the_median_of_the_training_steps(make_steps):
    train = make_steps([0] * 3, [1, 2, 3], duration_us=[10.0, 1000.0, 20.0])
    model = ConstantStep().fit(train, train.assign(duration_us=5.0))
    assert model.predict_us(make_steps([0] * 2, [9, 9])).tolist() == [20.0, 20.0]
    assert model.parameters() == {"median_us": (20.0, "us")}


def test_buckets_scale_the_raw_time_by_their_median_ratio(make_steps, h100):
    train = make_steps([0] * 5, [4, 5, 7, 8, 15])
    raw = RawAnalytical(h100)
    ratios = np.array([2.0, 9.0, 4.0, 10.0, 20.0])
    model = BucketMedianRatio(h100).fit(train.assign(duration_us=raw.predict_us(train) * ratios), train)
    assert model.parameters()["ratio_from_4"] == (pytest.approx(4.0), "1")
    assert model.parameters()["ratio_from_8"] == (pytest.approx(15.0), "1")
    new = make_steps([0] * 4, [6, 8, 100, 1])
    overall = np.median(ratios)
    np.testing.assert_allclose(model.predict_us(new) / raw.predict_us(new), [4.0, 15.0, overall, overall])


def test_steps_without_decodes_have_a_bucket_of_their_own(make_steps, h100):
    train = make_steps([100, 100, 0], [0, 0, 1])
    raw = RawAnalytical(h100)
    model = BucketMedianRatio(h100).fit(train.assign(duration_us=raw.predict_us(train) * [3.0, 3.0, 5.0]), train)
    assert set(model.parameters()) == {"ratio_from_0", "ratio_from_1"}
    assert model.predict_us(make_steps([7], [0]))[0] == pytest.approx(3.0 * raw.predict_us(make_steps([7], [0]))[0])


@pytest.fixture(scope="module")
def boosted(make_steps):
    rng = np.random.default_rng(0)
    decode = rng.integers(1, 100, 600)
    steps = make_steps(
        0, decode, duration_us=np.where(decode > 50, 3000.0, 200.0) * np.exp(0.05 * rng.normal(size=600))
    )
    return steps.iloc[:400], steps.iloc[400:500], steps.iloc[500:]


def test_boosting_learns_a_jump_that_no_line_follows(boosted):
    train, valid, test = boosted
    boosting, line = GradientBoosting().fit(train, valid), Blackbox().fit(train, valid)
    assert mape_percent(boosting.predict_us(test), test["duration_us"]) < 10
    assert mape_percent(line.predict_us(test), test["duration_us"]) > 40
    assert set(boosting.parameters()) == {"max_depth", "learning_rate", "trees"}


def test_boosting_is_deterministic(boosted):
    train, valid, test = boosted
    one, two = (GradientBoosting(seed=3).fit(train, valid).predict_us(test) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_boosting_must_be_fitted_first(boosted):
    model = GradientBoosting()
    assert model.parameters() == {}
    with pytest.raises(InputError, match="was not fitted"):
        model.predict_us(boosted[2])


@pytest.mark.parametrize("make", [ConstantStep, Blackbox, GradientBoosting], ids=lambda m: m.__name__)
def test_nothing_to_learn_from_is_refused(boosted, make):
    train, valid, _ = boosted
    with pytest.raises(InputError, match="no training steps"):
        make().fit(train.iloc[:0], valid)


def test_buckets_need_training_steps_too(boosted, h100):
    train, valid, _ = boosted
    with pytest.raises(InputError, match="no training steps"):
        BucketMedianRatio(h100).fit(train.iloc[:0], valid)
