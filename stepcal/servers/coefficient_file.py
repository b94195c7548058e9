"""A calibration as a coefficient file, and the validity and error that any coefficients come with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stepcal.exchange.convert import read_any
from stepcal.exchange.stepml import StepmlFile
from stepcal.servers.calibration import ServerCalibration
from stepcal.servers.capacity import NORMAL_95
from stepcal.servers.judgement import Judgement
from stepcal.servers.log import ServedLog
from stepcal.servers.validity import Validity
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients

OTHER_GPUS = "others"
ASSUMED_LOG_SD = 0.10
"""Error of E2E that is taken where coefficients come with none: the bound within which H2 and H3 ask most runs to be."""
SHIPPED_LOG_SD = {
    "default": {"h100-sxm": 0.037, "a100-80gb": 0.05, "l40s": 0.05, OTHER_GPUS: 0.10},
    "default-2026-11-24": {"h100-sxm": 0.08, OTHER_GPUS: 0.30},
}
"""Standard deviation of the logarithmic error of mean E2E on servers that no fit saw: root mean square over the 28 H100 runs
of data/transfer. Three runs are of A100 and L40S (root mean square 2.5%): taken twice. Others: H200 was 8 to 20% off in
public figures; the older default missed A100 and L40S by 20 to 33%."""
SHIPPED_VALIDITY = Validity(
    architectures=("llama-2-7b", "llama-2-70b", "llama-2-70b-hf", "codellama-34b", "mixtral-8x7b"),
    accelerators=("h100-sxm",),
    tensor_parallel=(1, 2, 4),
    bytes_per_weight=(2.0,),
    kv_precision=("bf16",),
    attention=("full",),
)
"""What the shipped coefficients were fitted on: the 16 runs of the study (data/experiments.csv)."""


@dataclass(frozen=True)
class KnownModel:
    """Coefficients with what is known of their validity and error.

    Attributes
    ----------
    coefficients : StepTimeModel
    validity : Validity
    log_sd : float
        Standard deviation of the logarithmic error of E2E, out of sample.
    error_source : str
    by_gpu : mapping
        Standard deviations on GPUs outside of the validity range, where known.
    """

    coefficients: StepTimeModel
    validity: Validity
    log_sd: float
    error_source: str
    by_gpu: Mapping[str, float] = field(default_factory=dict)

    def log_sd_on(self, accelerator: str) -> float:
        """Error that is to be expected on a GPU: the model's own, or what the shipped one's was on GPUs of that kind."""
        known = self.validity.accelerators
        if not known or accelerator in known:
            return self.log_sd
        shipped = self.by_gpu or SHIPPED_LOG_SD["default"]
        return max(self.log_sd, shipped.get(accelerator, shipped[OTHER_GPUS]))


def load_known(name_or_path: str) -> KnownModel:
    """Load coefficients by name or from a file, with their validity range and error."""
    coefficients = load_coefficients(name_or_path)
    file = read_any(name_or_path)
    validity = Validity.of_document(file.about.get("validity") or {})
    is_own = Path(name_or_path).is_file()
    if not is_own and validity == Validity():
        validity = SHIPPED_VALIDITY
    errors = file.about.get("errors") or {}
    if "log_sd" in errors:
        return KnownModel(coefficients, validity, float(errors["log_sd"]), str(errors.get("sample", "the file")))
    if name_or_path in SHIPPED_LOG_SD:
        by_gpu = SHIPPED_LOG_SD[name_or_path]
        return KnownModel(coefficients, validity, by_gpu["h100-sxm"], "28 unseen H100 runs (data/transfer)", by_gpu)
    return KnownModel(coefficients, validity, ASSUMED_LOG_SD, "assumed: the coefficients come with none")


def calibrated_file(
    judgement: Judgement, logs: Sequence[ServedLog], hashes: Mapping[str, str], prior: str
) -> StepmlFile:
    """Turn a calibration into a coefficient file.

    Parameters
    ----------
    judgement : Judgement
    logs : sequence of ServedLog
    hashes : mapping
        SHA-256 of each run's table.
    prior : str
        Name of the coefficients that were the prior.
    """
    fitted = judgement.calibration
    known = {p.name: p for p in fitted.parameters}
    parameters: list[dict[str, Any]] = []
    for name, value in fitted.coefficients.values.items():
        entry: dict[str, Any] = {"name": name, "value": value, "unit": known[name].unit if name in known else "1"}
        if name in known:
            low, high = fitted.interval(name)
            reason = _why_unknown(fitted, name)
            entry |= {"low": low, "high": high, "identified": reason is None, "reason": reason}
        else:
            entry |= {"identified": False, "reason": "it changes nothing on this server"}
        parameters.append(entry)
    sample = f"{judgement.n_out} test parts and left-out stages of {len(logs)} runs, root mean square of log E2E"
    about = {
        "description": f"Calibrated on {', '.join(log.run for log in logs)}, prior {prior}; {learned_words(fitted)}",
        "validity": judgement.validity.document(),
        "errors": {"log_sd": judgement.log_sd, "sample": sample},
        "provenance": {"runs_sha256": dict(hashes), "prior": prior, "stepcal": version("stepcal")},
    }
    return StepmlFile(fitted.coefficients.variant, tuple(parameters), about)


def _why_unknown(fitted: ServerCalibration, name: str) -> str | None:
    """Why the data do not determine a parameter's value; None where they do."""
    if name in fitted.in_doubt:
        return f"the value is outside of the interval, which is around {fitted.free(name):.4g}, all parameters free"
    return None if name in fitted.identified else "the prior holds it more than the data"


