"""The acceptance table: every row is well formed, and only a row that holds can be cited."""

import pandas as pd
import pytest

from stepcal.errors import InputError
from stepcal.report import acceptance


@pytest.fixture
def table_of(monkeypatch, tmp_path):
    """Write a table of one row and make it the project's."""

    def write(**row):
        (tmp_path / "tests").mkdir(exist_ok=True)
        full = dict.fromkeys(acceptance.COLUMNS, "x") | {"id": "a", "issue": "2"} | row
        pd.DataFrame([full]).to_csv(tmp_path / "tests" / "acceptance.csv", index=False)
        monkeypatch.setattr("stepcal.report.acceptance.shipped_folder", lambda: tmp_path)

    return write


def test_the_projects_table_is_well_formed_and_each_figure_has_command_and_day():
    table = acceptance.load()
    measured = table[table["holds"] != acceptance.OPEN]
    assert (measured["command"] != "").all()
    assert measured["date"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()


def test_a_row_that_holds_can_be_cited(table_of):
    table_of(measured="0.1 s", holds="yes")
    assert acceptance.cite("a")["measured"] == "0.1 s"


@pytest.mark.parametrize("row", [{"measured": "9 s", "holds": "no"}, {"measured": "not measured", "holds": "open"}])
def test_a_row_that_does_not_hold_is_refused(table_of, row):
    table_of(**row)
    with pytest.raises(InputError, match="no page may cite it"):
        acceptance.cite("a")


@pytest.mark.parametrize("words", [acceptance.NOT_MEASURED, acceptance.UNVERIFIED])
def test_what_was_not_measured_cannot_claim_to_hold(table_of, words):
    table_of(measured=words, holds="yes")
    with pytest.raises(InputError, match="Rows without a figure"):
        acceptance.load()


def test_an_unknown_row_is_refused(table_of):
    table_of(measured="1", holds="yes")
    with pytest.raises(InputError, match="no row `b`"):
        acceptance.cite("b")
