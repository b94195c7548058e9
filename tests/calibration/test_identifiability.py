import numpy as np
import pytest
from scipy.signal import lfilter

from stepcal.calibration.identifiability import assess
from stepcal.calibration.least_squares import fit, log_ratio_jacobian, log_ratio_residuals
from stepcal.step_time.corrections import Combination, Global9, Parameter, Phase16, StepFeatures

COMPONENTS = ("prefill_gemm", "prefill_attn", "decode_gemm")


def features_of(components):
    components = np.asarray(components, dtype=float)
    return StepFeatures(components, np.ones_like(components), np.full(len(components), "a"))


def random_features(n=400, seed=0):
    rng = np.random.default_rng(seed)
    return features_of(np.column_stack([rng.uniform(1, 100, (n, 2)), rng.uniform(10, 500, n), np.zeros(n)]))


def by_name(estimates):
    return {e.name: e for e in estimates}


@pytest.fixture(scope="module")
def global9_fit():
    features = random_features()
    noise = np.exp(0.05 * np.random.default_rng(1).normal(size=400))
    return fit(Global9(), features, (features.components_us @ [2, 3, 0.5, 1] + 40) * noise)


def test_of_nine_parameters_the_data_determine_four(global9_fit):
    assert global9_fit.identifiability.n_parameters == 9
    assert global9_fit.identifiability.rank == 4
    assert np.all(np.diff(global9_fit.identifiability.singular_values) <= 0)


def test_with_decode_attention_they_would_determine_five():
    components = np.random.default_rng(0).uniform(1, 100, (400, 4))
    result = fit(Global9(), features_of(components), components @ [2, 3, 0.5, 1] + 40)
    assert result.identifiability.rank == 5
    assert all(c.identified for c in result.combinations)


def test_factor_and_mfu_are_known_only_together(global9_fit):
    estimates = by_name(global9_fit.estimates)
    for name in COMPONENTS:
        for member in (f"{name}_factor", f"{name}_mfu"):
            assert not estimates[member].identified
            assert estimates[member].reason == f"only {name}_factor / {name}_mfu is"
            assert np.isnan([estimates[member].low, estimates[member].high]).all()
    assert by_name(global9_fit.combinations).keys() >= {f"{c}_factor / {c}_mfu" for c in COMPONENTS}


def test_a_component_that_is_zero_determines_nothing(global9_fit):
    estimates, combinations = by_name(global9_fit.estimates), by_name(global9_fit.combinations)
    unused = [estimates["decode_attn_factor"], estimates["decode_attn_mfu"]]
    for e in [*unused, combinations["decode_attn_factor / decode_attn_mfu"]]:
        assert not e.identified
        assert e.describe() == "not identified: its component is zero in every step"


def test_what_is_known_has_an_interval_around_the_truth(global9_fit):
    known = [e for e in (*global9_fit.estimates, *global9_fit.combinations) if e.identified]
    assert [e.name for e in known] == ["overhead_us", *(f"{c}_factor / {c}_mfu" for c in COMPONENTS)]
    for e, truth in zip(known, (40, 2, 3, 0.5), strict=True):
        assert e.low < e.value < e.high
        assert e.value == pytest.approx(truth, rel=0.1)
        assert e.value / e.low == pytest.approx(e.high / e.value)  # symmetric in the logarithm


def test_a_quotient_at_its_bound_says_so():
    features = random_features()
    duration = features.components_us[:, :2].sum(axis=1) + 30 + 1e-4 * features.components_us[:, 2]
    quotient = by_name(fit(Global9(), features, duration).combinations)["decode_gemm_factor / decode_gemm_mfu"]
    assert quotient.value == pytest.approx(0.01, rel=1e-3)
    assert quotient.reason == "at a bound of the search"
    assert np.isnan(quotient.low)


def test_an_overhead_that_the_data_push_to_zero_is_at_its_bound():
    features = random_features()
    steeper = features.components_us.sum(axis=1) ** 1.3  # a line through such steps cuts the axis below zero
    overhead = by_name(fit(Global9(), features, steeper).estimates)["overhead_us"]
    assert overhead.value < 0.05
    assert overhead.describe().endswith("at its lower bound")
    assert np.isnan(overhead.high)


@pytest.mark.parametrize(("value", "reason"), [(0.01, "at its lower bound"), (100.0, "at its upper bound"), (5.0, "")])
def test_bounds_are_noticed_on_either_side(value, reason):
    parameter = Parameter("x", "1", start=1.0, low=0.01, high=100.0)
    rng = np.random.default_rng(0)
    estimate = assess([parameter], [], np.array([value]), rng.normal(size=200), rng.normal(size=(200, 1)))[0][0]
    assert estimate.identified
    assert estimate.reason == reason
    assert np.isnan(estimate.low) == bool(reason)


