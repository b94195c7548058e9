"""The temporal split in plain Python: sort the step ids of one experiment and cut the list."""

from __future__ import annotations


def cut(step_ids: list[int], fractions: tuple[float, float] = (0.6, 0.2)) -> tuple[list[int], list[int], list[int]]:
    """Step ids of the training, validation and test part."""
    ordered = sorted(step_ids)
    n_train, n_valid = round(fractions[0] * len(ordered)), round(fractions[1] * len(ordered))
    return ordered[:n_train], ordered[n_train : n_train + n_valid], ordered[n_train + n_valid :]
