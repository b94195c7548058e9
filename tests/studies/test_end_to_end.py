"""All variants end to end: the JSON of ``stepcal evaluate``, the evidence of H2, and the verdict that follows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepcal.datasets import experiments
from stepcal.errors import InputError
from stepcal.evaluation.evaluate import evaluate
from stepcal.experiments.experiment import Experiment
from stepcal.experiments.latencies import latency_table, measured_latencies
from stepcal.simulator import LoadStage
from stepcal.step_time.coefficients import StepTimeModel, load_coefficients
from stepcal.studies.end_to_end import POOLED_VARIANTS, e2e_evidence
from stepcal.studies.evidence import NO_FEATURES
from stepcal.studies.published_runs import load_experiments
from stepcal.studies.registry import END_TO_END, load_study
from stepcal.studies.verdicts import verdict_of

STATISTICS = {"mean", "p50", "p90", "p99"}
SUMMARY = {"requests", "completed", "failed", "e2e_ms", "ttft_ms", "itl_ms", "tpot_ms", "requests_per_s"}
ERRORS = ("e2e_error_percent", "ttft_error_percent", "tpot_error_percent")
TRAINED = {"llama-2-70b", "codellama-34b"}


@pytest.fixture
def no_traces(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("STEPCAL_DATA", str(tmp_path))
    monkeypatch.setattr("stepcal.datasets.catalogue.cache_folder", lambda: tmp_path / "no cache")


def short(experiment: Experiment) -> Experiment:
    """The experiment with a tenth of its load stages' length."""
    stages = tuple(LoadStage(s.rate, s.duration_s / 10) for s in experiment.workload.stages)
    return replace(experiment, workload=replace(experiment.workload, stages=stages))


@pytest.fixture(scope="module")
def cases() -> list[tuple[Experiment, pd.DataFrame]]:
    return [(short(e), measured_latencies(e)) for e in load_experiments()]


@pytest.fixture(scope="module")
def of_model36(cases) -> dict:
    return evaluate(load_coefficients("model36"), cases, process="poisson", seed=3)


def check_summary(summary: dict) -> None:
    assert set(summary) == SUMMARY
    assert summary["requests"] == summary["completed"] + summary["failed"]
    for key in ("e2e_ms", "ttft_ms", "itl_ms", "tpot_ms"):
        assert set(summary[key]) == STATISTICS


def test_evaluate_has_the_shape_that_others_rely_on(of_model36) -> None:
    assert set(of_model36) == {
        "arrivals", "per_experiment", "mean_abs_e2e_error_percent", "n_below_10_percent", "mspe_percent"
    }  # fmt: skip
    assert [row["experiment_id"] for row in of_model36["per_experiment"]] == experiments()["experiment_id"].tolist()
    for row in of_model36["per_experiment"]:
        assert {"experiment_id", "measured", "predicted", *ERRORS} <= set(row)
        check_summary(row["measured"])
        assert isinstance(row["measured"]["e2e_ms"]["mean"], float)
        assert row["measured"]["requests_per_s"] > 0
        if row["predicted"] is not None:
            check_summary(row["predicted"])
            assert row["predicted"]["requests"] > 0


def test_families_that_were_never_fitted_are_not_evaluable(of_model36) -> None:
    rows = of_model36["per_experiment"]
    unknown = [row for row in rows if row["predicted"] is None]
    assert len(unknown) == 8
    for row in unknown:
        assert "mixtral" in row["experiment_id"] or "llama-2-7b" in row["experiment_id"]
        assert [row[key] for key in ERRORS] == [None, None, None]
        assert "cannot predict" in row["reason"]


def test_the_totals_follow_from_the_rows(of_model36) -> None:
    known = [row for row in of_model36["per_experiment"] if row["e2e_error_percent"] is not None]
    signed = np.array([row["e2e_error_percent"] for row in known])
    assert of_model36["mean_abs_e2e_error_percent"] == pytest.approx(np.abs(signed).mean())
    assert of_model36["mspe_percent"] == pytest.approx(signed.mean())
    assert of_model36["n_below_10_percent"] == sum(row["judged_error_percent"] < 10 for row in known)
    for row in known:
        predicted, measured = row["predicted"]["e2e_ms"]["mean"], row["measured"]["e2e_ms"]["mean"]
        assert row["e2e_error_percent"] == pytest.approx(100 * (predicted - measured) / measured)
        assert row["judged_error_percent"] >= abs(row["e2e_error_percent"]) or not row["overloaded"]


