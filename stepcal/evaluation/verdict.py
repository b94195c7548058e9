"""The verdict engine: a pre-registration and a table of evidence in, a verdict with its reasons out.

Logic has three values. A criterion is met, not met, or not evaluable; where units are missing, the engine asks whether any
value of theirs could change the outcome. The verdict follows: all success criteria met is *Supported*, a refuted-if rule
that holds is *Refuted*, neither is *Not supported*, and *Inconclusive* is what stays open. Rules about runs that are still
to come read *Not evaluated* as long as there are none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stepcal.errors import InputError
from stepcal.evaluation.preregistration import Criterion, PreRegistration, load_preregistration
from stepcal.units import BoolArray, FloatArray

SUPPORTED = "Supported"
NOT_SUPPORTED = "Not supported"
REFUTED = "Refuted"
INCONCLUSIVE = "Inconclusive"
NOT_EVALUATED = "Not evaluated"

EVIDENCE_COLUMNS = ("quantity", "variant", "unit", "value")
"""Evidence has a row for each value; NaN, or no row, is not evaluable."""

_COMPARE: dict[str, Callable[[FloatArray, float], BoolArray]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


_UNITS = {"_percent": "%", "_points": " points"}
"""Units by the ending of a quantity's name."""


@dataclass(frozen=True)
class CriterionResult:
    """What one criterion came to.

    Attributes
    ----------
    criterion : Criterion
    role : str
        ``success``, ``refuted_if`` or ``choice``.
    value : float or None
        The count or mean over the units that could be evaluated; None where there are none.
    met : bool or None
        None is not evaluable.
    evidence : str
        One line that a reader can check.
    """

    criterion: Criterion
    role: str
    value: float | None
    met: bool | None
    evidence: str


@dataclass(frozen=True)
class Verdict:
    """A verdict and everything it rests on.

    Attributes
    ----------
    preregistration : PreRegistration
    verdict : str
    possible : tuple of str
        Verdicts that values for the missing units could still lead to; one, unless inconclusive.
    criteria : tuple of CriterionResult
    notes : tuple of str
        What the evidence says of its units, a unit each.
    """

    preregistration: PreRegistration
    verdict: str
    possible: tuple[str, ...]
    criteria: tuple[CriterionResult, ...]
    notes: tuple[str, ...] = ()

    def report(self) -> str:
        """Return the verdict as text: a line a criterion."""
        p = self.preregistration
        width = max(len(r.criterion.statement) for r in self.criteria) + 12
        lines = [f"{p.id.upper()}  {self.verdict}    pre-registration {p.sha256[:8]} (frozen {p.frozen}, {p.standing})"]
        words = {
            "success": {True: "met", False: "not met", None: "not evaluable"},
            "refuted_if": {True: "holds", False: "does not hold", None: "not evaluable"},
            "choice": {True: "yes", False: "no", None: "not evaluable"},
        }
        for r in self.criteria:
            label = f"Refuted if {r.criterion.statement}" if r.role == "refuted_if" else r.criterion.statement
            lines.append(f"  {label:<{width}}  {words[r.role][r.met]:<14} {r.evidence}")
        if self.verdict == INCONCLUSIVE:
            lines.append(f"  The missing values could still make it: {', '.join(self.possible)}.")
        lines += [f"  {note}." for note in self.notes]
        return "\n".join(lines)


def judge(preregistration: PreRegistration | str, evidence: pd.DataFrame) -> Verdict:
    """Compute a verdict from evidence, by the pre-registered rules alone.

    Parameters
    ----------
    preregistration : PreRegistration or str
        The rules, or the name of a hypothesis that ships with them.
    evidence : DataFrame
        Columns `quantity`, `variant`, `unit`, `value`; an optional `reason` says why a value is NaN, and an optional
        `note` what a reader should know of a unit.

    Returns
    -------
    Verdict

    Raises
    ------
    InputError
        If a column is missing, a unit occurs twice, or there are more units than the rule speaks of.

    Examples
    --------
    >>> import pandas as pd, stepcal
    >>> evidence = pd.DataFrame({"unit": [f"run {i}" for i in range(16)], "value": [8.0] * 3 + [40.0] * 13})
    >>> evidence = evidence.assign(quantity="e2e_error_percent", variant="model36")
    >>> stepcal.judge("h2", evidence).verdict  # its E2E error exceeds 10% in more than 4 runs
    'Refuted'
    """
    if isinstance(preregistration, str):
        preregistration = load_preregistration(preregistration)
    missing = [c for c in EVIDENCE_COLUMNS if c not in evidence]
    if missing:
        raise InputError(f"`evidence` lacks the column `{missing[0]}`. It needs {', '.join(EVIDENCE_COLUMNS)}.")
    roles = [("success", preregistration.success), ("refuted_if", preregistration.refuted_if)]
    roles.append(("choice", preregistration.choices))
    results = tuple(_evaluate(c, role, evidence) for role, criteria in roles for c in criteria)
    supported = _all([r.met for r in results if r.role == "success"])
    refuted = _any([r.met for r in results if r.role == "refuted_if"])
    possible = _possible(supported, refuted)
    verdict = possible[0] if len(possible) == 1 else INCONCLUSIVE
    if all(r.criterion.of is None and r.value is None for r in results):
        verdict = NOT_EVALUATED
    return Verdict(preregistration, verdict, possible, results, _notes(evidence))


