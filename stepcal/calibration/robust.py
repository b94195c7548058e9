"""Errors that a model cannot explain weigh less: the pseudo-Huber function and its slope."""

from __future__ import annotations

import numpy as np

from stepcal.units import FloatArray

ROBUST_SIGMAS = 2.0
"""Errors beyond this many sigmas count linearly (Huber 1964, doi:10.1214/aoms/1177703732)."""


def soft(errors: FloatArray) -> FloatArray:
    """Pseudo-Huber residuals: as they are up to `ROBUST_SIGMAS`, their squares linear beyond.

    So a run that the model misses does not bend the rest.
    """
    scaled = errors / ROBUST_SIGMAS
    return np.sign(errors) * ROBUST_SIGMAS * np.sqrt(2.0 * (np.hypot(1.0, scaled) - 1.0))


def soft_slope(errors: FloatArray) -> FloatArray:
    """Derivative of `soft`."""
    scaled = np.abs(errors) / ROBUST_SIGMAS
    height = np.hypot(1.0, scaled)
    small = scaled < 1e-4  # the quotient below is 0 / 0 there
    root = np.sqrt(2.0 * np.where(small, 1.0, height - 1.0))
    return np.where(small, 1.0, scaled / (height * root))