def test_the_same_seed_gives_the_same_answer(cases, of_model36) -> None:
    coefficients = load_coefficients("model36")
    known = [case for case in cases if case[0].architecture.name in TRAINED]
    same, other = (evaluate(coefficients, known, process="poisson", seed=seed) for seed in (3, 4))
    mine = [row for row in of_model36["per_experiment"] if row["predicted"] is not None]
    assert same["per_experiment"] == mine
    assert other["per_experiment"] != mine


def test_a_perfect_model_has_no_error_and_counts(cases) -> None:
    """Evaluated against its own simulation, a model is right; half as long a pace is far off."""
    experiment = cases[0][0]
    pace = StepTimeModel("affine", {"constant_us": 10_000.0}, "mine")
    seen = evaluate(pace, [(experiment, cases[0][1])], process="poisson")["per_experiment"][0]["predicted"]
    known = pd.DataFrame(
        [("whole", m, "mean", seen[f"{m}_ms"]["mean"]) for m in ("e2e", "ttft", "tpot")]
        + [("whole", "completed", "count", float(seen["completed"])), ("whole", "failed", "count", 0.0)],
        columns=["split", "metric", "statistic", "value"],
    )
    right = evaluate(pace, [(experiment, known)], process="poisson")
    assert right["per_experiment"][0]["e2e_error_percent"] == pytest.approx(0.0, abs=1e-9)
    assert right["per_experiment"][0]["tpot_error_percent"] == pytest.approx(0.0, abs=1e-9)
    assert right["n_below_10_percent"] == 1
    twice = evaluate(replace(pace, values={"constant_us": 20_000.0}), [(experiment, known)], process="poisson")
    assert twice["mspe_percent"] == pytest.approx(100.0, abs=3.0)
    assert twice["n_below_10_percent"] == 0
    # The same error, but of an overloaded run of which measured half as many completed.
    half = known.assign(value=known["value"].where(known["metric"] != "completed", seen["completed"] / 2))
    judged = evaluate(pace, [(replace(experiment, overloaded=True), half)], process="poisson")
    assert judged["mean_abs_e2e_error_percent"] == pytest.approx(0.0, abs=1e-9)
    assert judged["per_experiment"][0]["judged_error_percent"] == pytest.approx(100.0)
    assert judged["n_below_10_percent"] == 0
    calm = evaluate(pace, [(experiment, half)], process="poisson")
    assert calm["n_below_10_percent"] == 1


def test_a_run_in_which_nothing_completed_is_not_evaluable(cases) -> None:
    nothing = np.full(4, np.nan)
    known = latency_table(nothing, nothing, 8, np.zeros(4, int))
    pace = StepTimeModel("affine", {"constant_us": 10_000.0}, "mine")
    result = evaluate(pace, [(cases[0][0], known)], process="poisson")
    (row,) = result["per_experiment"]
    assert [row[key] for key in ERRORS] == [None, None, None]
    assert "No request completed" in row["reason"]
    check_summary(row["predicted"])
    assert result["mean_abs_e2e_error_percent"] is None
    assert result["mspe_percent"] is None
    assert result["n_below_10_percent"] == 0


def test_replaying_needs_requests(cases) -> None:
    with pytest.raises(InputError, match="cannot be replayed"):
        evaluate(load_coefficients("global9"), cases[:1], process="replayed")
    assert evaluate(load_coefficients("global9"), cases[:1])["arrivals"] == "poisson"


def made_up_errors() -> tuple[pd.DataFrame, list[Experiment]]:
    runs = load_experiments()
    rows = [
        {
            "experiment_id": case.experiment_id,
            "variant": variant,
            "arrivals": arrivals,
            "split": split,
            "e2e_error_percent": -7.0 if (split, arrivals) == ("whole", "replayed") else 555.0,
            "completed_error_percent": 80.0,
        }
        for case in runs
        for variant in ("global9", "model36", "pace")
        for arrivals in ("replayed", "poisson")
        for split in ("whole", "test")
    ]
    return pd.DataFrame(rows), runs


