"""The first mention of a term is linked, and nothing that is not prose."""

from stepcal.report.glossary import link_terms


def linked(*sources, terms=("KV cache", "step", "TTFT")):
    cells = [{"cell_type": "markdown", "source": s} for s in sources]
    return [c["source"] for c in link_terms(cells, terms)]


def test_the_first_mention_is_linked_on_a_page():
    assert linked("A step reads the KV cache.", "Another step.") == [
        "A {term}`step` reads the {term}`KV cache`.",
        "Another step.",
    ]


def test_case_follows_the_sentence_and_capitals_are_names():
    assert linked("Step by ttft and TTFT") == ["{term}`Step <step>` by ttft and {term}`TTFT`"]


def test_what_is_not_prose_stays():
    for text in (
        "# A step",
        "`step`",
        "$step$",
        "[step](x.md)",
        "| step |",
        "{glue:text}`step`",
        "```\nstep\n```",
        "step-wise",
    ):
        assert linked(text) == [text]
