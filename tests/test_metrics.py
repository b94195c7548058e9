import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.signal import lfilter

from stepcal.errors import InputError
from stepcal.metrics import (
    STEP_METRICS,
    block_bootstrap,
    log_accuracy_ratio,
    mape_percent,
    mspe_percent,
    p99_percent,
    pearson_r,
    relative_errors_percent,
)

times = arrays(float, st.integers(2, 30), elements=st.floats(1.0, 1e6))
PREDICTED, ACTUAL = [50.0, 100.0, 300.0], [100.0, 100.0, 200.0]


def test_closed_forms():
    assert relative_errors_percent(PREDICTED, ACTUAL).tolist() == [-50, 0, 50]
    assert mape_percent(PREDICTED, ACTUAL) == pytest.approx(100 / 3)
    assert mspe_percent(PREDICTED, ACTUAL) == pytest.approx(0)
    assert log_accuracy_ratio(PREDICTED, ACTUAL) == pytest.approx((math.log(2) + math.log(1.5)) / 3)
    assert pearson_r([1, 2, 3], [2, 4, 7]) == pytest.approx(5 / math.sqrt(2 * 38 / 3))
    errors = np.arange(101.0)
    assert p99_percent(100 + errors, np.full(101, 100.0)) == pytest.approx(99)


def test_the_bias_is_positive_where_predictions_are_too_long():
    assert mspe_percent([110, 120], [100, 100]) == pytest.approx(15)
    assert mspe_percent([90, 80], [100, 100]) == pytest.approx(-15)


@given(times, st.floats(0.1, 10))
def test_a_common_scale_changes_no_relative_metric(actual, scale):
    predicted = actual[::-1] + 1.0
    for name in ("mape_percent", "mspe_percent", "p99_percent"):
        metric = STEP_METRICS[name]
        assert metric(scale * predicted, scale * actual) == pytest.approx(metric(predicted, actual), rel=1e-9, abs=1e-9)


@given(times, st.floats(-0.9, 5))
def test_a_uniform_error_is_reported_as_it_is(actual, error):
    predicted = actual * (1 + error)
    assert mape_percent(predicted, actual) == pytest.approx(100 * abs(error), rel=1e-6, abs=1e-9)
    assert mspe_percent(predicted, actual) == pytest.approx(100 * error, rel=1e-6, abs=1e-9)
    assert p99_percent(predicted, actual) == pytest.approx(100 * abs(error), rel=1e-6, abs=1e-9)


@given(times)
def test_a_perfect_prediction_has_no_error(actual):
    assert [STEP_METRICS[n](actual, actual) for n in ("mape_percent", "mspe_percent", "log_accuracy_ratio")] == [
        0,
        0,
        0,
    ]


@given(times)
def test_bounds_and_symmetries(actual):
    predicted = np.roll(actual, 1)
    assert abs(mspe_percent(predicted, actual)) <= mape_percent(predicted, actual) + 1e-9
    assert log_accuracy_ratio(predicted, actual) == pytest.approx(log_accuracy_ratio(actual, predicted))
    assume(np.std(actual) > 1e-6 * np.mean(actual))
    r = pearson_r(predicted, actual)
    assert r == pytest.approx(pearson_r(actual, predicted), abs=1e-12)
    assert r == pytest.approx(pearson_r(3 * predicted + 7, actual), abs=1e-6)
    assert -1 - 1e-12 <= r <= 1 + 1e-12


def test_a_half_is_charged_like_a_double_only_by_the_log_ratio():
    assert log_accuracy_ratio([50], [100]) == pytest.approx(log_accuracy_ratio([200], [100]))
    assert mape_percent([50], [100]) < mape_percent([200], [100])


def test_predictions_below_a_microsecond_count_as_one_in_the_log_ratio():
    assert log_accuracy_ratio([-40.0, 0.0], [1.0, math.e]) == pytest.approx(0.5)


def test_r_is_not_defined_on_constants():
    assert math.isnan(pearson_r([1, 1, 1], [1, 2, 3]))
    assert math.isnan(pearson_r([1, 2, 3], [5, 5, 5]))
    assert math.isnan(pearson_r([1], [2]))