def test_evidence_is_nan_with_a_reason_where_features_are_not_public() -> None:
    errors, runs = made_up_errors()
    evidence = e2e_evidence(errors, runs, TRAINED)
    assert len(evidence) == 3 * 16
    assert set(evidence["variant"]) == set(POOLED_VARIANTS)
    models = experiments().set_index("experiment_id")["model"]
    overloaded = experiments().set_index("experiment_id")["overloaded"]
    for row in evidence.to_dict("records"):
        if models[row["experiment_id"]] not in TRAINED:
            assert np.isnan(row["value"])
            assert row["reason"] == NO_FEATURES
        elif row["variant"] == "phase16":
            assert np.isnan(row["value"]), "it was not simulated"
        else:
            assert row["value"] == (80.0 if overloaded[row["experiment_id"]] else 7.0)
            assert row["reason"] == ""


@pytest.mark.usefixtures("no_traces")
def test_h2_is_refuted_by_the_recorded_evidence() -> None:
    judged, provenance = verdict_of("h2")
    assert provenance.kind == "recorded"
    assert judged.verdict == "Refuted"
    assert judged.possible == ("Refuted",)
    by_name = {r.criterion.name: r for r in judged.criteria}
    e2e = by_name["e2e_mean_error"]
    assert "8 evaluable experiments (8 not evaluable: no public training features)" in e2e.evidence
    assert e2e.met is False


@pytest.mark.usefixtures("no_traces")
def test_the_recorded_study_is_complete() -> None:
    study = load_study(END_TO_END)
    names = set(experiments()["experiment_id"])
    assert set(study["errors"]["experiment_id"]) == names
    evidence = study["evidence"]
    for variant, rows in evidence.groupby("variant"):
        assert set(rows["experiment_id"]) == names, variant
        assert rows["value"].notna().sum() == 8
        assert (rows["value"].isna() == (rows["reason"] == NO_FEATURES)).all()
    errors = study["errors"]
    runs = set(zip(errors["variant"], errors["arrivals"], strict=True))
    assert {("training_mean", "replayed"), ("pace", "replayed"), ("model36", "poisson"), ("raw", "replayed")} <= runs
    bounds = errors[errors["variant"].isin(["training_mean", "pace"]) & (errors["split"] == "whole")]
    assert set(bounds["experiment_id"]) == names


@pytest.mark.usefixtures("no_traces")
def test_recorded_evidence_is_the_recorded_error() -> None:
    """The judged error of a run that is not overloaded is its absolute E2E error."""
    study = load_study(END_TO_END)
    errors = study["errors"].query("split == 'whole' and arrivals == 'replayed'")
    value = errors.set_index(["variant", "experiment_id"])["e2e_error_percent"].abs()
    overloaded = experiments().set_index("experiment_id")["overloaded"]
    for row in study["evidence"].dropna(subset="value").to_dict("records"):
        mine = value[row["variant"], row["experiment_id"]]
        if overloaded[row["experiment_id"]]:
            assert row["value"] >= mine
        else:
            assert row["value"] == mine


def test_recorded_errors_are_what_evaluate_finds(traces_folder: Path) -> None:
    """`stepcal evaluate` with the recorded coefficients gives the errors that the study recorded."""
    from stepcal.datasets import load_requests

    wanted = ("20260218-150304-codellama-34b-tp2-general", "20260218-160939-codellama-34b-tp2-reasoning")
    cases = [
        (e, measured_latencies(e)) for e in load_experiments(load_requests(traces_folder)) if e.experiment_id in wanted
    ]
    result = evaluate(load_coefficients("model36"), cases)
    recorded = load_study_errors()
    for row in result["per_experiment"]:
        expected = recorded.loc[row["experiment_id"]]
        assert row["e2e_error_percent"] == pytest.approx(expected["e2e_error_percent"], rel=1e-6)
        assert row["ttft_error_percent"] == pytest.approx(expected["ttft_error_percent"], rel=1e-6)


def load_study_errors() -> pd.DataFrame:
    from stepcal.studies.results.records import read_recorded

    errors = read_recorded(END_TO_END).tables["errors"]
    chosen = errors.query("split == 'whole' and arrivals == 'replayed' and variant == 'model36'")
    return chosen.set_index("experiment_id")
