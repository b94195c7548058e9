"""The step-time models that are learned from measured runs: what they are called, what is learned, how they compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime
from stepcal.specs.deployment import Deployment
from stepcal.step_time.kernel_model import compile_kernels
from stepcal.step_time.kernel_parameters import KERNEL_PARAMETERS
from stepcal.step_time.physical import compile_physical
from stepcal.step_time.physical_parameters import PARAMETERS, LearnedParameter


@dataclass(frozen=True)
class LearnedModel:
    """A step-time model with learned parameters.

    Attributes
    ----------
    variant : str
        Its name in coefficient files.
    parameters : tuple of LearnedParameter
        Those of the step, and those around the engine.
    compile : callable
        Takes the parameters by name and a deployment; returns the compiled step time.
    """

    variant: str
    parameters: tuple[LearnedParameter, ...]
    compile: Callable[[Mapping[str, float], Deployment], CompiledStepTime]


PHYSICAL = LearnedModel("default", PARAMETERS, compile_physical)
"""Bytes and FLOPs over the datasheet's rates; ``default`` is the variant's name in the files of 2026-11-24."""
KERNELS = LearnedModel("kernels", KERNEL_PARAMETERS, compile_kernels)
"""Measured kernels."""
LEARNED_MODELS = {model.variant: model for model in (PHYSICAL, KERNELS)}


def learned_model(variant: str) -> LearnedModel:
    """Return a learned model by its variant.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if variant not in LEARNED_MODELS:
        raise InputError(f"Unknown learned model `{variant}`. There are {', '.join(LEARNED_MODELS)}.")
    return LEARNED_MODELS[variant]
