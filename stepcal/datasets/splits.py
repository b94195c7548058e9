"""Who is trained on and who is tested: temporal splits within an experiment, and leaving whole groups out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from stepcal.errors import InputError
from stepcal.units import IntArray

STUDY_FRACTIONS = (0.6, 0.2)
"""Train and validation shares of the study; the rest is the test split."""


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of a table, each in time order within its experiments."""

    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame


def split_starts(n: ArrayLike, fractions: tuple[float, float] = STUDY_FRACTIONS) -> tuple[IntArray, IntArray]:
    """Return where the validation and the test part begin among `n` rows in time order: every split of the package is this.

    Parameters
    ----------
    n : array_like of int
    fractions : (float, float)
        Shares of the training and validation part.

    Returns
    -------
    first_valid, first_test : ndarray of int
        ``round(0.6 n)``, and that plus ``round(0.2 n)``; halves go to the even number, as in the study.

    Examples
    --------
    >>> first_valid, first_test = split_starts(52)
    >>> int(first_valid), int(first_test)
    (31, 41)
    """
    n_train, n_valid = (np.rint(share * np.asarray(n)).astype(np.int64) for share in fractions)
    return n_train, n_train + n_valid


def temporal_split(steps: pd.DataFrame, fractions: tuple[float, float] = STUDY_FRACTIONS) -> Split:
    """Cut each experiment into early, middle and late steps.

    ``n_train = round(0.6 n)``, ``n_valid = round(0.2 n)``, the rest is tested; with the study's fractions this gives all
    16 published test sizes.

    Parameters
    ----------
    steps : DataFrame
        Step rows with `experiment_id` and `step_id`.
    fractions : (float, float)
        Shares of the training and validation part.

    Returns
    -------
    Split

    Raises
    ------
    InputError
        If the fractions are not positive or leave nothing to test, or a part of an experiment comes out empty.
    """
    train_share, valid_share = fractions
    if not (train_share > 0 and valid_share >= 0 and train_share + valid_share < 1):
        raise InputError(
            f"`fractions={fractions}` must be positive and sum to less than 1, so that something is left to test."
        )
    ordered = steps.sort_values(["experiment_id", "step_id"], kind="stable")
    position = ordered.groupby("experiment_id", observed=True).cumcount().to_numpy()
    size = ordered.groupby("experiment_id", observed=True)["step_id"].transform("size").to_numpy()
    first_valid, first_test = split_starts(size, fractions)
    in_train, in_test = position < first_valid, position >= first_test
    parts = {"train": in_train, "valid": ~in_train & ~in_test, "test": in_test}
    _refuse_empty(ordered, parts, optional="valid" if valid_share == 0 else None)
    return Split(**{name: ordered[rows] for name, rows in parts.items()})


def leave_one_out(table: pd.DataFrame, by: str) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Yield ``(held_out, train, test)`` for each value of the column `by`.

    Raises
    ------
    InputError
        If the column is missing or has fewer than two values: nothing would be left to train on.
    """
    if by not in table:
        raise InputError(f"`by={by!r}` is no column of the table. Columns: {', '.join(map(str, table.columns))}.")
    values = sorted(table[by].unique())
    if len(values) < 2:
        raise InputError(f"`by={by!r}` has {len(values)} value(s); leaving one out needs at least 2.")
    for value in values:
        held_out = table[by] == value
        yield str(value), table[~held_out], table[held_out]


def _refuse_empty(ordered: pd.DataFrame, parts: dict[str, np.ndarray], optional: str | None) -> None:
    experiments = ordered["experiment_id"].to_numpy()
    if not len(ordered):
        raise InputError("The table has no steps to split. Check the experiment filter.")
    for name, rows in parts.items():
        missing = sorted(set(experiments) - set(experiments[rows]))
        if missing and name != optional:
            n = int((experiments == missing[0]).sum())
            raise InputError(
                f"The {name} split of experiment `{missing[0]}` is empty: it has {n} step(s). "
                "An experiment needs at least 4 steps for a 60/20/20 split."
            )


def select_experiments(steps: pd.DataFrame, wanted: Sequence[str]) -> pd.DataFrame:
    """Keep the steps of some experiments; all of them if none is named.

    Raises
    ------
    InputError
        If an experiment has no steps; the message lists those that have.
    """
    if not wanted:
        return steps
    have = sorted(steps["experiment_id"].unique())
    for experiment in wanted:
        if experiment not in have:
            raise InputError(f"No steps of experiment `{experiment}`. Experiments with steps: {', '.join(have)}.")
    return steps[steps["experiment_id"].isin(list(wanted))]