def test_two_parameters_that_do_the_same_are_told_apart_from_their_product():
    parameters = [Parameter("x", "1", 1.0, 0.01, 100.0), Parameter("y", "1", 1.0, 0.01, 100.0)]
    column = np.random.default_rng(0).normal(size=(300, 1))
    product, quotient = Combination("x y", (("x", 1), ("y", 1))), Combination("x / y", (("x", 1), ("y", -1)))
    estimates, combinations, identifiability = assess(
        parameters, [product, quotient], np.array([2.0, 3.0]), np.ones(300), np.hstack([column / 2, column / 3])
    )
    assert identifiability.rank == 1
    assert not any(e.identified for e in estimates)
    assert combinations[0].identified
    assert combinations[0].value == pytest.approx(6)
    assert not combinations[1].identified
    assert combinations[1].reason == "another combination does the same"


def test_a_direction_that_the_data_hardly_see_is_not_called_determined():
    parameters = [Parameter(name, "1", 1.0, 0.01, 100.0) for name in ("x", "y")]
    jacobian = np.zeros((300, 2))
    jacobian[:, 0], jacobian[0, 1] = 1.0, 1e-5  # one step hardly knows of y
    residuals = np.random.default_rng(0).normal(size=300) + 0.5
    x, y = assess(parameters, [], np.array([1.0, 1.0]), residuals, jacobian)[0]
    assert 0 < x.low < 1 < x.high < np.inf
    assert not y.identified
    assert "wider than a factor" in y.reason


def test_a_regime_without_steps_is_told_from_one_that_has_some():
    """Memory-bound steps only: the MFU is known with the memory factor, and the compute factor with nothing."""
    components = np.column_stack([np.zeros((200, 2)), np.tile([20.0, 40.0, 60.0, 80.0], 50), np.zeros(200)])
    features = StepFeatures(components, np.full((200, 4), 50.0), np.full(200, "a"))
    noise = np.exp(0.05 * np.random.default_rng(0).normal(size=200))
    result = fit(Phase16(ridge=295.0), features, 3.0 * components[:, 2] * noise)
    estimates = by_name(result.estimates)
    assert estimates["decode_gemm_mfu"].reason == "only decode_gemm_memory_factor / decode_gemm_mfu is"
    assert estimates["decode_gemm_compute_factor"].reason == "its component is zero in every step of its regime"
    assert estimates["decode_attn_mfu"].reason == "its component is zero in every step"
    assert [c.name for c in result.combinations if c.identified] == ["decode_gemm_memory_factor / decode_gemm_mfu"]


def test_an_exact_fit_has_an_interval_of_no_width():
    parameter = Parameter("x", "1", 1.0, 0.01, 100.0)
    estimate = assess([parameter], [], np.array([2.0]), np.zeros(300), np.ones((300, 1)))[0][0]
    assert (estimate.low, estimate.value, estimate.high) == (2.0, 2.0, 2.0)


def autocorrelated(n, rho, seed):
    """AR(1) with unit variance, from a start that was forgotten."""
    innovations = np.random.default_rng(seed).normal(size=n + 100) * np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], innovations)[100:]


@pytest.fixture(scope="module")
def coverage():
    """Shares of fits whose interval of the decode quotient holds the truth, by block length.

    Decode steps, AR(1) noise in the logarithm; blocks of one step are intervals that take steps as independent.
    """
    n, truth, held = 4000, 0.5, {100: [], 1: []}
    decode = np.tile(np.repeat([20.0, 100.0, 500.0, 60.0, 240.0], 40), n // 200)
    features = features_of(np.column_stack([np.zeros(n), np.zeros(n), decode, np.zeros(n)]))
    for seed in range(200):
        duration = (truth * decode + 30.0) * np.exp(0.2 * autocorrelated(n, 0.9, seed))
        result = fit(Global9(), features, duration)
        held[100].append(by_name(result.combinations)["decode_gemm_factor / decode_gemm_mfu"])
        if seed < 50:
            residuals = log_ratio_residuals(result.model, result.theta, features, duration)
            jacobian = log_ratio_jacobian(result.model, result.theta, features)
            model = result.model
            alone = assess(model.parameters, model.combinations, result.theta, residuals, jacobian, block_length=1)
            held[1].append(by_name(alone[1])["decode_gemm_factor / decode_gemm_mfu"])
    return {length: np.mean([q.low <= truth <= q.high for q in quotients]) for length, quotients in held.items()}


def test_intervals_cover_the_truth_when_neighbouring_steps_depend_on_each_other(coverage):
    assert 0.88 <= coverage[100] <= 0.99


def test_intervals_that_took_steps_as_independent_would_not(coverage):
    assert coverage[1] < 0.6
