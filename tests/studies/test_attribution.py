"""Label and physics: folds never judge what they were fitted to, and known data give known errors."""

import numpy as np
import pandas as pd
import pytest

from stepcal.step_time.physical import physical_features
from stepcal.step_time.physical_parameters import STEP_PARAMETERS, by_name
from stepcal.studies import registry as studies
from stepcal.studies.diagnosis import attribution as a
from stepcal.studies.published_runs import load_experiments
from stepcal.studies.results.records import read_recorded

RUNS = [e for e in load_experiments() if e.experiment_id.endswith(("general", "codegen"))][:4]


def labelled(n=200, theta=(1.05, 1.1, 50, 30, 4, 2, 10, 9, 3000)):
    """Rows whose label is the physical model itself, at batches that grow with time."""
    tables, parts = [], []
    for e in RUNS:
        batch = np.linspace(5, 60, n)
        rows = pd.DataFrame(
            {
                "experiment_id": e.experiment_id,
                "decode_tokens": batch,
                "prefill_tokens": 0.0,
                "kv_tokens": batch * (600 + 50 * np.sin(np.arange(n))),
                "stage": (np.arange(n) >= n // 2).astype(int),
                "split": np.repeat(["train", "valid", "test"], [int(0.6 * n), int(0.2 * n), n - int(0.8 * n)]),
            }
        )
        parts.append(
            physical_features(
                e.deployment,
                decode_requests=batch,
                kv_tokens=rows["kv_tokens"],
            )
        )
        tables.append(rows.assign(interval_us=a.PhysicalModel().predict_us(by_name(theta, STEP_PARAMETERS), parts[-1])))
    return a._labelled(pd.concat(tables, ignore_index=True), a.PhysicalFeatures.joined(parts), RUNS)


@pytest.fixture(scope="module")
def data():
    return labelled()


def test_folds_never_judge_what_they_were_fitted_to(data):
    kinds = set()
    for fold in a.folds(data.rows):
        train, judged = data.rows[fold.train], data.rows[fold.judged]
        assert not (fold.train & fold.judged).any()
        assert set(train["split"]) == {"train"}
        assert set(judged["experiment_id"]) == {fold.experiment_id}
        if fold.kind in (a.WORKLOAD, a.MODEL):
            assert not set(train[fold.kind]) & set(judged[fold.kind])
        else:
            assert set(train["experiment_id"]) == {fold.experiment_id}
        if fold.kind == a.RATE:
            assert set(train["stage"]) == {0} and set(judged["stage"]) == {1}
        kinds.add(fold.kind)
    assert kinds == set(a.FOLDS)


def test_a_run_that_is_left_out_is_in_no_fit(data):
    name = RUNS[0].experiment_id
    for fold in a.folds(data.rows, [name]):
        assert not data.rows.loc[fold.train, "experiment_id"].eq(name).any()


def test_a_run_without_test_rows_is_judged_whole_and_only_by_others(data):
    name = RUNS[0].experiment_id
    rows = data.rows[(data.rows["experiment_id"] != name) | (data.rows["split"] == "train")].reset_index(drop=True)
    own = [f for f in a.folds(rows) if f.experiment_id == name]
    assert own and all(f.whole_run and f.kind in (a.WORKLOAD, a.MODEL) for f in own)


def test_physics_carries_to_another_model_and_a_line_does_not(data):
    scores = a.score_level(data, a.CORRECTED, "interval_us")
    mean = scores.groupby(["fold", "variant"])["mape_percent"].mean()
    assert mean[a.MODEL, a.PHYSICAL] < 3 < mean[a.MODEL, a.BLACKBOX]
    assert mean[a.WITHIN, a.TERMS] < 1  # its terms know all-reduces in two stages only
    assert mean[a.WITHIN, a.COMPONENTS] < 3


def test_only_the_preempting_run_is_cache_bound():
    bound = [e.experiment_id for e in load_experiments() if a.is_cache_bound(e)]
    assert bound == ["20260217-170634-llama-2-7b-tp1-reasoning"]


def test_recorded_table_says_what_the_page_says():
    summary = read_recorded(studies.ATTRIBUTION).tables["summary"]
    table = summary[~summary["overloaded"].astype(bool)].set_index(["level", "label", "fold", "variant"])
    mape = table["mape_percent"]
    for variant in (a.BLACKBOX, a.COMPONENTS, a.TERMS):
        assert mape[a.STEP, a.CORRECTED, a.WITHIN, variant] < 2
        assert mape[a.STEP, a.PUBLISHED, a.WITHIN, variant] > 50
    for fold in (a.RATE, a.WORKLOAD, a.MODEL):
        assert mape[a.REQUEST, a.CORRECTED, fold, a.PHYSICAL] < mape[a.REQUEST, a.CORRECTED, fold, a.BLACKBOX]
    assert table.loc[(a.REQUEST, a.CORRECTED, a.MODEL, a.PHYSICAL), "n_experiments"] == 12
