"""What studies hand to pages: every number that is handed is cited, and is a number; tables keep their rows."""

import json
import math
import re

import pytest

from stepcal.locations import book_folder
from stepcal.studies.pages import benchmarks, diagnosis, label, latency, question, variants
from stepcal.studies.registry import load_study
from stepcal.studies.results.records import read_recorded
from stepcal.studies.verdicts import verdict_of


@pytest.fixture(autouse=True)
def on_recorded_results(monkeypatch):
    monkeypatch.delenv("STEPCAL_DATA", raising=False)


def question_numbers():
    anchors = question.regression_anchors(load_study("h2")["scores"])
    rescored = question.rescored_predictions(load_study("published_predictions"))
    return question.question_numbers(question.measured_runs(), anchors, rescored)


def label_or_physics_numbers():
    summary = load_study("attribution")["summary"]
    return diagnosis.label_or_physics_numbers(summary)


PAGES = {
    "question_and_data": question_numbers,
    "h1": lambda: label.h1_numbers(load_study("h1"), verdict_of("h1")[0]),
    "h2_fits": lambda: label.h2_numbers(load_study("h2")),
    "baselines": lambda: label.baselines_numbers(load_study("h2")),
    "bias": lambda: label.bias_numbers(load_study("h2")["bias"]),
    "parsimony": lambda: label.parsimony_numbers(load_study("h2")),
    "end_to_end": lambda: latency.end_to_end_numbers(load_study("end_to_end")),
    "verdict": lambda: latency.verdict_numbers(
        load_study("end_to_end"), verdict_of("h2")[0], verdict_of("h2", published=True)[0]
    ),
    "kernel_transfer": lambda: latency.kernel_transfer_numbers(
        *(load_study(name) for name in ("kernel_transfer", "kernel_model", "kernel_uncertainty"))
    ),
    "label_audit": lambda: diagnosis.label_audit_numbers(load_study("label_audit"), read_recorded("schedule_timing")),
    "offloading": lambda: diagnosis.pool_numbers(load_study("offloading"), read_recorded("pool_loads")),
    "reconstruction": lambda: diagnosis.reconstruction_numbers(load_study("reconstruction")),
    "label_or_physics": label_or_physics_numbers,
    "variants": lambda: variants.variants_numbers(load_study("ablations")),
    "silicon": lambda: benchmarks.silicon_numbers(load_study("silicon")["rows"]),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_cited_and_finite(page):
    numbers = PAGES[page]()
    cells = json.loads((book_folder() / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    prose, code = (
        "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind) for kind in ("markdown", "code")
    )
    cited = set(re.findall(r"\{glue:text\}`(\w+)", prose)) | set(re.findall(r"cited\[[\'\"](\w+)", code))
    assert set(numbers) - cited == set()
    for name, value in numbers.items():
        assert not isinstance(value, float) or math.isfinite(value), name


def test_tables_beside_published_figures_keep_every_experiment():
    scores = load_study("h2")["scores"]
    assert len(label.beside_published_h2(scores)) == 16
    assert label.beside_published_h2(scores)["global9"].notna().sum() == scores["experiment_id"].nunique()
    study = load_study("end_to_end")
    both = latency.errors_by_experiment(study).set_index("experiment_id")
    assert len(both) == 16
    assert both["pace"].abs().mean() == pytest.approx(latency.end_to_end_numbers(study)["pace"])


def test_groups_of_biases_keep_their_order_and_their_numbers():
    bias = load_study("h2")["bias"]
    table = label.bias_by_group(bias)
    assert list(table["figure"]) == list(dict.fromkeys(bias["by"] + ": " + bias["group"].astype(str)))
    first = bias[bias["variant"] == "global9"].iloc[0]
    assert table["global9"][0] == first["mspe_percent"]
    assert table["n_steps"][0] == first["n_steps"]
