"""Coefficient files: a fitted step-time model as JSON, by name or by path, ready to drive a simulator.

``stepcal fit VARIANT --json FILE`` writes one. The recorded fits of the study's variants go by their names, and a file
of variant ``affine`` gives the terms of an affine step time directly (`combine` says whether host and GPU overlap).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepcal.documents import read_json_object
from stepcal.errors import InputError, shown
from stepcal.kernels.constants import ALL_REDUCE_FILE, KERNELS_FILE
from stepcal.locations import data_folder
from stepcal.simulator import CompiledStepTime
from stepcal.simulator.steptime import add_components
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import Accelerator
from stepcal.step_time.attention_kernels import unvalidated_notes
from stepcal.step_time.attention_kinds import within_windows
from stepcal.step_time.baselines import BLACKBOX_FEATURES, Blackbox, ConstantStep, RawAnalytical, StepBaseline
from stepcal.step_time.compile import compile_baseline, compile_corrections
from stepcal.step_time.corrections import CorrectionModel, Global9, Model36, Phase16
from stepcal.step_time.kernel_model import kernel_notes
from stepcal.step_time.learned import KERNELS, LEARNED_MODELS
from stepcal.step_time.one_step import batch_of, check_within_limits, wide_server
from stepcal.step_time.physical_parameters import API_PARAMETERS, PARAMETERS

DEFAULT = "default"
"""The kernel model as fitted to 16 experiments, frozen in ``data/coefficients/``."""
PHYSICAL_DEFAULT = "default-2026-11-24"
"""The physical model as calibrated on the 16, the default until the kernel model took its place; H1b, H2b and H3 cite it."""
SHIPPED_VARIANTS = ("global9", "phase16", "model36")
"""The study's variants, whose fits to its public traces ship in ``data/coefficients/`` under their names."""
FROZEN = (DEFAULT, PHYSICAL_DEFAULT)
"""Names of frozen coefficients: today's default, and earlier ones by the day they were frozen."""
AFFINE = "affine"
SUM = "sum"
COMBINATIONS = (SUM, "max")
AFFINE_TERMS = tuple(f.name for f in fields(CompiledStepTime) if f.name not in ("batch_us", "combine"))
"""Parameters of an ``affine`` file; see `stepcal.simulator.CompiledStepTime`."""
WINDOW_TERMS = ("window_kv_us", "prefill_window_kv_us", "window_pair_us")
"""Those of layers with a window: a file that gives one gives all that such layers cost."""


