import functools
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reference.hypotheses import possible_verdicts

from stepcal.errors import InputError
from stepcal.evaluation.preregistration import Criterion, PreRegistration, load_preregistration
from stepcal.evaluation.verdict import judge

OPERATORS = ("<", "<=", ">", ">=")
VALUES = (-3.0, 0.0, 1.0, 2.0, 3.0, 4.0, None)


def criterion(quantity="error", aggregate="count", operator="<", threshold=2.0, *, of=3, **bounds):
    return Criterion(
        f"c_{quantity}", f"{quantity} rule", quantity, "v", aggregate, operator, threshold, of, "unit", **bounds
    )


def preregistration(success, refuted_if=(), choices=()):
    text = dict.fromkeys(("title", "statement", "family", "status_note", "source", "data", "split"), "text")
    return PreRegistration(
        id="hx", type={"number": 2}, date="2026-01-01", frozen="2026-01-02", status="confirmatory", readings=(),
        success=tuple(success), refuted_if=tuple(refuted_if), choices=tuple(choices), sha256="0123456789abcdef", **text,
    )  # fmt: skip


def evidence(**values):
    """Rows of variant v: ``error=[1.0, None]`` is two units."""
    rows = [(q, "v", f"unit-{i}", v) for q, column in values.items() for i, v in enumerate(column)]
    return pd.DataFrame(rows, columns=["quantity", "variant", "unit", "value"]).astype({"value": float})


def met_of(one, **values):
    return judge(preregistration([one]), evidence(**values)).criteria[0].met


@st.composite
def criteria(draw, quantity, of):
    aggregate = draw(st.sampled_from(["count", "count", "mean", "absolute_mean"]))
    bounds = {}
    if aggregate == "count":
        bounds = draw(
            st.one_of(
                st.builds(lambda n: {"at_least": n}, st.integers(1, of)),
                st.builds(lambda n: {"at_most": n}, st.integers(0, of - 1)),
            )
        )
    threshold = draw(st.sampled_from([1.0, 2.0, 3.0]))
    return criterion(quantity, aggregate, draw(st.sampled_from(OPERATORS)), threshold, of=of, **bounds)


@st.composite
def cases(draw, *, shared):
    """Criteria, each on a quantity of its own or all on few, and evidence with at most four missing units."""
    of, n_success, n_refuted = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    quantities = [f"q{draw(st.integers(0, 1)) if shared else i}" for i in range(n_success + n_refuted)]
    drawn = [draw(criteria(q, of)) for q in quantities]
    columns = {q: [draw(st.sampled_from(VALUES)) for _ in range(of)] for q in sorted(set(quantities))}
    assume(sum(v is None for column in columns.values() for v in column) <= 3)
    return drawn[:n_success], drawn[n_success:], columns


def brute_force(success, refuted_if, columns):
    return possible_verdicts(success, refuted_if, {(q, "v", i): v for q, c in columns.items() for i, v in enumerate(c)})


@given(cases(shared=True))
def test_a_verdict_is_never_contradicted_by_what_the_missing_values_turn_out_to_be(case):
    success, refuted_if, columns = case
    verdict = judge(preregistration(success, refuted_if), evidence(**columns))
    reachable = brute_force(*case)
    assert reachable <= set(verdict.possible)
    if verdict.verdict != "Inconclusive":
        assert reachable == {verdict.verdict}


@given(cases(shared=False))
def test_where_no_two_rules_share_values_exactly_what_is_possible_is_listed(case):
    success, refuted_if, columns = case
    counts = all(c.aggregate == "count" for c in (*success, *refuted_if))
    assume(counts)
    verdict = judge(preregistration(success, refuted_if), evidence(**columns))
    assert set(verdict.possible) == brute_force(*case)
    assert (verdict.verdict == "Inconclusive") == (len(verdict.possible) > 1)


