"""``stepcal drift``: whether coefficients still fit new logs, and since when they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.capacity import NORMAL_95
from stepcal.servers.coefficient_file import KnownModel
from stepcal.servers.log import ServedLog
from stepcal.servers.replay import replayed_latencies_s
from stepcal.units import PERCENT

BLOCKS = 12
"""Spans of time that a run is cut into."""
SMALLEST_BLOCK = 8
JUMP_SIGMAS = 4.0
"""A jump of the mean error counts only beyond this many standard deviations of the model's own: both sides have it."""
CHANGE_SIGMAS = 4.0
"""Spread of block errors beyond which a jump is a change: the largest of eleven splits is looked for."""


@dataclass(frozen=True)
class Drift:
    """How far a run is from its coefficients.

    Attributes
    ----------
    run : str
    error_percent : float
        Of the prediction's mean E2E.
    bound_percent : float
        What the coefficients' own error allows (95%).
    has_drifted : bool
    since_s : float or None
        Arrival, counted from the run's start, from which errors are of another size; None where there is no jump.
    block_errors_percent : tuple of float
    """

    run: str
    error_percent: float
    bound_percent: float
    has_drifted: bool
    since_s: float | None
    block_errors_percent: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """Return for JSON."""
        return asdict(self)

    def report(self) -> str:
        """Return a line for a terminal."""
        word = "no longer fit" if self.has_drifted else "fit"
        since = "" if self.since_s is None else f"; errors change {self.since_s:,.0f} s after the start"
        return (
            f"{self.run}: coefficients {word}: mean E2E {self.error_percent:+.1f}% "
            f"(allowed: {self.bound_percent:.1f}%){since}"
        )


def drift_of(log: ServedLog, model: KnownModel) -> Drift:
    """Compare a log with coefficients whose error is known.

    Parameters
    ----------
    log : ServedLog
        With single requests.
    model : KnownModel

    Returns
    -------
    Drift

    Raises
    ------
    InputError
        If single requests are not at hand, or too few.
    """
    if log.e2e_s is None:
        raise InputError(f"`{log.run}` has summaries only; drift is read off single requests.")
    predicted, _ = replayed_latencies_s(log, model.coefficients)
    both = np.flatnonzero(~np.isnan(predicted) & ~np.isnan(log.e2e_s))
    n_blocks = min(BLOCKS, len(both) // SMALLEST_BLOCK)
    if n_blocks < 1:
        raise InputError(f"`{log.run}` has {len(both)} completed requests; drift needs at least {SMALLEST_BLOCK}.")
    blocks = np.array_split(both, n_blocks)
    errors = np.array([np.log(predicted[b].mean() / log.e2e_s[b].mean()) for b in blocks])
    overall = float(np.log(predicted[both].mean() / log.e2e_s[both].mean()))
    spread = float(errors.std(ddof=1)) if len(errors) > 1 else 0.0
    allowed = NORMAL_95 * float(
        np.hypot(model.log_sd_on(log.deployment.accelerator.name), spread / np.sqrt(len(errors)))
    )
    jump = _jump(errors, JUMP_SIGMAS * model.log_sd)
    since = None if jump is None else float(log.requests.arrival_s[blocks[jump][0]] - log.requests.arrival_s[0])
    return Drift(
        run=log.run,
        error_percent=float(PERCENT * np.expm1(overall)),
        bound_percent=float(PERCENT * np.expm1(allowed)),
        has_drifted=abs(overall) > allowed or jump is not None,
        since_s=since,
        block_errors_percent=tuple(float(PERCENT * np.expm1(e)) for e in errors),
    )


def _jump(errors: np.ndarray, smallest: float) -> int | None:
    """First block after the largest jump of the mean error, where it is beyond chance and the model's own error."""
    best: tuple[float, int] | None = None
    for i in range(2, len(errors) - 1):
        before, after = errors[:i], errors[i:]
        size = abs(float(after.mean() - before.mean()))
        noise = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after)) + 1e-12
        if size > smallest and size / noise > CHANGE_SIGMAS and (best is None or size / noise > best[0]):
            best = (size / noise, i)
    return None if best is None else best[1]
