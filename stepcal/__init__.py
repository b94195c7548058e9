"""stepcal: how long does one step of an LLM server take, and how well can a few learned factors predict it?

The names below are what a program needs; each is loaded when it is first used, so importing stepcal costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepcal.evaluation.evaluate import evaluate
    from stepcal.evaluation.verdict import judge
    from stepcal.experiments.experiment import Experiment
    from stepcal.servers.from_experiments import calibrate
    from stepcal.simulator.load.shared_prefix import Workload
    from stepcal.specs.architecture import ModelArchitecture
    from stepcal.specs.deployment import Deployment
    from stepcal.specs.hardware import Accelerator
    from stepcal.step_time.coefficients import StepTimeModel
    from stepcal.step_time.serve import simulate

__version__ = "0.1.0"
__all__ = [
    "Accelerator",
    "Deployment",
    "Experiment",
    "ModelArchitecture",
    "StepTimeModel",
    "Workload",
    "calibrate",
    "evaluate",
    "judge",
    "simulate",
]

_HOMES = {
    "Accelerator": "stepcal.specs.hardware:Accelerator",
    "Deployment": "stepcal.specs.deployment:Deployment",
    "Experiment": "stepcal.experiments.experiment:Experiment",
    "ModelArchitecture": "stepcal.specs.architecture:ModelArchitecture",
    "StepTimeModel": "stepcal.step_time.coefficients:StepTimeModel",
    "Workload": "stepcal.simulator.load.shared_prefix:Workload",
    "calibrate": "stepcal.servers.from_experiments:calibrate",
    "evaluate": "stepcal.evaluation.evaluate:evaluate",
    "judge": "stepcal.evaluation.verdict:judge",
    "simulate": "stepcal.step_time.serve:simulate",
}
"""Where each public name is defined; a test holds it equal to the imports above."""


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"stepcal has no `{name}`. It has {', '.join(__all__)}.")
    module, _, defined = _HOMES[name].partition(":")
    value = getattr(import_module(module), defined)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