def _notes(evidence: pd.DataFrame) -> tuple[str, ...]:
    if "note" not in evidence:
        return ()
    noted = evidence[evidence["note"].fillna("") != ""].drop_duplicates(["unit", "note"])
    return tuple(f"{unit}: {note}" for unit, note in zip(noted["unit"], noted["note"], strict=True))


def _evaluate(criterion: Criterion, role: str, evidence: pd.DataFrame) -> CriterionResult:
    rows = evidence[(evidence["quantity"] == criterion.quantity) & (evidence["variant"] == criterion.variant)]
    twice = rows["unit"][rows["unit"].duplicated()]
    if len(twice):
        raise InputError(
            f"`evidence` has {criterion.quantity} of {criterion.variant} twice for `{twice.iloc[0]}`; give each unit once."
        )
    if criterion.of is not None and len(rows) > criterion.of:
        raise InputError(
            f"`evidence` has {len(rows)} units for `{criterion.name}`, which speaks of {criterion.of} {criterion.unit}s."
        )
    known = rows["value"].dropna().to_numpy(dtype=float)
    unknown = (len(rows) if criterion.of is None else criterion.of) - len(known)
    sample = _sample(criterion, rows, len(known), unknown)
    if not len(known):
        return CriterionResult(criterion, role, None, None, sample)
    passes = _COMPARE[criterion.operator](known, criterion.threshold)
    if criterion.aggregate == "count":
        n = int(passes.sum())
        return CriterionResult(criterion, role, float(n), _count_outcome(criterion, n, unknown), f"{n} of {sample}")
    if criterion.aggregate == "share":
        n = int(passes.sum())
        outcome = _share_outcome(criterion, n, len(known), unknown)
        return CriterionResult(criterion, role, n / len(known), outcome, f"{n} of {sample}")
    unit = next((u for ending, u in _UNITS.items() if criterion.quantity.endswith(ending)), "")
    if criterion.aggregate == "max":
        worst = rows.sort_values("value", na_position="first").iloc[-1]
        # One unit that fails decides, whatever the missing ones are.
        decided = bool(passes.all()) if unknown == 0 or not passes.all() else None
        text = f"largest {worst['value']:+.1f}{unit} ({worst['unit']}) over {sample}"
        return CriterionResult(criterion, role, float(known.max()), decided, text)
    mean = float(known.mean())
    size = np.abs(known) if criterion.aggregate == "absolute_mean" else known
    aggregate = abs(mean) if criterion.aggregate == "absolute_mean" else mean
    met = bool(_COMPARE[criterion.operator](np.array([aggregate]), criterion.threshold)[0]) if unknown == 0 else None
    alone = int(_COMPARE[criterion.operator](size, criterion.threshold).sum())
    bound = f"{criterion.operator} {criterion.threshold:g}{unit}"
    text = f"{mean:+.1f}{unit} over {sample}; {alone} of {len(known)} are {bound} alone"
    return CriterionResult(criterion, role, mean, met, text)


def _count_outcome(criterion: Criterion, n: int, unknown: int) -> bool | None:
    """Whether the bound on the count holds for every, no, or only some values of the missing units."""
    if criterion.at_least is not None:
        if n >= criterion.at_least:
            return True
        return None if n + unknown >= criterion.at_least else False
    if criterion.at_most is None:
        raise InputError(f"The count `{criterion.name}` has neither `at_least` nor `at_most`. Give it one of them.")
    if n > criterion.at_most:
        return False
    return None if n + unknown > criterion.at_most else True


def _share_outcome(criterion: Criterion, n: int, known: int, unknown: int) -> bool | None:
    """Whether the bound on the share holds for every, no, or only some values of the missing units."""

    def holds(passing: int) -> bool:
        share = passing / (known + unknown)
        if criterion.at_least_share is not None:
            return share >= criterion.at_least_share
        if criterion.above_share is None:
            raise InputError(
                f"The share `{criterion.name}` has neither `at_least_share` nor `above_share`. Give it one of them."
            )
        return share > criterion.above_share

    return None if holds(n) != holds(n + unknown) else holds(n)


def _sample(criterion: Criterion, rows: pd.DataFrame, known: int, unknown: int) -> str:
    text = f"{known} evaluable {criterion.unit}{'' if known == 1 else 's'}"
    if not unknown:
        return text
    reasons: list[str] = []
    if "reason" in rows:
        reasons = sorted({str(r) for r in rows.loc[rows["value"].isna(), "reason"].dropna() if str(r)})
    return f"{text} ({unknown} not evaluable{': ' + '; '.join(reasons) if reasons else ''})"


def _all(outcomes: list[bool | None]) -> bool | None:
    if any(o is False for o in outcomes):
        return False
    return None if any(o is None for o in outcomes) else True


def _any(outcomes: list[bool | None]) -> bool | None:
    if any(o is True for o in outcomes):
        return True
    return None if any(o is None for o in outcomes) else False


def _possible(supported: bool | None, refuted: bool | None) -> tuple[str, ...]:
    if supported:
        return (SUPPORTED,)
    possible = [SUPPORTED] if supported is None else []
    if not refuted:
        possible.append(NOT_SUPPORTED)
    if refuted is not False:
        possible.append(REFUTED)
    return tuple(possible)
