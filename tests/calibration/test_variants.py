import numpy as np
import pandas as pd
import pytest

from stepcal.calibration.variants import VARIANTS, fit_variant
from stepcal.datasets.splits import Split, temporal_split
from stepcal.errors import InputError
from stepcal.step_time.baselines import Blackbox
from stepcal.step_time.corrections import StepFeatures


@pytest.fixture(scope="module")
def split(make_steps, h100) -> Split:
    """Two experiments of different models; the durations follow the decode GEMM, with another factor each."""
    rng = np.random.default_rng(0)
    runs = []
    for experiment, model, slope in (("run-a", "llama-2-7b", 2.0), ("run-b", "llama-2-70b-hf", 5.0)):
        decode = rng.integers(1, 40, 120)
        steps = make_steps(rng.integers(0, 10, 120), decode, model=model, experiment_id=experiment)
        runs.append(steps.assign(duration_us=(slope * decode + 20.0) * np.exp(0.05 * rng.normal(size=120))))
    return temporal_split(pd.concat(runs, ignore_index=True))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("raw", 0), ("constant", 1), ("blackbox", 3), ("xgboost", 3), ("global9", 9), ("phase16", 16), ("model36", 18),
    ],
)  # fmt: skip
def test_every_variant_fits_and_predicts(split, h100, name, count):
    variant = fit_variant(name, split, h100)
    predicted = variant.predict_us(split.test)
    assert variant.name == name
    assert variant.n_parameters == count
    assert predicted.shape == (len(split.test),)
    assert np.isfinite(predicted).all()
    assert (variant.fit is not None) == (name in ("global9", "phase16", "model36"))


def test_names_are_in_order_of_what_they_learn():
    assert VARIANTS == ("raw", "constant", "bucket", "blackbox", "xgboost", "global9", "phase16", "model36")


def test_an_unknown_variant_is_refused_with_the_known_ones(split, h100):
    with pytest.raises(InputError, match=r"Unknown variant `global10`.*raw, constant.*model36"):
        fit_variant("global10", split, h100)


def test_baselines_are_fitted_to_each_experiment_by_itself(split, h100):
    variant = fit_variant("blackbox", split, h100)
    predicted = pd.Series(variant.predict_us(split.test), index=split.test.index)
    for experiment, test in split.test.groupby("experiment_id"):
        train = split.train[split.train["experiment_id"] == experiment]
        alone = Blackbox().fit(train, train)
        np.testing.assert_array_equal(predicted[test.index], alone.predict_us(test))
        for name, (value, unit) in alone.parameters().items():
            (estimate,) = [e for e in variant.estimates if e.name == f"{experiment}.{name}"]
            assert (estimate.value, estimate.unit) == (value, unit)


@pytest.mark.parametrize("name", ["bucket", "blackbox", "global9", "model36"])
def test_predictions_follow_the_order_of_the_rows(split, h100, name):
    variant = fit_variant(name, split, h100)
    shuffled = split.test.sample(frac=1, random_state=0)
    in_order = pd.Series(variant.predict_us(split.test), index=split.test.index)
    np.testing.assert_allclose(variant.predict_us(shuffled), in_order[shuffled.index], rtol=1e-12)


@pytest.mark.parametrize("name", [v for v in VARIANTS if v != "phase16"])
def test_the_test_part_is_not_looked_at(split, h100, name):
    spoiled = Split(split.train, split.valid, split.test.assign(duration_us=1e9))
    honest = fit_variant(name, split, h100).predict_us(split.test)
    np.testing.assert_array_equal(fit_variant(name, spoiled, h100).predict_us(split.test), honest)


def test_a_baseline_says_nothing_about_an_experiment_it_never_saw(split, h100):
    variant = fit_variant("constant", split, h100)
    with pytest.raises(InputError, match=r"never saw `run-z`\. It knows: run-a, run-b"):
        variant.predict_us(split.test.assign(experiment_id="run-z"))


def test_a_pooled_variant_does(split, h100):
    variant = fit_variant("global9", split, h100)
    elsewhere = split.test.assign(experiment_id="run-z")
    np.testing.assert_array_equal(variant.predict_us(elsewhere), variant.predict_us(split.test))
    assert variant.fit is not None
    np.testing.assert_array_equal(
        variant.predict_us(split.test), variant.fit.predict_us(StepFeatures.of(split.test, h100))
    )


def test_model36_has_a_block_for_each_family_and_follows_both(split, h100):
    variant = fit_variant("model36", split, h100)
    assert {e.name.split(".")[0] for e in variant.estimates} == {"llama-2-7b", "llama-2-70b"}
    assert variant.fit is not None
    pooled = fit_variant("global9", split, h100)
    assert pooled.fit is not None
    assert variant.fit.cost < pooled.fit.cost


@pytest.mark.parametrize("name", VARIANTS)
def test_an_empty_training_part_is_refused(split, h100, name):
    empty = Split(split.train.iloc[:0], split.valid, split.test)
    with pytest.raises(InputError, match="no training steps"):
        fit_variant(name, empty, h100)


def test_fewer_training_steps_than_parameters_are_refused(split, h100):
    with pytest.raises(InputError, match="7 steps cannot determine the 9 parameters"):
        fit_variant("global9", Split(split.train.iloc[:7], split.valid, split.test), h100)