def learned_words(fitted: ServerCalibration) -> str:
    """Say what was learned, or that the prior was kept."""
    if not fitted.learned:
        return "nothing learned: the data agree with the prior within the error that it is known to have"
    return "learned " + ", ".join(f"{name} x {factor:.3g}" for name, factor in fitted.learned.items())


def parameter_lines(fitted: ServerCalibration, prior: Mapping[str, float]) -> list[str]:
    """Say of each parameter which value is used, and what all of them together say of it.

    Parameters
    ----------
    fitted : ServerCalibration
    prior : mapping
        The prior's values by name.
    """
    names = [p.name for p in fitted.parameters]
    width = max(len(name) for name in names) + 2
    lines = [
        f"  {'':<{width}}{'prior':>10}{'used':>10}      {'all free: median [95%]':<30}where the used value comes from"
    ]
    for p in fitted.parameters:
        low, high = fitted.interval(p.name)
        free = f"{fitted.free(p.name):.4g} [{low:.4g}, {high:.4g}]"
        unit = "" if p.unit == "1" else p.unit
        values = f"{prior[p.name]:>10.4g}{fitted.coefficients.values[p.name]:>10.4g}"
        lines.append(f"  {p.name:<{width}}{values} {unit:<5}{free:<30}{fitted.state(p.name)}")
    if fitted.in_doubt:
        lines.append(
            f"  in doubt: {len(fitted.in_doubt)} of {len(names)} used values are outside of what all parameters together "
            "allow. Another change than the one that was learned may be the true one, or a setting is not as said: see "
            "`stepcal check`, and measure more stages (`stepcal design`)."
        )
    return lines


def known_spreads(name_or_path: str) -> dict[str, float]:
    """Return the spread of the logarithm of each parameter that a calibrated file has an interval of; empty for others."""
    file = read_any(name_or_path)
    found: dict[str, float] = {}
    if "errors" not in file.about:
        return found
    for p in file.parameters:
        low, high = p.get("low"), p.get("high")
        if low and high and 0 < low < high:
            found[str(p["name"])] = float(np.log(high / low) / (2 * NORMAL_95))
    return found