@given(cases(shared=True))
def test_complete_evidence_is_decided_as_by_hand(case):
    success, refuted_if, columns = case
    columns = {q: [0.5 if v is None else v for v in column] for q, column in columns.items()}
    verdict = judge(preregistration(success, refuted_if), evidence(**columns))
    assert {verdict.verdict} == brute_force(success, refuted_if, columns)
    assert verdict.possible == (verdict.verdict,)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("bounds", [{"at_least": 1}, {"at_least": 2}, {"at_most": 0}, {"at_most": 1}], ids=str)
def test_a_count_is_three_valued_in_every_small_case(operator, bounds):
    """All 64 fillings of two units, out of below, at, above the threshold and missing; absent rows count as missing."""
    one = criterion(operator=operator, of=2, **bounds)
    choices = (1.0, 2.0, 3.0)
    for values in itertools.product((*choices, None), repeat=2):
        outcomes = set()
        for filled in itertools.product(*[(v,) if v is not None else choices for v in values]):
            n = sum({"<": v < 2, "<=": v <= 2, ">": v > 2, ">=": v >= 2}[operator] for v in filled)
            outcomes.add(n >= bounds["at_least"] if "at_least" in bounds else n <= bounds["at_most"])
        expected = outcomes.pop() if len(outcomes) == 1 else None
        assert met_of(one, error=values) is expected
        assert met_of(one, error=[v for v in values if v is not None]) is expected


@pytest.mark.parametrize(
    ("good", "bad", "verdict", "possible"),
    [
        ([1.0], [0.0], "Supported", {"Supported"}),
        ([3.0], [0.0], "Not supported", {"Not supported"}),
        ([3.0], [9.0], "Refuted", {"Refuted"}),
        ([None], [0.0], "Inconclusive", {"Supported", "Not supported"}),
        ([3.0], [None], "Inconclusive", {"Not supported", "Refuted"}),
        ([None], [None], "Inconclusive", {"Supported", "Not supported", "Refuted"}),
        ([None], [9.0], "Inconclusive", {"Supported", "Refuted"}),
        ([1.0], [None], "Supported", {"Supported"}),
    ],
)
def test_each_verdict_is_reached(good, bad, verdict, possible):
    rules = preregistration(
        [criterion("good", of=1, at_least=1)], [criterion("bad", operator=">", threshold=5.0, of=1, at_least=1)]
    )
    judged = judge(rules, evidence(good=good, bad=bad))
    assert judged.verdict == verdict
    assert set(judged.possible) == possible


def test_without_a_rule_that_refutes_nothing_is_refuted():
    rules = preregistration([criterion(of=1, at_least=1)])
    assert judge(rules, evidence(error=[3.0])).verdict == "Not supported"
    assert set(judge(rules, evidence()).possible) == {"Supported", "Not supported"}


def test_one_success_rule_that_fails_is_enough_not_to_be_supported():
    rules = preregistration([criterion("a", of=1, at_least=1), criterion("b", of=1, at_least=1)])
    assert judge(rules, evidence(a=[1.0], b=[1.0])).verdict == "Supported"
    assert judge(rules, evidence(a=[1.0], b=[3.0])).verdict == "Not supported"
    assert judge(rules, evidence(a=[None], b=[3.0])).verdict == "Not supported"


def test_a_choice_decides_nothing():
    choice = criterion("mape", aggregate="mean", of=1)
    rules = preregistration([criterion(of=1, at_least=1)], choices=[choice])
    for value, met in ((1.0, True), (3.0, False), (None, None)):
        judged = judge(rules, evidence(error=[1.0], mape=[value]))
        assert judged.verdict == "Supported"
        assert judged.criteria[-1].met is met


@pytest.mark.parametrize("aggregate", ["mean", "absolute_mean"])
def test_a_mean_needs_every_unit(aggregate):
    one = criterion(aggregate=aggregate, of=3)
    assert met_of(one, error=[1.0, 1.0, 1.0]) is True
    assert met_of(one, error=[1.0, 1.0, None]) is None
    assert met_of(one, error=[1.0, 1.0]) is None
    assert met_of(one) is None


