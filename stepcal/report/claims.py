"""The claims that the report makes, each with the page that computes it; a build stops if a number has moved.

``data/claims.csv`` has a row for each: what is said, the page and the name under which that page gives the number to its
prose, the number as it was when the claim was written, how to get it without the book, and what it rests on.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stepcal.errors import InputError
from stepcal.locations import data_folder
from stepcal.report.execution import ReportError
from stepcal.report.finishing import glued_values

SAMPLES = ("in sample", "post hoc", "out of sample", "no fit")
EVIDENCE = ("measured", "inferred", "published", "simulated", "timed by us")


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes
    ----------
    id : str
    claim : str
        With ``{}`` where the number stands.
    page, name : str
        Page, and the name of the number there.
    format : str
        Of the number, such as ``.1f``.
    value : str
        The number as it was when the claim was written, in that format.
    command : str
        What gives it without the book.
    sample : str
        One of `SAMPLES`.
    evidence : str
        One of `EVIDENCE`.
    """

    id: str
    claim: str
    page: str
    name: str
    format: str
    value: str
    command: str
    sample: str
    evidence: str

    def __post_init__(self) -> None:
        if self.sample not in SAMPLES or self.evidence not in EVIDENCE:
            raise InputError(
                f"claims.csv, `{self.id}`: `sample={self.sample}` is one of {', '.join(SAMPLES)}, and "
                f"`evidence={self.evidence}` one of {', '.join(EVIDENCE)}."
            )
        if self.claim.count("{}") != 1:
            raise InputError(f"claims.csv, `{self.id}`: the claim has to hold `{{}}` once, where its number stands.")


def read_claims(path: Path | None = None) -> list[Claim]:
    """Return the claims of a checkout, in the order of the book.

    Raises
    ------
    InputError
        If a row is not well formed.
    """
    with (path or data_folder() / "claims.csv").open(encoding="utf-8", newline="") as file:
        try:
            return [Claim(**row) for row in csv.DictReader(file)]
        except TypeError as error:
            raise InputError(f"{path or 'data/claims.csv'} has other columns than a claim has ({error}).") from None


def claims_table() -> pd.DataFrame:
    """Return the claims as a page shows them: `claim`, `page`, `command`, `sample`, `evidence`."""
    return pd.DataFrame(
        [
            {
                "claim": c.claim.replace("{}", c.value),
                "page": c.page,
                "sample": c.sample,
                "evidence": c.evidence,
                "command": f"`{c.command}`",
            }
            for c in read_claims()
        ]
    )


def moved_claims(claims: list[Claim], notebooks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each claim whose page gives another number, or none; pages that were not executed are left out."""
    lines = []
    for claim in claims:
        if claim.page not in notebooks:
            continue
        values = glued_values(notebooks[claim.page])
        now = format(values[claim.name], claim.format) if claim.name in values else "nothing"
        if now != claim.value:
            lines.append(f"{claim.id}: the claim says {claim.value}, page `{claim.page}` has {now} (`{claim.name}`)")
    return lines


def check_claims(path: Path, notebooks: Mapping[str, Mapping[str, Any]]) -> None:
    """Stop where a claim's number has moved.

    Raises
    ------
    ReportError
        Naming each such claim. Look why it moved; then change the claim, its number, or the code.
    """
    if path.is_file() and (moved := moved_claims(read_claims(path), notebooks)):
        raise ReportError(
            "Claims of data/claims.csv no longer hold:\n  "
            + "\n  ".join(moved)
            + "\nFind out why each moved; then change the claim and its value, or the code."
        )
