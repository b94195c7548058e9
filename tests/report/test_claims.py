"""The table of claims: well formed, tied to numbers that pages compute, and a build stops when one moves."""

import pytest
from small_book import code, prose, write_page

from stepcal.errors import InputError
from stepcal.locations import book_folder
from stepcal.report import build
from stepcal.report.claims import Claim, check_claims, claims_table, read_claims
from stepcal.report.execution import ReportError

HEAD = "id,claim,page,name,format,value,command,sample,evidence\n"


def test_every_claim_names_a_page_and_a_number_of_it():
    claims = read_claims()
    assert len({c.id for c in claims}) == len(claims) > 15
    for claim in claims:
        text = (book_folder() / f"{claim.page}.ipynb").read_text()
        assert claim.name in text, f"{claim.id}: `{claim.name}` is not on page `{claim.page}`"
        float(claim.value.replace(",", "")) if claim.format else None
    assert len(claims_table()) == len(claims)
    assert {c.sample for c in claims} >= {"in sample", "out of sample"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": "both"}, "`sample=both`"),
        ({"evidence": "hearsay"}, "hearsay"),
        ({"claim": "no number"}, "holds? `{}`"),
    ],
)
def test_a_malformed_claim_is_refused(change, message):
    row = dict(
        zip(
            HEAD.strip().split(","), ["a", "{}%", "first", "e", ".1f", "1.0", "x", "in sample", "measured"], strict=True
        )
    )
    with pytest.raises(InputError, match=message.replace("holds? `{}`", "hold `{}` once")):
        Claim(**row | change)


def test_a_build_stops_where_a_number_moved(small_book, tmp_path):
    write_page(
        small_book, "first", prose("# First"), code("from myst_nb import glue\nglue('error', 2.34, display=False)")
    )
    claims = small_book / "data" / "claims.csv"
    claims.write_text(HEAD + "a,off by {}%,first,error,.1f,2.3,x,in sample,measured\n")
    build.build_report(tmp_path / "out")
    claims.write_text(HEAD + "a,off by {}%,first,error,.1f,2.4,x,in sample,measured\n")
    with pytest.raises(ReportError, match=r"a: the claim says 2.4, page `first` has 2.3"):
        build.build_report(tmp_path / "out")
    # With another parameter a page may say something else.
    check_claims(tmp_path / "missing.csv", {})
