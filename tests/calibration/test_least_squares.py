import os
import subprocess
import sys

import numpy as np
import pytest
from reference import fitting as reference
from scipy.optimize import approx_fprime

from stepcal.calibration import least_squares as fitting
from stepcal.calibration.least_squares import fit, log_ratio_jacobian, log_ratio_residuals
from stepcal.datasets.splits import temporal_split
from stepcal.errors import InputError
from stepcal.locations import shipped_folder
from stepcal.step_time.corrections import Global9, Model36, Phase16, StepFeatures

QUOTIENTS = np.array([2.0, 3.0, 0.5])


def drawn_features(n=300, seed=0, families=("a",)):
    """Steps of a few dozen different batches, as real ones are, and no decode attention."""
    rng = np.random.default_rng(seed)
    prefill, decode = rng.integers(0, 6, n) * 8.0, rng.integers(1, 12, n) * 20.0
    components = np.column_stack([prefill * 1.5, prefill**2 * 0.05, decode * 2.0, np.zeros(n)])
    intensity = np.column_stack([prefill, prefill, decode, np.ones(n)])
    return StepFeatures(components, intensity, rng.choice(families, n))


def noise(n, scale, seed=1):
    return np.exp(scale * np.random.default_rng(seed).normal(size=n))


def by_name(estimates):
    return {e.name: e for e in estimates}


def test_noise_free_quotients_and_overhead_are_recovered():
    features = drawn_features()
    result = fit(Global9(), features, features.components_us[:, :3] @ QUOTIENTS + 30.0)
    assert result.converged
    assert result.cost < 1e-8  # parameters are rounded to six digits
    assert by_name(result.estimates)["overhead_us"].value == pytest.approx(30.0, rel=1e-5)
    quotients = [c.value for c in result.combinations if c.identified]
    assert quotients == pytest.approx(QUOTIENTS, rel=1e-5)
    np.testing.assert_allclose(result.predict_us(features), features.components_us[:, :3] @ QUOTIENTS + 30.0, rtol=2e-5)


def test_the_answer_does_not_depend_on_the_start():
    features = drawn_features()
    duration = (features.components_us[:, :3] @ QUOTIENTS + 30.0) * noise(300, 0.2)
    start = np.array([5.0, 0.1, 3.0, 1.0, 500.0, 0.9, 0.2, 0.3, 0.5])
    one, other = fit(Global9(), features, duration), fit(Global9(), features, duration, start=start)
    assert one.cost == pytest.approx(other.cost, rel=1e-7)
    np.testing.assert_allclose(one.predict_us(features), other.predict_us(features), rtol=1e-3)


