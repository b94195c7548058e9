"""Studies: measured, recorded or simulated, and never one taken for another."""

import json

import numpy as np
import pandas as pd
import pytest

from stepcal.datasets import published_xgboost
from stepcal.errors import InputError, MissingDataError
from stepcal.studies import registry as studies
from stepcal.studies.results.record_all import check_all, differences, record_all
from stepcal.studies.results.records import Recording, read_recorded, write_recorded
from stepcal.studies.verdicts import verdict_of

ANCHORS = {
    "20260217-202857-llama-2-70b-tp4-general": 61.154177880328795,
    "20260217-203421-llama-2-70b-hf-tp4-codegen": 90.75831902128996,
    "20260218-150304-codellama-34b-tp2-general": 151.06270494181769,
}


@pytest.fixture
def no_traces(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPCAL_DATA", str(tmp_path))
    monkeypatch.setattr("stepcal.datasets.catalogue.cache_folder", lambda: tmp_path)


def test_recorded_equals_recomputed(traces_folder):
    for name, found in check_all(traces_folder):
        assert [str(difference) for difference in found if difference.size > 1.0] == [], name


def test_a_changed_number_in_a_recording_is_found(traces_folder, monkeypatch, tmp_path):
    study = studies.load_study(studies.RESCORED, data=traces_folder)
    (tmp_path / "recorded").mkdir()
    monkeypatch.setattr("stepcal.studies.results.records.data_folder", lambda: tmp_path)
    changed = {"rescored": study["rescored"].assign(mape_percent=lambda t: t["mape_percent"] * 1.001)}
    write_recorded(studies.RESCORED, Recording(changed, {}, {"data_sha256": study.provenance.data_sha256}))
    assert "mape_percent" in differences(study)[0]


def test_without_traces_the_recording_is_read_and_marked(no_traces):
    study = studies.load_study("h2")
    assert study.provenance.kind == studies.RECORDED
    assert "nothing was recomputed" in study.provenance.sentence()
    blackbox = study["scores"].query("variant == 'blackbox' and metric == 'mape_percent'").set_index("experiment_id")
    for experiment, expected in ANCHORS.items():
        assert blackbox.loc[experiment, "value"] == pytest.approx(expected, rel=1e-9)


def test_without_traces_other_options_are_refused(no_traces):
    with pytest.raises(MissingDataError, match="other options"):
        studies.load_study("h2", n_resamples=7)
    with pytest.raises(MissingDataError, match="Recording needs"):
        record_all()


def test_recorded_rescored_predictions_are_the_published_ones(no_traces):
    table = studies.load_study(studies.RESCORED)["rescored"].set_index("experiment_id")
    published = published_xgboost().set_index("experiment_id")["test_mape_percent"]
    assert np.allclose(table["mape_percent"], published.reindex(table.index), rtol=1e-6)
    assert table["mape_percent"].mean() == pytest.approx(34.04, abs=0.01)


def test_simulated_studies_say_so_and_are_reproducible(no_traces):
    options = {"variants": ["constant", "blackbox"], "n_resamples": None, "seed": 5, "recompute": True}
    first, second = (studies.load_study("h2", source="simulated", **options) for _ in range(2))
    assert first.provenance.kind == studies.SIMULATED
    assert "enter no verdict" in first.provenance.sentence()
    assert first.provenance.n_rows == 122_752
    pd.testing.assert_frame_equal(first["scores"], second["scores"])


def test_verdicts_never_rest_on_simulated_rows(no_traces):
    for hypothesis in ("h1", "h2", "h2_step"):
        _, provenance = verdict_of(hypothesis)
        assert provenance.kind == studies.RECORDED


def test_on_published_figures_the_bias_criterion_is_met_and_the_verdict_stays_open():
    verdict, _ = verdict_of("h2", published=True)
    met = {r.criterion.name: r.met for r in verdict.criteria}
    assert met["mspe"] is True
    assert met["mspe_above_10_percent"] is False
    assert met["e2e_mean_error"] is None
    assert verdict.verdict == "Inconclusive"


def test_the_published_step_errors_refute_the_step_hypothesis():
    verdict, _ = verdict_of("h2_step", published=True)
    assert verdict.verdict == "Refuted"
    assert verdict.preregistration.status == "post hoc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "h9"}, "Unknown study `h9`"),
        ({"name": "h2", "source": "guessed"}, "`source='guessed'` is unknown"),
        ({"name": "h2", "source": "simulated", "only_experiments": ["x"]}, "No steps of experiment `x`"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        studies.load_study(**arguments)


def test_recordings_round_trip_and_keep_their_day(monkeypatch, tmp_path):
    import datetime

    (tmp_path / "recorded").mkdir()
    monkeypatch.setattr("stepcal.studies.results.records.data_folder", lambda: tmp_path)
    table = pd.DataFrame({"name": ["a", None], "value": [0.1, np.nan], "n": [1, 2], "flag": [True, False]})
    recording = Recording({"t": table}, {"report": "text"}, {"data_sha256": "0"})
    path = write_recorded("x", recording, today=datetime.date(2026, 1, 2))
    again = read_recorded("x")
    pd.testing.assert_frame_equal(again.tables["t"], table, check_dtype=False)
    assert again.texts == {"report": "text"}
    before = path.read_bytes()
    write_recorded("x", recording, today=datetime.date(2026, 3, 4))
    assert path.read_bytes() == before, "an unchanged result keeps its day"
    path.write_text(json.dumps({"tables": {}}))
    with pytest.raises(InputError, match="is not a recording"):
        read_recorded("x")
