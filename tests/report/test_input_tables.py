"""The page on inputs says what the code does."""

from pathlib import Path

from stepcal.report.input_tables import TABLES, with_tables

PAGE = Path(__file__).parents[2] / "book" / "inputs.md"


def test_the_page_has_the_tables_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run `python -m stepcal.report.input_tables`"
    assert all(f"<!-- table: {name} -->\n|" in text for name in TABLES)


def test_a_table_that_is_out_of_date_is_written_anew():
    text = PAGE.read_text(encoding="utf-8")
    stale = text.replace("| `chatglm` |", "| `chatglm9` |")
    assert stale != text
    assert with_tables(stale) == text