def test_the_absolute_mean_bounds_the_bias_on_both_sides_and_reports_its_sign():
    one = criterion(aggregate="absolute_mean", of=2)
    assert met_of(one, error=[-9.0, 9.0]) is True
    assert met_of(one, error=[-3.0, -3.0]) is False
    result = judge(preregistration([one]), evidence(error=[-3.0, -1.0])).criteria[0]
    assert result.value == -2.0
    assert result.met is False
    assert result.evidence == "-2.0 over 2 evaluable units; 1 of 2 are < 2 alone"
    assert met_of(criterion(aggregate="mean", of=2), error=[-3.0, -3.0]) is True


def test_other_quantities_and_variants_are_not_counted():
    table = evidence(error=[1.0, 1.0, 1.0], other=[9.0] * 5)
    stranger = table[table["quantity"] == "error"].assign(variant="w", value=9.0)
    result = judge(preregistration([criterion(at_least=3)]), pd.concat([table, stranger])).criteria[0]
    assert (result.met, result.value) == (True, 3.0)


def test_nothing_known_is_not_evaluable_and_has_no_value():
    result = judge(preregistration([criterion(at_least=1)]), evidence(error=[None, None, None])).criteria[0]
    assert (result.met, result.value) == (None, None)
    assert result.evidence == "0 evaluable units (3 not evaluable)"


def test_reasons_for_missing_values_are_passed_on_once():
    table = evidence(error=[1.0, None, None]).assign(reason=["", "no public features", "no public features"])
    result = judge(preregistration([criterion(at_least=3)]), table).criteria[0]
    assert result.met is None
    assert result.evidence == "1 of 1 evaluable unit (2 not evaluable: no public features)"


def test_evidence_that_says_a_thing_twice_is_refused():
    twice = pd.concat([evidence(error=[1.0, 2.0]), evidence(error=[3.0])])
    with pytest.raises(InputError, match="error of v twice for `unit-0`"):
        judge(preregistration([criterion(at_least=1)]), twice)


def test_more_units_than_the_rule_speaks_of_are_refused():
    with pytest.raises(InputError, match="4 units for `c_error`, which speaks of 3 units"):
        judge(preregistration([criterion(at_least=1)]), evidence(error=[1.0] * 4))


@pytest.mark.parametrize("column", ["quantity", "variant", "unit", "value"])
def test_a_missing_column_is_named(column):
    with pytest.raises(InputError, match=f"lacks the column `{column}`"):
        judge(preregistration([criterion(at_least=1)]), evidence(error=[1.0]).drop(columns=column))


def test_the_report_is_a_line_a_criterion():
    rules = preregistration(
        [criterion("good", at_least=2)],
        [criterion("bad", operator=">", threshold=5.0, at_least=3)],
        [criterion("mape", aggregate="mean", of=1)],
    )
    lines = judge(rules, evidence(good=[1.0, None, 3.0], bad=[9.0, 9.0, 9.0], mape=[1.0])).report().split("\n")
    standing = "the study's thresholds, our readings, after exploration"
    assert lines[0] == f"HX  Inconclusive    pre-registration 01234567 (frozen 2026-01-02, {standing})"
    assert [line.split() for line in lines[1:4]] == [
        ["good", "rule", "not", "evaluable", "1", "of", "2", "evaluable", "units", "(1", "not", "evaluable)"],
        ["Refuted", "if", "bad", "rule", "holds", "3", "of", "3", "evaluable", "units"],
        ["mape", "rule", "yes", "+1.0", "over", "1", "evaluable", "unit;", "1", "of", "1", "are", "<", "2", "alone"],
    ]
    assert lines[4] == "  The missing values could still make it: Supported, Refuted."
    column = lines[2].index("holds")
    assert lines[1].index("not evaluable") == lines[3].index("yes") == column


def test_a_verdict_that_stands_says_nothing_of_others():
    text = judge(preregistration([criterion(of=1, at_least=1)]), evidence(error=[3.0])).report()
    assert text.startswith("HX  Not supported ")
    assert "not met" in text
    assert "could still" not in text


@functools.cache
def frozen_h2():
    return load_preregistration("h2")