@dataclass(frozen=True)
class FittedParameter:
    """A parameter of a step-time model: its name, value and unit (empty where the file gives none)."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class StepTimeModel:
    """A fitted step-time model without its training data.

    Attributes
    ----------
    variant : str
    values : dict
        Value of each parameter by name.
    origin : str
        The file or recording it was read from.
    combine : str
        Of an ``affine`` step time, whether host and GPU take turns (``sum``) or overlap (``max``).
    units : dict
        Unit of each parameter by name, where the file gives it.

    Examples
    --------
    >>> import stepcal
    >>> model = stepcal.StepTimeModel.load("default")
    >>> model.parameters["layer_us"].unit
    'us'
    >>> served = stepcal.Deployment.of("llama-2-7b", "h100-sxm")
    >>> one, many = (model.predict_us(served, decode_kv_lens=[1000] * n) for n in (1, 64))
    >>> 0 < one < many < 8 * one  # the weights are read once for all
    True
    """

    variant: str
    values: dict[str, float]
    origin: str
    combine: str = SUM
    units: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, name_or_path: str = DEFAULT) -> StepTimeModel:
        """Return a model by the name under which it ships, or from a file, as `load_coefficients` does."""
        return load_coefficients(name_or_path)

    @property
    def parameters(self) -> dict[str, FittedParameter]:
        """The parameters by name, each with its value and unit."""
        return {name: FittedParameter(name, value, self.units.get(name, "")) for name, value in self.values.items()}

    def predict_us(
        self,
        deployment: Deployment,
        *,
        decode_kv_lens: Sequence[int] = (),
        prefill_chunk_tokens: Sequence[int] = (),
        prefill_kv_lens: Sequence[int] | None = None,
        waiting: int = 0,
    ) -> float:
        """Return how long one step takes.

        Parameters
        ----------
        deployment : Deployment
            Without a server its limits are the usual ones, or as wide as the step needs.
        decode_kv_lens : sequence of int
            Context of each decoding request in tokens, this step's included.
        prefill_chunk_tokens : sequence of int
            Prompt tokens that the step computes for each prefilling request.
        prefill_kv_lens : sequence of int, optional
            Context of each prefilling request up to their end; by default the chunk is all of it.
        waiting : int
            Requests left in the queue.

        Returns
        -------
        float
            Microseconds.

        Raises
        ------
        InputError
            If the model says nothing of the deployment, a count is not a positive whole number, or the step is beyond a
            limit of the deployment's server.
        """
        batch = batch_of(decode_kv_lens, prefill_chunk_tokens, prefill_kv_lens, waiting)
        if deployment.server is None:
            deployment = replace(deployment, server=wide_server(batch))
        batch = replace(batch, windows=deployment.sliding)
        check_within_limits(batch, deployment.limits)
        return add_components(self.compile(deployment)(batch))

    def compile(self, deployment: Deployment) -> CompiledStepTime:
        """Compile the step time of one deployment, for the simulator; layers with a window read no more than that.

        Raises
        ------
        InputError
            If a parameter is missing, the model was not fitted to the architecture's family, or the deployment names no
            server.
        """
        if self.variant == AFFINE:
            compiled = self._affine()
            says = any(name in self.values for name in WINDOW_TERMS)
            return compiled if says else within_windows(compiled, deployment)
        if self.variant in LEARNED_MODELS:
            model = LEARNED_MODELS[self.variant]
            return model.compile({p.name: self._value(p.name) for p in model.parameters}, deployment)
        if self.variant in _BASELINES:
            return compile_baseline(_BASELINES[self.variant](self, deployment.accelerator), deployment)
        corrections = self._correction_model(deployment.accelerator)
        theta = np.array([self._value(p.name) for p in corrections.parameters])
        return compile_corrections(corrections, theta, deployment)

    def notes(self, deployment: Deployment) -> list[str]:
        """Return what a reader should know of the step time of a deployment.

        Kernels that were not measured on its GPU, what no measured server stands behind, a model that learned something
        else than the time of a step, and a server that cannot be.
        """
        notes = [] if deployment.memory_note is None else [deployment.memory_note]
        if self.variant == KERNELS.variant:
            return notes + kernel_notes(deployment)
        if self.variant in SHIPPED_VARIANTS and Path(self.origin).parent == data_folder() / "coefficients":
            notes.append(
                f"`{self.variant}` was fitted to the study's label, which is CPU time of the scheduler: latencies that are "
                "simulated with it are no predictions of a server's."
            )
        return notes + ([] if self.variant == AFFINE else unvalidated_notes(deployment))

    def of_experiment(self, experiment_id: str) -> StepTimeModel:
        """Return the coefficients of one experiment: of a baseline that was fitted to several, its own; else the same.

        Raises
        ------
        InputError
            If the baseline was fitted to several experiments, and not to this one.
        """
        known = self._experiments()
        if len(known) < 2:
            return self
        if experiment_id not in known:
            raise InputError(
                f"{self.origin} holds `{self.variant}` of {', '.join(known)}; it says nothing of `{experiment_id}`. "
                f"`stepcal fit {self.variant} --experiment {experiment_id} --json FILE` fits it."
            )
        own = {key: value for key, value in self.values.items() if key.startswith(f"{experiment_id}.")}
        return replace(self, values=own)

    def _experiments(self) -> tuple[str, ...]:
        """Experiments of a baseline whose parameters bear them in front."""
        names = _BASELINE_PARAMETERS.get(self.variant, ())
        fronts = (key.removesuffix(f".{name}") for name in names for key in self.values if key.endswith(f".{name}"))
        return tuple(dict.fromkeys(fronts))

    def api_overheads_us(self) -> dict[str, float]:
        """Return the time between client and engine, as `stepcal.simulator.simulate` takes it; empty if none was learned."""
        known = [p.name for p in API_PARAMETERS if p.name in self.values]
        return {name: self.values[name] for name in known}

    def _correction_model(self, accelerator: Accelerator) -> CorrectionModel:
        if self.variant == "global9":
            return Global9()
        if self.variant == "phase16":
            return Phase16.for_accelerator(accelerator)
        families = dict.fromkeys(name.rpartition(".")[0] for name in self.values)
        return Model36(tuple(families))

    def _affine(self) -> CompiledStepTime:
        unknown = sorted(set(self.values) - set(AFFINE_TERMS))
        if unknown:
            raise InputError(f"{self.origin}: unknown term `{unknown[0]}`. Terms: {', '.join(AFFINE_TERMS)}.")
        return CompiledStepTime(**dict[str, Any](self.values), combine=self.combine)

    def check(self) -> StepTimeModel:
        """Return these coefficients if every parameter of the variant is there, once.

        Raises
        ------
        InputError
            If one is missing, (of an affine step time) unknown or (a utilisation) not positive; it is named.
        """
        if self.combine not in COMBINATIONS or (self.combine != SUM and self.variant != AFFINE):
            raise InputError(
                f"{self.origin}: `combine` is {self.combine!r} for the variant `{self.variant}`. An `{AFFINE}` step time "
                f"has {' or '.join(COMBINATIONS)}, others have none."
            )
        several = self._experiments()
        if len(several) > 1:
            for name in several:
                self.of_experiment(name).check()
            return self
        if self.variant == AFFINE:
            self._affine()
            return self
        if self.variant in LEARNED_MODELS:
            names = tuple(p.name for p in LEARNED_MODELS[self.variant].parameters)
        elif self.variant not in SHIPPED_VARIANTS:
            names = _BASELINE_PARAMETERS[self.variant]
        elif self.variant == "phase16":
            names = tuple(p.name for p in Phase16(ridge=0.0).parameters)
        else:
            families = tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.values)) or ("FAMILY",)
            names = tuple(p.name for p in (Global9() if self.variant == "global9" else Model36(families)).parameters)
        for name in names:
            if self._value(name) <= 0.0 and name.endswith("_mfu"):
                raise InputError(f"{self.origin}: `{name}` is {self._value(name)}; factors are divided by it.")
        return self

    def _value(self, name: str) -> float:
        """Value of a parameter; a baseline's parameter may bear its experiment in front, if there is one only."""
        found = [v for key, v in self.values.items() if key == name or key.endswith(f".{name}")]
        exact = self.values.get(name)
        if exact is not None:
            return exact
        if len(found) != 1:
            if not found:
                raise InputError(
                    f"{self.origin} lacks `{name}`. `stepcal fit {self.variant} --json FILE` writes all parameters."
                )
            raise InputError(
                f"{self.origin} has {len(found)} experiments with `{name}`. Fit `{self.variant}` to one experiment, or say "
                "which one is meant (`--experiment ID`)."
            )
        return found[0]


