"""From any coefficients, by name or file, to the text of another format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.exchange.blis import BlisBlock, affine_of, blis_text, fitted_block, read_blis
from stepcal.exchange.go_source import go_source
from stepcal.exchange.stepml import StepmlFile, csv_text, json_text, read_stepml
from stepcal.experiments.options import deployment_from
from stepcal.locations import data_folder
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import FROZEN, SHIPPED_VARIANTS, load_coefficients

BLACKBOX = "blackbox"


@dataclass(frozen=True)
class Converted:
    """The text of a file, and what to know of it."""

    text: str
    variant: str
    notes: tuple[str, ...] = ()
    overheads_us: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def converted(source: str, to: str, options: Mapping[str, Any]) -> Converted:
    """Convert coefficients.

    Parameters
    ----------
    source : str
        A name that ships, or a file: JSON or CSV of ours, YAML of BLIS.
    to : {"json", "csv", "blis", "go"}
    options : mapping
        The deployment, as `stepcal.experiments.options.deployment_from` takes it; used where BLIS is read or written.

    Returns
    -------
    Converted

    Raises
    ------
    InputError
        If the source cannot be read, or the format cannot hold it.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        return _from_blis(read_blis(Path(source)), to, options)
    file = read_any(source)
    if to == "blis":
        return _to_blis(source, file, options)
    text = {"json": json_text, "csv": csv_text, "go": go_source}[to](file)
    return Converted(text, file.variant)


def read_any(source: str) -> StepmlFile:
    """Read coefficients by a name that ships, or from a file of ours."""
    if source in (*FROZEN, *SHIPPED_VARIANTS):
        load_coefficients(source)  # refuses a default that was changed
        return read_stepml(data_folder() / "coefficients" / f"{source}.json")
    if not Path(source).is_file():
        load_coefficients(source)  # says what is known
    return read_stepml(Path(source))


def _deployment(options: Mapping[str, Any]) -> Deployment:
    if options.get("architecture") is None or options.get("accelerator") is None:
        raise InputError(
            "BLIS coefficients belong to one deployment: give `--architecture`, `--accelerator` and `--tp`."
        )
    return deployment_from(options).deployment


def _from_blis(block: BlisBlock, to: str, options: Mapping[str, Any]) -> Converted:
    if to == "blis":
        return Converted(blis_text(block), "blis")
    file, overheads, notes = affine_of(block, _deployment(options))
    if to == "go":
        raise InputError("`--to go` writes multiplicative models; a BLIS block is none. Export it as json.")
    return Converted(json_text(file) if to == "json" else csv_text(file), file.variant, tuple(notes), overheads)


def _to_blis(source: str, file: StepmlFile, options: Mapping[str, Any]) -> Converted:
    values = {str(p["name"]): float(p["value"]) for p in file.parameters}
    if file.variant == BLACKBOX and {"intercept", "prefill_tokens", "decode_tokens"} <= set(values):
        block = BlisBlock((0.0, 0.0, 0.0), (values["intercept"], values["prefill_tokens"], values["decode_tokens"]))
        return Converted(blis_text(block), file.variant, ("The format is unverified.",))
    block, errors = fitted_block(load_coefficients(source), _deployment(options))
    note = (
        f"Ten betas fitted to {file.variant} on this deployment over a grid of batches: "
        f"{errors['mean_abs_percent']:.1f}% off on average, {errors['worst_percent']:.1f}% at worst. "
        "The format is unverified."
    )
    return Converted(blis_text(block), file.variant, (note,), errors=errors)
