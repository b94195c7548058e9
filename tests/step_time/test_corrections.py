import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize._numdiff import approx_derivative

from stepcal.errors import InputError
from stepcal.step_time.corrections import Global9, Model36, Phase16, StepFeatures
from stepcal.step_time.decomposition import decompose, intensities

FAMILIES = ("codellama-34b", "llama-2-70b", "llama-2-7b", "mixtral-8x7b")
VARIANTS = (Global9(), Phase16(ridge=295.5), Model36(FAMILIES))
seeds = st.integers(0, 2**32 - 1)


def random_features(rng, n=40):
    return StepFeatures(
        components_us=rng.uniform(1, 500, (n, 4)),
        intensities=rng.integers(1, 600, (n, 4)).astype(float),
        families=rng.choice(FAMILIES, n),
    )


def random_interior(model, rng):
    """Values well inside the bounds; thresholds halfway between the whole-numbered intensities."""
    theta = []
    for p in model.parameters:
        if p.name.endswith("_threshold"):
            theta.append(rng.integers(1, 600) + 0.5)
        elif p.name.endswith("_mfu"):
            theta.append(rng.uniform(0.05, 0.95))
        else:
            theta.append(np.exp(rng.uniform(np.log(0.05), np.log(50))))
    return np.array(theta)


@pytest.mark.parametrize("model", VARIANTS, ids=lambda m: m.name)
@given(seed=seeds)
def test_the_analytic_gradient_is_the_numerical_one(model, seed):
    rng = np.random.default_rng(seed)
    features, theta = random_features(rng), random_interior(model, rng)
    assert model.predict_us(theta, features).min() > 1.0
    numerical = approx_derivative(lambda t: model.predict_us(t, features), theta, method="3-point")
    scale = model.predict_us(theta, features)[:, None] / theta
    np.testing.assert_allclose(model.gradient_us(theta, features) / scale, numerical / scale, atol=2e-7)


@pytest.mark.parametrize("model", VARIANTS, ids=lambda m: m.name)
@given(seed=seeds)
def test_predictions_equal_a_loop_over_steps(model, seed):
    rng = np.random.default_rng(seed)
    features, theta = random_features(rng, 10), random_interior(model, rng)
    value = dict(zip((p.name for p in model.parameters), theta, strict=True))
    components = ("prefill_gemm", "prefill_attn", "decode_gemm", "decode_attn")
    expected = []
    for row in range(10):
        prefix = f"{features.families[row]}." if model.name == "model36" else ""
        total = value.get(f"{prefix}overhead_us", 0.0)
        for column, name in enumerate(components):
            factor_name = f"{prefix}{name}_factor"
            if model.name == "phase16":
                bound = "compute" if features.intensities[row, column] >= value[f"{name}_threshold"] else "memory"
                factor_name = f"{name}_{bound}_factor"
            total += value[factor_name] * features.components_us[row, column] / value[f"{prefix}{name}_mfu"]
        expected.append(max(total, 1.0))
    np.testing.assert_allclose(model.predict_us(theta, features), expected, rtol=1e-12)


@pytest.mark.parametrize("model", VARIANTS, ids=lambda m: m.name)
def test_nothing_is_faster_than_the_floor_and_the_floor_has_no_slope(model):
    features = StepFeatures(np.full((4, 4), 1e-3), np.ones((4, 4)), np.array(FAMILIES))
    theta = np.array([0.0 if p.name.endswith("overhead_us") else p.start for p in model.parameters])
    assert model.predict_us(theta, features).tolist() == [1.0] * 4
    assert not model.gradient_us(theta, features).any()


@pytest.mark.parametrize(
    ("model", "count"), list(zip(VARIANTS, (9, 16, 36), strict=True)), ids=lambda v: str(getattr(v, "name", v))
)
def test_variants_have_as_many_parameters_as_they_say(model, count):
    names = [p.name for p in model.parameters]
    assert len(names) == len(set(names)) == count
    assert {name for c in model.combinations for name, _ in c.exponents} <= set(names)


@pytest.mark.parametrize("model", VARIANTS, ids=lambda m: m.name)
def test_start_and_bounds_are_the_published_ones(model):
    published = {"factor": (1.0, 0.01, 100.0), "mfu": (0.5, 0.01, 1.0), "us": (50.0, 0.0, 1e6)}
    for p in model.parameters:
        kind = p.name.rpartition("_")[2]
        if kind == "threshold":
            assert p.start == 295.5
            assert p.low < p.start < p.high
        else:
            assert (p.start, p.low, p.high) == published[kind]


def test_thresholds_start_at_the_ridge_of_the_accelerator(h100):
    assert Phase16.for_accelerator(h100).ridge == pytest.approx(989.5 / 3.35)


def test_an_intensity_at_the_threshold_is_compute_bound():
    model = Phase16(ridge=100.0)
    features = StepFeatures(np.full((2, 4), 10.0), np.array([[100.0] * 4, [99.0] * 4]), np.array(["a", "a"]))
    theta = np.array([2.0] * 4 + [1.0] * 4 + [0.5] * 4 + [100.0] * 4)
    assert model.predict_us(theta, features).tolist() == [160.0, 80.0]


def test_model36_is_global9_a_family():
    rng = np.random.default_rng(0)
    features, model = random_features(rng), Model36(FAMILIES)
    theta = random_interior(model, rng)
    for i, family in enumerate(FAMILIES):
        rows = features.families == family
        alone = Global9().predict_us(theta[9 * i : 9 * i + 9], features.rows(rows))
        np.testing.assert_array_equal(model.predict_us(theta, features)[rows], alone)


def test_model36_says_nothing_about_a_family_it_never_saw():
    model = Model36(("llama-2-7b",))
    features = StepFeatures(np.ones((1, 4)), np.ones((1, 4)), np.array(["mixtral-8x7b"]))
    with pytest.raises(InputError, match=r"fitted to llama-2-7b and cannot predict `mixtral-8x7b`"):
        model.predict_us(np.array([p.start for p in model.parameters]), features)


def test_features_are_the_decomposition_and_join_the_two_names_of_the_70b_model(make_steps, h100):
    steps = make_steps([1, 0, 3], [4, 5, 6], model=["llama-2-70b-hf", "llama-2-70b", "llama-2-7b"], tensor_parallel=4)
    features = StepFeatures.of(steps, h100)
    np.testing.assert_array_equal(features.components_us, decompose(steps, h100).to_numpy())
    np.testing.assert_array_equal(features.intensities, intensities(steps))
    assert features.families.tolist() == ["llama-2-70b", "llama-2-70b", "llama-2-7b"]
    assert len(features) == 3
    assert features.rows(np.array([False, False, True])).families.tolist() == ["llama-2-7b"]