def load_coefficients(name_or_path: str) -> StepTimeModel:
    """Read coefficients by the name under which they ship, or from a file.

    Parameters
    ----------
    name_or_path : str
        ``default``, ``default-2026-11-24``, ``global9``, ``phase16`` or ``model36``, or the path of a JSON file with
        `variant` and `parameters`.

    Returns
    -------
    StepTimeModel

    Raises
    ------
    InputError
        If the name is unknown, the file is not a coefficient file, or the default was changed since it was frozen.
    """
    if name_or_path in FROZEN:
        return _frozen(name_or_path)
    if name_or_path in SHIPPED_VARIANTS:
        return _read(data_folder() / "coefficients" / f"{name_or_path}.json")
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"`{name_or_path}` is neither a file nor a set of coefficients. Known: "
            f"{', '.join((*FROZEN, *SHIPPED_VARIANTS))}. `stepcal fit VARIANT --json FILE` writes a file."
        )
    return _read(path)


def frozen_default_sha256(name: str = DEFAULT) -> str:
    """Return the SHA-256 under which ``data/coefficients/<name>.json`` was frozen; `name` is one of `FROZEN`."""
    path = data_folder() / "coefficients" / "frozen.json"
    return str(json.loads(path.read_text(encoding="utf-8"))[f"{name}.json"]["sha256"])


