import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.splits import cut

from stepcal.datasets import load_xgboost_predictions, published_h1_per_experiment, published_h2
from stepcal.datasets.splits import leave_one_out, temporal_split
from stepcal.errors import InputError


def table(sizes, seed=0):
    """Steps of experiments of the given sizes, in random order, with gaps in their ids."""
    rng = np.random.default_rng(seed)
    rows = [(f"run-{i}", int(step)) for i, n in enumerate(sizes) for step in rng.choice(100 * n, n, replace=False)]
    frame = pd.DataFrame(rows, columns=["experiment_id", "step_id"])
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


def test_the_published_test_sizes_come_out_for_all_16_experiments():
    sizes = published_h1_per_experiment().groupby("experiment_id")["n_steps"].first()
    assert (len(sizes), sizes.sum()) == (16, 122_752)
    steps = pd.DataFrame({"experiment_id": np.repeat(sizes.index, sizes), "step_id": np.arange(sizes.sum())})
    tested = temporal_split(steps).test.groupby("experiment_id").size()
    published = published_h2().set_index("experiment_id")["n_test"]
    assert tested.to_dict() == published.to_dict()


def test_the_real_test_split_is_the_published_one_step_for_step(traces, traces_folder):
    published = load_xgboost_predictions(traces_folder).set_index(["experiment_id", "step_id"])["duration_us"]
    ours = temporal_split(traces).test.set_index(["experiment_id", "step_id"])["duration_us"]
    theirs = published[published.index.get_level_values(0).isin(traces["experiment_id"].unique())]
    pd.testing.assert_series_equal(ours.sort_index(), theirs.sort_index())


@given(st.lists(st.integers(4, 60), min_size=1, max_size=4), st.integers(0, 100))
def test_parts_are_disjoint_complete_and_in_time_order(sizes, seed):
    steps = table(sizes, seed)
    split = temporal_split(steps)
    parts = [split.train, split.valid, split.test]
    assert sorted(np.concatenate([p.index for p in parts])) == list(steps.index)
    for experiment, rows in steps.groupby("experiment_id"):
        ids = [p.loc[p["experiment_id"] == experiment, "step_id"].tolist() for p in parts]
        assert tuple(ids) == cut(rows["step_id"].tolist())


@given(st.integers(2, 200), st.floats(0.3, 0.7), st.floats(0.05, 0.25))
def test_other_fractions_cut_where_they_say(n, train, valid):
    train_size, valid_size = round(train * n), round(valid * n)
    steps = table([n])
    if not (train_size and valid_size and n - train_size - valid_size > 0):
        with pytest.raises(InputError, match="split of experiment `run-0` is empty"):
            temporal_split(steps, (train, valid))
        return
    split = temporal_split(steps, (train, valid))
    assert (len(split.train), len(split.valid)) == (train_size, valid_size)


def test_rows_are_passed_on_unchanged():
    steps = table([20]).assign(duration_us=np.arange(20.0), workload="general")
    split = temporal_split(steps)
    pd.testing.assert_frame_equal(pd.concat([split.train, split.valid, split.test]).sort_index(), steps)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_experiment_that_is_too_short_is_named(n):
    with pytest.raises(InputError, match=rf"split of experiment `run-1` is empty: it has {n} step\(s\).*at least 4"):
        temporal_split(table([10, n]))


def test_nothing_to_split_is_refused():
    with pytest.raises(InputError, match="no steps to split"):
        temporal_split(table([10]).iloc[:0])


@pytest.mark.parametrize("fractions", [(0.0, 0.2), (-0.1, 0.2), (0.8, 0.2), (0.6, -0.1), (float("nan"), 0.2)])
def test_fractions_that_leave_nothing_are_refused(fractions):
    with pytest.raises(InputError, match="`fractions="):
        temporal_split(table([10]), fractions)


def test_no_validation_part_may_be_asked_for():
    split = temporal_split(table([10]), (0.5, 0.0))
    assert [len(p) for p in (split.train, split.valid, split.test)] == [5, 0, 5]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30))
def test_leave_one_out_holds_each_value_out_once(values):
    frame = pd.DataFrame({"model": values})
    if len(set(values)) < 2:
        with pytest.raises(InputError, match=r"has 1 value\(s\)"):
            list(leave_one_out(frame, "model"))
        return
    rounds = list(leave_one_out(frame, "model"))
    assert [held_out for held_out, _, _ in rounds] == sorted(set(values))
    for held_out, train, test in rounds:
        assert set(test["model"]) == {held_out}
        assert held_out not in set(train["model"])
        assert sorted([*train.index, *test.index]) == list(frame.index)


def test_leaving_out_by_a_column_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"`by='gpu'` is no column.*experiment_id"):
        list(leave_one_out(table([5]), "gpu"))
