"""Pre-registrations: what was to count as success, written down and frozen before the figures were seen.

One YAML file per hypothesis lies in ``book/preregistrations/``; ``frozen.json`` beside them holds each file's SHA-256 and
the day it was frozen. A file that no longer matches is refused: an edited threshold is a new hypothesis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastjsonschema
import yaml

from stepcal.errors import InputError
from stepcal.locations import book_folder

OPERATORS = ("<", "<=", ">", ">=")
AGGREGATES = ("count", "share", "mean", "absolute_mean", "max")
_ROLES = ("success", "refuted_if", "choices")
STATUSES = ("confirmatory", "post hoc")

_CRITERION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "statement", "quantity", "variant", "aggregate", "operator", "threshold", "unit"],
    "properties": {
        "name": {"type": "string"},
        "statement": {"type": "string"},
        "quantity": {"type": "string"},
        "variant": {"type": "string"},
        "aggregate": {"enum": list(AGGREGATES)},
        "operator": {"enum": list(OPERATORS)},
        "threshold": {"type": "number"},
        "at_least": {"type": "integer", "minimum": 1},
        "at_most": {"type": "integer", "minimum": 0},
        "at_least_share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "above_share": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "of": {"type": "integer", "minimum": 1},
        "unit": {"type": "string"},
    },
    "allOf": [
        {
            "if": {"properties": {"aggregate": {"const": "count"}}},
            "then": {"required": ["of"], "oneOf": [{"required": ["at_least"]}, {"required": ["at_most"]}]},
        },
        {
            "if": {"properties": {"aggregate": {"const": "share"}}},
            "then": {"oneOf": [{"required": ["at_least_share"]}, {"required": ["above_share"]}]},
        },
    ],
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "id",
        "title",
        "statement",
        "family",
        "type",
        "date",
        "frozen",
        "status",
        "status_note",
        "source",
        "data",
        "split",
        "readings",
        "success",
        "refuted_if",
        "choices",
    ],
    "properties": {
        **{
            key: {"type": "string", "minLength": 1}
            for key in ("id", "title", "statement", "family", "source", "data", "split")
        },
        "type": {
            "type": "object",
            "required": ["number", "name", "relation"],
            "properties": {"number": {"type": "integer"}, "name": {"type": "string"}, "relation": {"type": "string"}},
        },
        "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"},
        "frozen": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"},
        "status": {"enum": list(STATUSES)},
        "status_note": {"type": "string"},
        "readings": {"type": "array", "items": {"type": "string"}},
        "success": {"type": "array", "minItems": 1, "items": _CRITERION_SCHEMA},
        "refuted_if": {"type": "array", "items": _CRITERION_SCHEMA},
        "choices": {"type": "array", "items": _CRITERION_SCHEMA},
    },
}
"""JSON schema of a pre-registration file."""


@dataclass(frozen=True)
class Criterion:
    """One rule: an aggregate of a quantity over units, against a threshold.

    Attributes
    ----------
    name, statement : str
    quantity, variant : str
        Which rows of the evidence it looks at.
    aggregate : str
        ``count`` and ``share`` count the units that pass `operator` `threshold`; ``mean``, ``absolute_mean`` and ``max``
        compare the mean, its absolute value, or the largest.
    operator : str
    threshold : float
    of : int or None
        Units that the rule speaks of. Units without a value are not evaluable. None is as many as the evidence has rows:
        a rule about runs that are still to come.
    unit : str
    at_least, at_most : int or None
        Bound of a count; exactly one of them.
    at_least_share, above_share : float or None
        Bound of a share, met from it on or only above it; exactly one of them.
    """

    name: str
    statement: str
    quantity: str
    variant: str
    aggregate: str
    operator: str
    threshold: float
    of: int | None
    unit: str
    at_least: int | None = None
    at_most: int | None = None
    at_least_share: float | None = None
    above_share: float | None = None


@dataclass(frozen=True)
class PreRegistration:
    """A frozen hypothesis: statement, rules, and where it stands between confirmatory and post hoc."""

    id: str
    title: str
    statement: str
    family: str
    type: Mapping[str, Any]
    date: str
    frozen: str
    status: str
    status_note: str
    source: str
    data: str
    split: str
    readings: tuple[str, ...]
    success: tuple[Criterion, ...]
    refuted_if: tuple[Criterion, ...]
    choices: tuple[Criterion, ...]
    sha256: str

    @property
    def standing(self) -> str:
        """What the hypothesis can show: its status, and who set what, when.

        One that is older than the day its file was frozen had its thresholds set by others; our readings came later.
        """
        if self.status == "confirmatory" and self.date < self.frozen:
            return "the study's thresholds, our readings, after exploration"
        return self.status


def preregistration_ids(folder: Path | None = None) -> list[str]:
    """List the hypotheses that have a pre-registration."""
    return sorted(path.stem for path in (folder or _folder()).glob("*.yaml"))


def load_preregistration(hypothesis: str, folder: Path | None = None) -> PreRegistration:
    """Read a hypothesis and check that it is still what was frozen.

    Parameters
    ----------
    hypothesis : str
        Name of the file without its suffix, in either case: ``h2`` or ``H2``.
    folder : Path, optional
        Defaults to ``book/preregistrations``.

    Returns
    -------
    PreRegistration

    Raises
    ------
    InputError
        If there is no such hypothesis, the file breaks the schema, was never frozen, or was changed since.
    """
    folder = folder or _folder()
    path = folder / f"{hypothesis.lower()}.yaml"
    if not path.is_file():
        raise InputError(
            f"Unknown hypothesis `{hypothesis}`. Pre-registered: {', '.join(preregistration_ids(folder))}."
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    frozen = frozen_digests(folder).get(path.name)
    if frozen is None:
        raise InputError(
            f"{path} was never frozen: `frozen.json` has no entry for it. Freeze it before looking at data."
        )
    if frozen != digest:
        raise InputError(
            f"{path} was changed after it was frozen: SHA-256 is {digest}, frozen was {frozen}. Restore it, or register the "
            "new rules under a new name."
        )
    try:
        parsed = yaml.safe_load(content)
        fastjsonschema.validate(SCHEMA, parsed)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    except fastjsonschema.JsonSchemaValueException as error:
        place = str(error.name)
        what = error.message.removeprefix(place).strip()
        raise InputError(f"{path} breaks the schema at `{place.replace('data', '$', 1)}`: it {what}.") from None
    rules: dict[str, Any] = {
        key: tuple(Criterion(**{"of": None, **c}) for c in parsed.pop(key))
        for key in ("success", "refuted_if", "choices")
    }
    readings = tuple(parsed.pop("readings"))
    return PreRegistration(**parsed, readings=readings, **rules, sha256=digest)


def frozen_digests(folder: Path | None = None) -> dict[str, str]:
    """Return the frozen SHA-256 of each pre-registration file, by file name."""
    path = (folder or _folder()) / "frozen.json"
    if not path.is_file():
        return {}
    return {name: entry["sha256"] for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}


def _folder() -> Path:
    return book_folder() / "preregistrations"