def h2_evidence(e2e, mspe):
    units = [f"experiment-{i}" for i in range(16)]
    columns = {"e2e_error_percent": e2e, "mspe_percent": mspe}
    rows = [(q, "model36", u, v) for q, values in columns.items() for u, v in zip(units, values, strict=True)]
    return pd.DataFrame(rows, columns=["quantity", "variant", "unit", "value"]).astype({"value": float})


@pytest.mark.parametrize(
    ("e2e", "mspe", "verdict"),
    [
        ([5.0] * 12 + [50.0] * 4, [4.9] * 16, "Supported"),
        ([5.0] * 11 + [50.0] * 5, [4.9] * 16, "Refuted"),
        ([5.0] * 11 + [10.0] + [50.0] * 4, [4.9] * 16, "Not supported"),
        ([5.0] * 16, [-7.0] * 16, "Not supported"),
        ([5.0] * 16, [-11.0] * 16, "Refuted"),
        ([50.0] * 5 + [5.0] * 3 + [None] * 8, [3.7] * 16, "Refuted"),
        ([50.0] * 4 + [5.0] * 4 + [None] * 8, [3.7] * 16, "Inconclusive"),
        ([None] * 16, [3.7] * 16, "Inconclusive"),
        ([None] * 16, [99.0] * 16, "Refuted"),
    ],
)
def test_h2_reads_as_it_was_frozen(e2e, mspe, verdict):
    """Five of the eight evaluable experiments above 10% refute it, whatever the other eight would show."""
    assert judge(frozen_h2(), h2_evidence(e2e, mspe)).verdict == verdict


@pytest.mark.parametrize(
    ("r", "verdict"),
    [
        ([0.9, 0.81, 0.1, 0.0], "Supported"),
        ([0.9, 0.8, 0.1, 0.0], "Not supported"),
        ([0.6, 0.5, 0.1, 0.0], "Refuted"),
        ([None, None, 0.44, 0.0], "Inconclusive"),
        ([None, 0.1, 0.7, 0.0], "Not supported"),
    ],
)
def test_h1_reads_as_it_was_frozen(r, verdict):
    units = ["prefill_gemm", "prefill_attn", "decode_gemm", "decode_attn"]
    table = pd.DataFrame({"quantity": "r_pooled", "variant": "study_components", "unit": units, "value": r})
    assert judge(load_preregistration("h1"), table.astype({"value": float})).verdict == verdict


@given(st.lists(st.sampled_from([5.0, 10.0, 50.0]), min_size=16, max_size=16), st.integers(0, 15))
def test_learning_a_missing_value_of_h2_never_overturns_its_verdict(values, n_missing):
    """The frozen rules: whatever was definite with units missing stays when they are filled in."""
    rules = frozen_h2()
    before = judge(rules, h2_evidence([*values[: 16 - n_missing], *[np.nan] * n_missing], [1.0] * 16))
    after = judge(rules, h2_evidence(values, [1.0] * 16))
    assert after.verdict in before.possible


def test_a_rule_about_runs_to_come_reads_not_evaluated_until_there_are_some():
    import pandas as pd

    from stepcal.evaluation.preregistration import load_preregistration
    from stepcal.evaluation.verdict import NOT_EVALUATED, NOT_SUPPORTED, REFUTED, SUPPORTED, judge

    h3 = load_preregistration("h3")
    columns = ["quantity", "variant", "unit", "value"]
    assert judge(h3, pd.DataFrame(columns=columns)).verdict == NOT_EVALUATED

    def verdict(h100, other):
        rows = []
        for i, error in enumerate(h100):
            rows += [("e2e_error_percent", "default_h100", f"run {i}", abs(error))]
            rows += [("mspe_percent", "default_h100", f"run {i}", error)]
        rows += [("e2e_error_percent", v, "run", other) for v in ("default_a100", "default_l40s")]
        return judge(h3, pd.DataFrame(rows, columns=columns)).verdict

    assert verdict([1.0, -2.0, 3.0, -4.0, 11.0], 19.0) == SUPPORTED
    assert verdict([1.0, -2.0, 3.0, -4.0, 11.0], 21.0) == NOT_SUPPORTED
    assert verdict([1.0, -2.0, 13.0, -12.0, 11.0], 19.0) == REFUTED