@pytest.mark.parametrize("name", STEP_METRICS)
@pytest.mark.parametrize(
    ("predicted", "actual", "said"),
    [
        ([1, 2], [1], r"shape \(2,\) and `actual` \(1,\)"),
        ([], [], "are empty"),
        ([1, float("nan")], [1, 2], r"`predicted\[1\]` is nan"),
        ([1, 2], [float("inf"), 2], r"`actual\[0\]` is inf"),
    ],
)
def test_what_cannot_be_scored_is_refused(name, predicted, actual, said):
    with pytest.raises(InputError, match=said):
        STEP_METRICS[name](predicted, actual)


@pytest.mark.parametrize("bad", [0.0, -3.0])
@pytest.mark.parametrize("metric", [mape_percent, mspe_percent, log_accuracy_ratio, p99_percent])
def test_a_relative_error_needs_a_positive_measurement(metric, bad):
    with pytest.raises(InputError, match=r"`actual\[1\]` is"):
        metric([1.0, 1.0], [1.0, bad])


def bootstrap(seed=0, **options):
    rng = np.random.default_rng(7)
    actual = rng.uniform(50, 150, 400)
    return block_bootstrap(
        mape_percent, actual * rng.uniform(0.5, 1.5, 400), actual, n_resamples=100, seed=seed, **options
    )


def test_the_bootstrap_is_decided_by_its_seed():
    assert bootstrap(seed=1) == bootstrap(seed=1)
    one, other = bootstrap(seed=1), bootstrap(seed=2)
    assert one.value == other.value
    assert (one.low, one.high) != (other.low, other.high)


def test_every_resample_is_as_long_as_the_series_and_made_of_runs_of_neighbours():
    n, length, resamples = 25, 10, []

    def recorded(predicted, actual):
        np.testing.assert_array_equal(predicted, -actual)
        resamples.append(actual)
        return float(actual.mean())

    interval = block_bootstrap(recorded, -np.arange(n), np.arange(n), block_length=length, n_resamples=300)
    np.testing.assert_array_equal(resamples[0], np.arange(n))
    assert len(resamples) == 301
    for rows in resamples[1:]:
        assert rows.size == n
        assert all((rows[i + 1] - rows[i]) % n == 1 for i in range(n - 1) if (i + 1) % length)
    counts = np.bincount(np.concatenate(resamples[1:]).astype(int), minlength=n)
    assert counts.min() > 0.7 * 300  # rows at the ends are drawn as often as others: the series is a circle
    means = [rows.mean() for rows in resamples[1:]]
    assert interval[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_a_higher_confidence_is_a_wider_interval():
    narrow, wide = bootstrap(confidence=0.5), bootstrap(confidence=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_a_metric_that_is_not_defined_has_no_interval():
    interval = block_bootstrap(pearson_r, np.ones(50), np.arange(1.0, 51.0))
    assert all(math.isnan(v) for v in interval)
    single = block_bootstrap(mape_percent, [1.0], [2.0])
    assert single.value == 50
    assert math.isnan(single.low)


def test_blocks_longer_than_the_series_are_cut():
    interval = block_bootstrap(mape_percent, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], block_length=1000, n_resamples=50)
    assert interval.low <= interval.value <= interval.high


@pytest.mark.parametrize("options", [{"block_length": 0}, {"n_resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="must be at least 1"):
        block_bootstrap(mape_percent, [1.0, 2.0], [1.0, 2.0], **options)


def autocorrelated(n, rho, seed):
    """AR(1) with unit variance, from a start that was forgotten."""
    innovations = np.random.default_rng(seed).normal(size=n + 100) * np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], innovations)[100:]


def coverage(block_length, n_series=80):
    """Share of series with AR(1) errors of mean zero whose interval of the bias holds zero."""
    covered, actual = 0, np.full(2000, 100.0)
    for seed in range(n_series):
        errors = autocorrelated(2000, 0.9, seed)
        interval = block_bootstrap(
            mspe_percent, actual + errors, actual, block_length=block_length, n_resamples=200, seed=seed
        )
        covered += interval.low <= 0 <= interval.high
    return covered / n_series


def test_blocks_cover_the_truth_on_dependent_errors_and_single_rows_do_not():
    blocks, short, single = coverage(100), coverage(5), coverage(1)
    assert blocks >= 0.85
    assert single < short < blocks
    assert single < 0.5