def test_the_cost_is_that_of_every_step_without_compression():
    features = drawn_features(n=400)
    duration = (features.components_us[:, :3] @ QUOTIENTS + 30.0) * noise(400, 0.3)
    result = fit(Global9(), features, duration)
    step_by_step = reference.global9_cost(result.theta, features.components_us, duration)
    assert result.cost == pytest.approx(step_by_step, rel=1e-10)
    assert result.cost == pytest.approx(
        float(np.sum(log_ratio_residuals(Global9(), result.theta, features, duration) ** 2)), rel=1e-10
    )
    theta, cost = reference.global9_all_rows(features.components_us, duration)
    assert result.cost == pytest.approx(cost, rel=1e-8)
    np.testing.assert_allclose(result.predict_us(features), Global9().predict_us(theta, features), rtol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_another_optimiser_in_quotient_space_finds_nothing_lower(seed):
    features = drawn_features(seed=seed)
    duration = (features.components_us[:, :3] @ QUOTIENTS + 10.0 * seed) * noise(300, 0.4, seed)
    other = reference.quotient_cost(features.components_us, duration, n_starts=5, seed=seed)
    assert fit(Global9(), features, duration).cost == pytest.approx(other, rel=1e-6)


def test_nothing_lower_exists_on_the_real_traces(traces, h100):
    steps = temporal_split(traces).train
    features, duration = StepFeatures.of(steps, h100), steps["duration_us"].to_numpy()
    result = fit(Global9(), features, duration)
    other = reference.quotient_cost(features.components_us, duration, n_starts=3, seed=0)
    assert result.cost <= other * (1 + 1e-6)


def test_one_real_experiment_costs_what_it_does_without_compression(traces, h100):
    steps = traces[traces["experiment_id"].str.endswith("codegen")].iloc[:4000]
    features, duration = StepFeatures.of(steps, h100), steps["duration_us"].to_numpy()
    _, cost = reference.global9_all_rows(features.components_us, duration)
    assert fit(Global9(), features, duration).cost == pytest.approx(cost, rel=1e-8)


def test_the_jacobian_of_the_residuals_is_the_numerical_one():
    features, theta = drawn_features(n=20), np.array([1.2, 0.7, 2.0, 1.0, 40.0, 0.4, 0.6, 0.8, 0.5])
    duration = np.linspace(50.0, 900.0, 20)
    analytic = log_ratio_jacobian(Global9(), theta, features)
    numerical = approx_fprime(theta, lambda t: log_ratio_residuals(Global9(), t, features, duration), 1e-7)
    np.testing.assert_allclose(analytic, numerical, atol=1e-5)


def test_model36_is_a_global9_for_each_family():
    features = drawn_features(n=600, families=("a", "b"))
    of_b = features.families == "b"
    duration = (features.components_us[:, :3] @ QUOTIENTS + 30.0) * np.where(of_b, 3.0, 1.0) * noise(600, 0.2)
    together = fit(Model36(("a", "b")), features, duration)
    cost = 0.0
    for block, rows in enumerate((~of_b, of_b)):
        alone = fit(Global9(), features.rows(rows), duration[rows])
        np.testing.assert_array_equal(together.theta[9 * block : 9 * block + 9], alone.theta)
        cost += alone.cost
    assert together.cost == pytest.approx(cost, rel=1e-12)
    assert together.cost < fit(Global9(), features, duration).cost
    assert together.identifiability.rank == 8


def test_a_family_without_steps_keeps_its_start_and_says_that_nothing_is_known():
    features = drawn_features()
    result = fit(Model36(("a", "unseen")), features, features.components_us[:, :3] @ QUOTIENTS + 30.0)
    unseen = [e for e in result.estimates if e.name.startswith("unseen.")]
    assert [e.value for e in unseen] == [p.start for p in Global9().parameters]
    assert not any(e.identified for e in unseen)


def planted_threshold(n=600, edge=100.0):
    """Decode steps whose cost a token falls to a third at an intensity of 100."""
    decode = np.tile(np.arange(1, 11) * 20.0, n // 10)
    components = np.column_stack([np.zeros(n), np.zeros(n), decode * 2.0, np.zeros(n)])
    features = StepFeatures(components, components / 2.0, np.full(n, "a"))
    return features, components[:, 2] * np.where(decode >= edge, 0.5, 1.5)


def test_the_threshold_profile_finds_a_planted_edge_where_trf_does_not_move_it():
    features, duration = planted_threshold()
    model = Phase16(ridge=295.0)
    result = fit(model, features, duration)
    threshold = by_name(result.estimates)["decode_gemm_threshold"]
    assert 80.0 < threshold.value <= 100.0
    assert not threshold.identified
    assert "hard threshold has no gradient" in threshold.reason
    assert "trf moved the thresholds by 0 FLOP/byte" in result.note
    assert result.cost < 1e-8  # parameters are rounded to six digits
    quotients = by_name(result.combinations)
    assert quotients["decode_gemm_compute_factor / decode_gemm_mfu"].value == pytest.approx(0.5, rel=1e-4)
    assert quotients["decode_gemm_memory_factor / decode_gemm_mfu"].value == pytest.approx(1.5, rel=1e-4)


def test_trf_alone_leaves_the_thresholds_and_the_planted_edge_unfound(monkeypatch):
    features, duration = planted_threshold()
    profiled = fit(Phase16(ridge=295.0), features, duration)
    monkeypatch.setattr(fitting, "PROFILE_SWEEPS", 0)
    alone = fit(Phase16(ridge=295.0), features, duration)
    assert alone.theta[12:].tolist() == [295.0] * 4
    assert alone.cost > 1.0 > profiled.cost


def test_the_profile_never_makes_a_fit_worse(monkeypatch):
    features = drawn_features(n=200)
    duration = (features.components_us[:, :3] @ QUOTIENTS + 30.0) * noise(200, 0.3)
    model = Phase16(ridge=100.0)
    profiled = fit(model, features, duration)
    assert profiled.cost == pytest.approx(
        float(np.sum(log_ratio_residuals(model, profiled.theta, features, duration) ** 2)), rel=1e-9
    )
    monkeypatch.setattr(fitting, "PROFILE_SWEEPS", 0)
    assert profiled.cost <= fit(model, features, duration).cost


@pytest.mark.parametrize(
    ("model", "n"), [(Global9(), 8), (Phase16(ridge=100.0), 15), (Model36(("a", "b", "c", "d")), 35)], ids=str
)
def test_fewer_steps_than_parameters_are_refused(model, n):
    features = drawn_features(n=n)
    with pytest.raises(InputError, match=rf"^{n} steps cannot determine the {n + 1} parameters of `{model.name}`"):
        fit(model, features, np.full(n, 100.0))


@pytest.mark.parametrize("bad", [0.0, -5.0, float("nan"), float("inf")])
def test_a_duration_that_is_no_time_is_named(bad):
    duration = np.full(20, 100.0)
    duration[7] = bad
    for model in (Global9(), Phase16(ridge=100.0)):
        with pytest.raises(InputError, match=r"`duration_us\[7\]` is"):
            fit(model, drawn_features(n=20), duration)


def test_durations_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"shape \(19,\); 20 steps"):
        fit(Global9(), drawn_features(n=20), np.full(19, 100.0))


@pytest.mark.parametrize("model", [Global9(), Phase16(ridge=100.0), Model36(("a",))], ids=lambda m: m.name)
def test_a_start_out_of_bounds_or_of_another_length_is_refused(model):
    features, duration = drawn_features(n=50), np.full(50, 100.0)
    start = np.array([p.start for p in model.parameters])
    start[1] = 1000.0
    with pytest.raises(
        InputError, match=rf"`start` of `{model.parameters[1].name}` is 1000\.0; its bounds are \[0\.01"
    ):
        fit(model, features, duration, start=start)
    with pytest.raises(InputError, match=rf"`start` has shape .*{model.name}"):
        fit(model, features, duration, start=start[:-1])


@pytest.mark.parametrize("model", [Global9(), Phase16(ridge=100.0), Model36(("a",))], ids=lambda m: m.name)
def test_a_start_is_started_from(model):
    features = drawn_features(n=50)
    start = np.array([p.start for p in model.parameters])
    start[3] = 7.0
    result = fit(model, features, features.components_us.sum(axis=1) + 5.0, start=start, max_evaluations=1)
    assert result.theta[3] == 7.0


def test_a_fit_that_runs_out_of_evaluations_says_so():
    features = drawn_features()
    result = fit(Global9(), features, (features.components_us[:, :3] @ QUOTIENTS + 30.0), max_evaluations=2)
    assert not result.converged
    assert result.n_evaluations == 2


def test_the_report_names_every_parameter_once_and_why_it_is_not_known():
    features, duration = planted_threshold(n=60)
    text = fit(Phase16(ridge=295.0), features, duration).report()
    assert text.startswith("phase16, 60 training steps\n")
    assert "decode_attn_mfu " in text
    assert "not identified: its component is zero in every step" in text
    assert text.endswith("quantiles and the ridge point.")


_FIT_AND_HASH = """
import hashlib, numpy as np
from stepcal.step_time.corrections import Global9, StepFeatures
from stepcal.calibration.least_squares import fit
rng = np.random.default_rng(0)
components = rng.uniform(1, 500, (4000, 4))
features = StepFeatures(components, components, np.full(4000, "a"))
result = fit(Global9(), features, (components @ [2.0, 3.0, 0.5, 1.0] + 30) * np.exp(0.3 * rng.normal(size=4000)))
print(hashlib.sha256(result.theta.tobytes()).hexdigest(), result.report())
"""


def _start_with_threads(threads):
    limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command, environment = [sys.executable, "-c", _FIT_AND_HASH], {**os.environ, **limits}
    return subprocess.Popen(command, cwd=shipped_folder(), env=environment, stdout=subprocess.PIPE, text=True)


def test_the_same_data_give_the_same_bytes():
    features = drawn_features()
    duration = (features.components_us[:, :3] @ QUOTIENTS + 30.0) * noise(300, 0.2)
    assert fit(Global9(), features, duration).theta.tobytes() == fit(Global9(), features, duration).theta.tobytes()


def test_one_thread_and_two_give_the_same_bytes():
    processes = [_start_with_threads(threads) for threads in (1, 2)]
    one, two = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "global9, 4,000 training steps" in one
    assert one == two
