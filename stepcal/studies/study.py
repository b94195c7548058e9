"""What a study is: tables with a provenance, and how it gets its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from stepcal.datasets import load_steps
from stepcal.studies.results.provenance import Provenance

Tables = dict[str, pd.DataFrame]
ACCELERATOR = "h100-sxm"
"""The GPU of all 16 experiments."""


@dataclass(frozen=True)
class Study:
    """Tables of one analysis, short texts such as fit reports, and their provenance."""

    name: str
    tables: Tables
    provenance: Provenance
    texts: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, table: str) -> pd.DataFrame:
        return self.tables[table]


@dataclass(frozen=True)
class StudyKind:
    """How a study gets its rows and what it does with them.

    Attributes
    ----------
    run : callable
        Takes the loaded tables in order, and options; returns tables and texts.
    loaders : tuple of callable
        Each takes the data folder and returns a table.
    simulates : bool
        Whether simulated step rows can take the place of the loaded ones.
    costly : bool
        Whether a recording of the very same data is read instead of computing anew; a test compares the two.
    """

    run: Callable[..., tuple[Tables, dict[str, str]]]
    loaders: tuple[Callable[[Path | str | None], pd.DataFrame], ...] = (load_steps,)
    simulates: bool = True
    costly: bool = False