def _frozen(name: str) -> StepTimeModel:
    path = data_folder() / "coefficients" / f"{name}.json"
    _refuse_changed(path, f"{name}.json")
    coefficients = _read(path)
    if coefficients.variant == KERNELS.variant:
        for table in (KERNELS_FILE, ALL_REDUCE_FILE):
            _refuse_changed(data_folder() / "hardware" / table, f"../hardware/{table}")
    return coefficients


def _refuse_changed(path: Path, name: str) -> None:
    frozen = json.loads((data_folder() / "coefficients" / "frozen.json").read_text(encoding="utf-8"))[name]["sha256"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != frozen:
        raise InputError(
            f"{path} was changed after it was frozen: SHA-256 is {digest}, frozen was {frozen}. Restore it, or give "
            "changed coefficients as a file of another name."
        )


def _read(path: Path) -> StepTimeModel:
    form = "It is JSON with `variant` and `parameters`, a list of objects with `name` and `value`."
    try:
        content = read_json_object(path, what="coefficient file")
    except InputError as error:
        raise InputError(f"{path} is not a coefficient file ({error}). {form}") from None
    try:
        variant, combine = str(content["variant"]), str(content.get("combine", SUM))
        units = {str(p["name"]): str(p["unit"]) for p in content["parameters"] if "unit" in p}
        pairs = [(str(p["name"])[:_LONGEST_NAME], _number(p["name"], p["value"], path)) for p in content["parameters"]]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is not a coefficient file ({type(error).__name__}: {shown(str(error))}). {form}"
        ) from None
    values = dict(pairs)
    seen: set[str] = set()
    twice = next((name for name, _ in pairs if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise InputError(f"{path} has the parameter `{twice}` twice. Keep one of them.")
    known = (*LEARNED_MODELS, AFFINE, *_BASELINES, *SHIPPED_VARIANTS)
    if variant not in known:
        raise InputError(
            f"{path} holds the variant `{variant[:80]}`, which cannot be read from a file. Known: {', '.join(known)}."
        )
    bad = next((name for name, value in values.items() if not np.isfinite(value)), None)
    if bad is not None:
        raise InputError(f"{path}: `{bad}` is {values[bad]}; coefficients are finite numbers.")
    found = StepTimeModel(variant, values, str(path), combine, units).check()
    if variant == AFFINE and not values:
        raise InputError(f"{path} has no parameters: every step would take no time. Terms: {', '.join(AFFINE_TERMS)}.")
    return found


_LONGEST_NAME = 200


def _number(name: Any, value: Any, path: Path) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise InputError(f"{path}: `{str(name)[:80]}` is {shown(value)}; coefficients are finite numbers.")
    return float(value)


_BASELINE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "blackbox": ("intercept", *BLACKBOX_FEATURES),
    "constant": ("median_us",),
    "raw": (),
}


def _blackbox(coefficients: StepTimeModel, accelerator: Accelerator) -> StepBaseline:
    del accelerator
    baseline = Blackbox()
    baseline.coefficients = np.array([coefficients._value(name) for name in _BASELINE_PARAMETERS["blackbox"]])
    return baseline


def _constant(coefficients: StepTimeModel, accelerator: Accelerator) -> StepBaseline:
    del accelerator
    baseline = ConstantStep()
    baseline.median_us = coefficients._value("median_us")
    return baseline


def _raw(coefficients: StepTimeModel, accelerator: Accelerator) -> StepBaseline:
    del coefficients
    return RawAnalytical(accelerator)


_BASELINES: dict[str, Callable[[StepTimeModel, Accelerator], StepBaseline]] = {
    "blackbox": _blackbox,
    "constant": _constant,
    "raw": _raw,
}


def frozen_values() -> dict[str, float]:
    """Return the parameters of the frozen physical model, by name."""
    values = load_coefficients(PHYSICAL_DEFAULT).values
    return {p.name: values[p.name] for p in PARAMETERS}
