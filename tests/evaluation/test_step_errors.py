"""Correlations, scores and bias tables: what they count, and what they refuse."""

import numpy as np
import pandas as pd
import pytest

from stepcal.datasets import simulated_step_rows
from stepcal.errors import InputError
from stepcal.evaluation.step_errors import FEWEST_STEPS_FOR_R, POOLED, bias_table, mean_over_experiments, score_steps
from stepcal.metrics import mape_percent, mspe_percent
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.decomposition import decompose
from stepcal.studies.h1 import (
    component_correlations,
    label_by_batch,
    mixed_batch_residual,
    rescore_published_predictions,
)


@pytest.fixture(scope="module")
def steps():
    return simulated_step_rows(seed=3, n_steps=400)


@pytest.fixture(scope="module")
def components(steps):
    return decompose(steps, load_accelerator("h100-sxm"))


def test_correlations_equal_numpy_on_each_subset(steps, components):
    table = component_correlations(steps, components, n_resamples=5).set_index(["subset", "scope", "component"])
    one = steps["experiment_id"].iloc[0]
    decode = (steps["experiment_id"] == one) & (steps["prefill_tokens"] == 0) & (steps["decode_tokens"] > 0)
    expected = np.corrcoef(components.loc[decode, "decode_gemm_us"], steps.loc[decode, "duration_us"])[0, 1]
    assert table.loc[("pure_decode", one, "decode_gemm"), "r"] == pytest.approx(expected, rel=1e-12)
    assert table.loc[("pure_decode", one, "decode_gemm"), "n_steps"] == decode.sum()
    total = np.corrcoef(components.sum(axis=1), steps["duration_us"])[0, 1]
    assert table.loc[("all", POOLED, "total"), "r"] == pytest.approx(total, rel=1e-12)


def test_a_component_that_is_zero_or_rare_has_no_correlation_and_says_why(steps, components):
    table = component_correlations(steps, components, n_resamples=2).set_index(["subset", "scope", "component"])
    zero = table.loc[("all", POOLED, "decode_attn")]
    assert np.isnan(zero["r"])
    assert zero["reason"] == "component is zero in every step"
    few = component_correlations(steps.iloc[: FEWEST_STEPS_FOR_R - 1], components.iloc[: FEWEST_STEPS_FOR_R - 1])
    assert few["r"].isna().all()
    assert few["reason"].str.contains("fewer than 30").all()


def test_scores_are_the_metrics_of_each_experiment(steps):
    predicted = steps["duration_us"].to_numpy() * np.linspace(0.8, 1.3, len(steps))
    table = score_steps(predicted, steps, n_resamples=None).set_index(["experiment_id", "metric"])
    for experiment, rows in steps.groupby("experiment_id").indices.items():
        actual = steps["duration_us"].to_numpy()[rows]
        assert table.loc[(experiment, "mape_percent"), "value"] == mape_percent(predicted[rows], actual)
        assert table.loc[(experiment, "mspe_percent"), "value"] == mspe_percent(predicted[rows], actual)
    with pytest.raises(InputError, match="no test steps"):
        score_steps(np.zeros(0), steps.iloc[:0])


def test_a_prediction_ten_percent_too_long_is_a_bias_of_ten_in_every_group(steps):
    table = bias_table(1.1 * steps["duration_us"].to_numpy(), steps, n_resamples=None)
    assert np.allclose(table["mspe_percent"], 10.0)
    assert np.allclose(table["median_percent"], 10.0)
    per_grouping = table.groupby("by")["n_steps"].sum()
    assert (per_grouping == len(steps)).all(), "each grouping covers every step once"
    assert set(per_grouping.index) == {"phase", "decode_tokens", "model", "workload", "time_decile"}


def test_means_count_each_experiment_once():
    scores = pd.DataFrame(
        {"variant": "a", "metric": "m", "experiment_id": ["x", "y"], "value": [1.0, 3.0], "n_steps": [1, 1000]}
    )
    row = mean_over_experiments(scores).iloc[0]
    assert (row["value"], row["max_value"], row["n_experiments"]) == (2.0, 3.0, 2)


def test_residual_of_a_label_that_is_the_components_grows_with_prefill(steps, components):
    exact = steps.assign(duration_us=components.sum(axis=1) + 50.0)
    table = mixed_batch_residual(exact, components)
    pure = table[table["prefill_tokens"] == "0"]["median_residual_us"]
    assert np.allclose(pure, 0.0, atol=1e-6)
    large = table[table["prefill_tokens"] == "65-2048"]
    assert np.allclose(large["median_residual_us"], large["analytical_us"], rtol=1e-6)


def test_label_by_batch_holds_every_step_without_prefill(steps):
    table = label_by_batch(steps)
    assert table["n_steps"].sum() == (steps["prefill_tokens"] == 0).sum()
    assert (table["p10_us"] <= table["median_us"]).all()
    assert (table["median_us"] <= table["p90_us"]).all()


def test_rescoring_averages_each_experiment():
    predictions = pd.DataFrame(
        {
            "experiment_id": "e",
            "model": "m",
            "workload": "w",
            "duration_us": [100.0, 200.0],
            "predicted_us": [150.0, 100.0],
        }
    )
    row = rescore_published_predictions(predictions).iloc[0]
    assert (row["mape_percent"], row["mspe_percent"], row["n_steps"]) == (50.0, 0.0, 2)
