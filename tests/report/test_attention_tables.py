"""The page on attention says what the constants say."""

from pathlib import Path

from stepcal.report.attention_tables import TABLES
from stepcal.report.input_tables import filled

PAGE = Path(__file__).parents[2] / "book" / "attention.md"


def test_the_page_has_the_tables_of_the_constants():
    text = PAGE.read_text(encoding="utf-8")
    assert text == filled(text, TABLES), "run `python -m stepcal.report.attention_tables`"
    assert all(f"<!-- table: {name} -->\n|" in text for name in TABLES)


def test_a_table_that_is_out_of_date_is_written_anew():
    text = PAGE.read_text(encoding="utf-8")
    stale = text.replace("| `h100-sxm` | prefill |", "| `h100-sxm` | postfill |")
    assert stale != text
    assert filled(stale, TABLES) == text
