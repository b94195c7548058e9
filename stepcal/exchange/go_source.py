"""Coefficients as a self-contained Go file: standard library only, `DecomposeStepTime` and the multiplicative model."""

from __future__ import annotations

from stepcal.errors import InputError
from stepcal.exchange.stepml import StepmlFile
from stepcal.locations import data_folder
from stepcal.step_time.corrections import SMALLEST_STEP_US
from stepcal.step_time.decomposition import STUDY_COMPONENTS

GO_VARIANTS = ("global9", "model36")
"""Variants that are a multiplicative correction of the four components."""
_GO_NAMES = {"gemm": "GEMM", "attn": "Attn", "prefill": "Prefill", "decode": "Decode"}


def go_source(file: StepmlFile) -> str:
    """Return the Go file of a multiplicative model.

    Parameters
    ----------
    file : StepmlFile
        Of the variant ``global9``, or ``model36`` (coefficients by family).

    Returns
    -------
    str

    Raises
    ------
    InputError
        If the variant is another, or a parameter is missing.
    """
    if file.variant not in GO_VARIANTS:
        raise InputError(
            f"`--to go` writes multiplicative models of the four components ({', '.join(GO_VARIANTS)}); `{file.variant}` is "
            "none. Export it as json."
        )
    values = {str(p["name"]): float(p["value"]) for p in file.parameters}
    families = sorted({name.rpartition(".")[0] for name in values})
    fitted = "".join(_entry(family, values) for family in families)
    template = (data_folder() / "exchange" / "stepml.go.txt").read_text(encoding="utf-8")
    origin = str(file.about.get("data_sha256") or file.about.get("description") or "unknown")
    for name, text in (
        ("VARIANT", file.variant),
        ("ORIGIN", " ".join(origin.split())),
        ("FLOOR", repr(SMALLEST_STEP_US)),
        ("FITTED", fitted),
    ):
        template = template.replace("{{" + name + "}}", text)
    return template


def _entry(family: str, values: dict[str, float]) -> str:
    front = f"{family}." if family else ""
    cells = [(f"{_go_name(c)}Factor", f"{front}{c}_factor") for c in STUDY_COMPONENTS]
    cells += [("OverheadUs", f"{front}overhead_us")]
    cells += [(f"{_go_name(c)}MFU", f"{front}{c}_mfu") for c in STUDY_COMPONENTS]
    missing = next((name for _, name in cells if name not in values), None)
    if missing is not None:
        raise InputError(f"The coefficients lack `{missing}`, which the Go file needs. Fit the variant again.")
    text = ", ".join(f"{go}: {values[name]!r}" for go, name in cells)
    return f'\t"{family}": {{{text}}},\n'


def _go_name(component: str) -> str:
    phase, part = component.split("_")
    return _GO_NAMES[phase] + _GO_NAMES[part]
