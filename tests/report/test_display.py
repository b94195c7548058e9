"""Tables on pages: what is shown of them, in which order, under which names and in which format."""

import pandas as pd
import pytest

from stepcal.errors import InputError
from stepcal.report import display

TABLE = pd.DataFrame(
    {
        "experiment_id": ["20260217-202857-llama-2-70b-tp4-general"],
        "e2e_ms": [1234.5],
        "n_steps": [10_000],
        "left_out": [1],
    }
)


def shown(**options):
    return display.show_table(TABLE, "A table", **options).data


def test_columns_choose_order_heading_and_format_in_one_place():
    text = shown(columns={"n_steps": "steps {:,}", "e2e_ms": "{:.0f}", "experiment_id": ""})
    assert text.index("steps") < text.index("E2E (ms)") < text.index("experiment")
    assert "10,000" in text
    assert "1234<" in text
    assert "llama-2-70b general" in text
    assert "left out" not in text
    assert "left_out" not in text


def test_columns_say_what_formats_and_names_say():
    by_columns = shown(columns={"e2e_ms": "latency {:.1f}", "n_steps": "{:,}"})
    apart = display.show_table(
        TABLE[["e2e_ms", "n_steps"]],
        "A table",
        formats={"e2e_ms": "{:.1f}", "n_steps": "{:,}"},
        names={"e2e_ms": "latency"},
    ).data
    assert by_columns == apart


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(InputError, match=r"`columns` names `e2e_s`; the table has experiment_id, e2e_ms"):
        shown(columns={"e2e_s": ""})
