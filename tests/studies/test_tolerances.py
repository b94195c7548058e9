"""Comparing a table with its recording: what counts as a change, and what does not."""

import json

import numpy as np
import pandas as pd
import pytest

from stepcal.errors import InputError
from stepcal.locations import data_folder
from stepcal.studies.registry import STUDIES
from stepcal.studies.results.tolerances import Tolerance, difference, tolerance_table, tolerances_of

SHARE = 0.1
TABLE = pd.DataFrame(
    {
        "name": ["a", "b", "c"],
        "n": [1, 2, 3],
        "value": [100.0, -2.0, 0.5],
        "low": [90.0, -3.0, np.nan],
        "high": [110.0, -1.0, np.nan],
        "log_sd": [0.1, 0.2, 0.05],
    }
)


def declared(of: str, by: str, column: str = "*") -> dict[tuple[str, str], Tolerance]:
    return {
        ("t", column): Tolerance("s", "t", column, SHARE, of, by),
        ("t", "*"): Tolerance("s", "t", "*", SHARE, of, by),
    }


@pytest.mark.parametrize(
    ("of", "by", "row", "allowed"),
    [
        ("interval", "low..high", 0, SHARE * 10.0),
        ("interval", "low..high", 1, SHARE * 1.0),
        ("interval", "low..high", 2, SHARE * 0.01 * 0.5),
        ("spread", "log_sd", 1, SHARE * 2.0 * 0.2),
        ("decimals", "1", 0, SHARE * 0.1),
        ("decimals", "-2", 0, SHARE * 100.0),
        ("digits", "4", 0, SHARE * 0.1),
        ("digits", "4", 1, SHARE * 0.001),
    ],
)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_change_above_the_tolerance_is_found_and_one_below_is_not(of, by, row, allowed, sign) -> None:
    for factor, is_found in ((0.9, False), (1.1, True)):
        changed = TABLE.copy()
        changed.loc[row, "value"] += sign * factor * allowed
        found = difference("t", changed, TABLE, declared(of, by))
        assert (found.size > 1.0) == is_found
        assert (found.column, found.row) == ("value", row)
        assert found.size == pytest.approx(factor, rel=1e-6)


def test_equal_tables_differ_by_nothing() -> None:
    found = difference("t", TABLE.copy(), TABLE, declared("digits", "4"))
    assert (found.size, str(found)) == (0.0, "table `t` is as recorded, 0 of its tolerance")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.assign(name=["a", "b", "x"]),
        lambda t: t.assign(n=[1, 2, 4]),
        lambda t: t.assign(value=[100.0, -2.0, np.nan]),
        lambda t: t.assign(low=[90.0, -3.0, 0.0]),
        lambda t: t.assign(value=[100.0, -2.0, np.inf]),
        lambda t: t.head(2),
        lambda t: t.rename(columns={"value": "worth"}),
    ],
    ids=["word", "whole number", "missing", "no longer missing", "infinite", "fewer rows", "other columns"],
)
def test_what_has_no_tolerance_is_found(change) -> None:
    found = difference("t", change(TABLE), TABLE, declared("digits", "4"))
    assert found.size == np.inf
    assert "t" in str(found)


def test_a_count_may_have_a_tolerance_of_its_own() -> None:
    changed = TABLE.assign(n=[1, 2, 4])
    own = declared("digits", "4") | {("t", "n"): Tolerance("s", "t", "n", 1.0, "decimals", "-1")}
    assert difference("t", changed, TABLE, own).size == pytest.approx(0.1)


RANKING = pd.DataFrame({"what": ["a", "b", "c", "d"], "gain": [3.0, 2.0, 1.9999, 1.0]})


def ranked(what: str, gain: list[float]) -> float:
    return difference(
        "t", pd.DataFrame({"what": list(what), "gain": gain}), RANKING, declared("ranking", "3", "gain")
    ).size


def test_equals_of_a_ranking_come_in_any_order() -> None:
    assert ranked("acbd", [3.0, 2.0, 1.9999, 1.0]) < 1.0
    assert ranked("bacd", [3.0, 2.0, 1.9999, 1.0]) > 1.0


def test_at_the_end_of_a_ranking_equals_take_each_others_place() -> None:
    assert ranked("abce", [3.0, 2.0, 1.9999, 1.0001]) < 1.0
    assert ranked("abce", [3.0, 2.0, 1.9999, 1.1]) > 1.0
    assert ranked("aecd", [3.0, 2.0, 1.9999, 1.0]) > 1.0


def test_a_table_without_a_tolerance_is_refused() -> None:
    with pytest.raises(InputError, match=r"declares no tolerance for `value`.*tolerances.csv"):
        difference("t", TABLE, TABLE, {})


def test_every_recorded_table_declares_its_tolerance() -> None:
    for study in STUDIES:
        path = data_folder() / "recorded" / f"{study}.json"
        own = tolerances_of(study)
        for name, columns in json.loads(path.read_text(encoding="utf-8"))["tables"].items():
            table = pd.DataFrame(columns)
            assert difference(name, table, table, own).size == 0.0, f"{study}, {name}"
        assert {t for t, _ in own} <= set(json.loads(path.read_text(encoding="utf-8"))["tables"]), study


def test_tolerances_are_shares_of_what_is_known() -> None:
    table = tolerance_table()
    assert set(table["study"]) <= set(STUDIES)
    assert table["share"].between(0.0, 0.5, inclusive="right").all()
    assert not table.duplicated(["study", "table", "column"]).any()


def test_a_declaration_that_is_none_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("stepcal.studies.results.tolerances.data_folder", lambda: tmp_path)
    (tmp_path / "recorded").mkdir()
    path = tmp_path / "recorded" / "tolerances.csv"
    path.write_text("study,table,column,share,of,by\nh1,t,*,0.1,guess,4\n")
    with pytest.raises(InputError, match="row 2: `of` is one of"):
        tolerance_table()
    path.write_text("study,table,column,share,of,by\nh1,t,*,0,digits,4\n")
    with pytest.raises(InputError, match="`share` is positive"):
        tolerance_table()
