"""Clocks of the simulator predict what the fitted model predicts, for any batch."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, ServerConfig, StepBatch
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.baselines import (
    BATCH_FEATURES,
    Blackbox,
    BucketMedianRatio,
    ConstantStep,
    GradientBoosting,
    RawAnalytical,
)
from stepcal.step_time.compile import compile_baseline, compile_corrections
from stepcal.step_time.corrections import SMALLEST_STEP_US, Global9, Model36, Phase16, StepFeatures

GPU = load_accelerator("h100-sxm")
SERVER = ServerConfig(kv_blocks=1000, max_num_seqs=40, max_num_batched_tokens=300)
MODELS = {"llama-2-7b": 1, "llama-2-70b": 4, "codellama-34b": 2, "mixtral-8x7b": 2}
CORRECTIONS = {
    "global9": Global9(),
    "phase16": Phase16.for_accelerator(GPU),
    "model36": Model36(tuple(MODELS)),
}
BATCHES = st.lists(st.tuples(st.integers(0, 260), st.integers(0, 40)), min_size=1, max_size=30)


def asked_us(clock: CompiledStepTime, prefill: int, decode: int) -> float:
    """What a clock says of one batch; the prompt tokens are those of one request, lengths of context are arbitrary."""
    chunks = np.array([prefill] if prefill else [], dtype=np.int32)
    batch = StepBatch(chunks, chunks + 7, np.full(decode, 33, dtype=np.int32), waiting=3)
    return sum(clock(batch).values())


def asked_all_us(clock: CompiledStepTime, batches: list[tuple[int, int]]) -> np.ndarray:
    return np.array([asked_us(clock, prefill, decode) for prefill, decode in batches])


def rows_of(batches: list[tuple[int, int]], make_steps, model: str = "llama-2-7b") -> pd.DataFrame:
    prefill, decode = np.array(batches).T
    return make_steps(prefill, decode, model=model, tensor_parallel=MODELS[model])


@pytest.mark.parametrize("name", CORRECTIONS)
@given(data=st.data())
def test_a_compiled_correction_is_the_model(name: str, data: st.DataObject, make_steps) -> None:
    model = CORRECTIONS[name]
    architecture = load_architecture(data.draw(st.sampled_from(sorted(MODELS))))
    theta = np.array([data.draw(st.floats(max(p.low, 1e-2), min(p.high, 2e3))) for p in model.parameters])
    batches = data.draw(BATCHES)
    degree = MODELS[architecture.name]
    clock = compile_corrections(model, theta, Deployment(architecture, GPU, degree, SERVER))
    features = StepFeatures.of(rows_of(batches, make_steps, architecture.name), GPU)
    np.testing.assert_allclose(asked_all_us(clock, batches), model.predict_us(theta, features), rtol=1e-9)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_floor_is_the_models(name: str, make_steps) -> None:
    """With the smallest factors a small step would be shorter than any: clock and model stop at the same floor."""
    model = CORRECTIONS[name]
    small = [0.01 if p.name.endswith("factor") else p.low if "overhead" in p.name else p.high for p in model.parameters]
    batches = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for architecture in map(load_architecture, MODELS):
        degree = MODELS[architecture.name]
        clock = compile_corrections(model, np.array(small), Deployment(architecture, GPU, degree, SERVER))
        features = StepFeatures.of(rows_of(batches, make_steps, architecture.name), GPU)
        predicted = model.predict_us(np.array(small), features)
        assert predicted.min() == SMALLEST_STEP_US
        np.testing.assert_allclose(asked_all_us(clock, batches), predicted, rtol=1e-12)


def test_model36_takes_the_family_of_the_server() -> None:
    model = CORRECTIONS["model36"]
    theta = np.array([p.start for p in model.parameters])
    theta[[i for i, p in enumerate(model.parameters) if p.name == "mixtral-8x7b.overhead_us"]] = 777.0
    overheads = {
        name: asked_us(
            compile_corrections(model, theta, Deployment(load_architecture(name), GPU, degree, SERVER)), 0, 0
        )
        for name, degree in MODELS.items()
    }
    assert overheads == {"llama-2-7b": 50.0, "llama-2-70b": 50.0, "codellama-34b": 50.0, "mixtral-8x7b": 777.0}


def test_a_family_that_was_not_fitted_is_refused() -> None:
    model = Model36(("llama-2-70b",))
    theta = np.array([p.start for p in model.parameters])
    with pytest.raises(InputError, match="fitted to llama-2-70b and cannot predict `llama-2-7b`"):
        compile_corrections(model, theta, Deployment(load_architecture("llama-2-7b"), GPU, 1, SERVER))


def test_a_degree_that_does_not_divide_the_heads_is_refused() -> None:
    theta = np.array([p.start for p in Global9().parameters])
    with pytest.raises(InputError, match=r"`tensor_parallel=3` does not divide the 32 attention heads.*1, 2, 4"):
        compile_corrections(Global9(), theta, Deployment(load_architecture("llama-2-7b"), GPU, 3, SERVER))


def training(make_steps) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    prefill, decode = rng.integers(0, 260, 200) * rng.integers(0, 2, 200), rng.integers(0, 41, 200)
    duration = (300 + 3 * prefill + 20 * decode**1.3) * np.exp(0.1 * rng.normal(size=200))
    return make_steps(prefill, decode, duration_us=duration)


def learned(name: str, make_steps):
    kinds = {
        "raw": RawAnalytical(GPU),
        "constant": ConstantStep(),
        "bucket": BucketMedianRatio(GPU),
        "blackbox": Blackbox(),
        "boosted": GradientBoosting(features=BATCH_FEATURES),
    }
    steps = training(make_steps)
    return kinds[name].fit(steps.iloc[:150], steps.iloc[150:])


@pytest.fixture(scope="module")
def baselines(make_steps) -> dict:
    return {name: learned(name, make_steps) for name in ("raw", "constant", "bucket", "blackbox", "boosted")}


@pytest.fixture(scope="module")
def clocks(baselines) -> dict[str, CompiledStepTime]:
    architecture = load_architecture("llama-2-7b")
    return {
        name: compile_baseline(baseline, Deployment(architecture, GPU, 1, SERVER))
        for name, baseline in baselines.items()
    }


@pytest.mark.parametrize("name", ["raw", "constant", "bucket", "blackbox", "boosted"])
@given(batches=BATCHES)
def test_the_clock_of_a_baseline_is_the_baseline(name: str, batches, baselines, clocks, make_steps) -> None:
    predicted = baselines[name].predict_us(rows_of(batches, make_steps))
    np.testing.assert_allclose(asked_all_us(clocks[name], batches), predicted, rtol=1e-6)


def test_buckets_never_seen_take_the_overall_ratio(make_steps) -> None:
    steps = make_steps([0, 0, 0, 0], [4, 5, 6, 7], duration_us=[40.0, 50.0, 60.0, 70.0])
    bucket = BucketMedianRatio(GPU).fit(steps, steps)
    clock = compile_baseline(bucket, Deployment(load_architecture("llama-2-7b"), GPU, 1, SERVER))
    batches = [(0, 0), (100, 0), (0, 1), (3, 39), (17, 5), (0, 31), (0, 32)]
    np.testing.assert_allclose(
        asked_all_us(clock, batches), bucket.predict_us(rows_of(batches, make_steps)), rtol=1e-12
    )


def test_a_negative_line_of_the_blackbox_stops_at_the_floor() -> None:
    """The blackbox as published has no floor, but no step can take less than no time."""
    blackbox = Blackbox()
    blackbox.coefficients = np.array([-500.0, 2.0, 10.0])
    clock = compile_baseline(blackbox, Deployment(load_architecture("llama-2-7b"), GPU, 1, SERVER))
    assert asked_us(clock, 0, 3) == SMALLEST_STEP_US
    assert asked_us(clock, 250, 3) == pytest.approx(30.0)


def test_trees_that_see_more_than_the_batch_are_refused() -> None:
    with pytest.raises(InputError, match=r"see prefill_tokens.*waiting_depth.*GradientBoosting\(features=BATCH_FEAT"):
        compile_baseline(GradientBoosting(), Deployment(load_architecture("llama-2-7b"), GPU, 1, SERVER))


def test_an_unknown_kind_of_baseline_is_refused() -> None:
    with pytest.raises(InputError, match="No step time can be compiled from a `object`"):
        compile_baseline(object(), Deployment(load_architecture("llama-2-7b"), GPU, 1, SERVER))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["raw", "bucket", "boosted"])
def test_tables_fit_the_server_they_were_made_for(name: str, clocks) -> None:
    times = clocks[name].bind(SERVER)
    assert times.prefill_tokens_us.shape == times.tokens_us.shape == (301,)
    assert times.decode_requests_us.shape == (41,)
    with pytest.raises(InputError, match="max_num_seqs"):
        clocks[name].bind(ServerConfig(kv_blocks=1000, max_num_seqs=41, max_num_batched_tokens=300))
