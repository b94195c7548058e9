"""Which parameters a calibration may learn, by the name of the coefficients that are its prior."""

from __future__ import annotations

from collections.abc import Sequence

from stepcal.errors import InputError
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.step_time.learned import LEARNED_MODELS
from stepcal.step_time.physical_parameters import LearnedParameter


def prior_of(name_or_path: str) -> tuple[StepTimeModel, Sequence[LearnedParameter]]:
    """Return coefficients to start from, and the parameters that data may move.

    Raises
    ------
    InputError
        If the variant declares no priors.
    """
    coefficients = load_coefficients(name_or_path)
    if coefficients.variant not in LEARNED_MODELS:
        raise InputError(
            f"`--prior {name_or_path}` is of the variant `{coefficients.variant}`, whose parameters have no priors. Known: "
            f"{', '.join(LEARNED_MODELS)}."
        )
    return coefficients, LEARNED_MODELS[coefficients.variant].parameters
