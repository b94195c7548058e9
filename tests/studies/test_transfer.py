"""The 31 runs that nothing was fitted to: facts, the verdict on H3, and what the recording rests on."""

import filecmp
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stepcal.datasets import transfer_measured, transfer_runs
from stepcal.evaluation.latency_errors import compare
from stepcal.experiments.experiment import run_experiment
from stepcal.experiments.latencies import predicted_latencies
from stepcal.locations import data_folder
from stepcal.step_time.coefficients import frozen_default_sha256, load_coefficients
from stepcal.studies import registry as studies
from stepcal.studies.evidence_physical import H3_COEFFICIENTS, SEEDS
from stepcal.studies.kernels import transfer
from stepcal.studies.verdicts import verdict_of

H3_SHA256 = "c995bf8e97565b885709a35b7930b3ba73621f20e7923ddb9d895d3e0e8a267f"
"""Of the coefficients on the day that H3 was frozen."""
FASTEST = "26-llama-3-1-8b-tp2-general-2"


@pytest.fixture(scope="module")
def study():
    return studies.load_study(studies.TRANSFER)


def test_architectures_are_those_of_the_public_layout():
    named = os.environ.get("STEPCAL_DATA")
    public = (Path(named) if named else Path(__file__).parents[3] / "shared" / "data") / "transfer" / "architectures"
    if not public.is_dir():
        pytest.skip("needs the public files: set STEPCAL_DATA to their folder")
    own = data_folder() / "transfer" / "architectures"
    names = sorted(p.name for p in public.iterdir())
    assert names == sorted(p.name for p in own.iterdir())
    assert filecmp.cmpfiles(public, own, names, shallow=False)[0] == names


def test_every_run_is_an_experiment_with_its_measurements():
    cases = transfer.transfer_cases()
    assert [experiment.experiment_id for experiment, _ in cases] == list(transfer_runs()["experiment_id"])
    for experiment, known in cases:
        splits = {"whole"} | {f"stage {i}" for i in range(len(experiment.workload.stages))}
        assert set(known["split"]) == (splits if len(splits) > 2 else {"whole"})
        wide = known.query("statistic == 'mean'").pivot(index="split", columns="metric", values="value")
        tokens = experiment.workload.output_len
        assert np.allclose(wide["e2e"], wide["ttft"] + wide["tpot"] * (tokens - 1))


def test_no_measurement_is_without_a_run():
    assert set(transfer_measured()["experiment_id"]) == set(transfer_runs()["experiment_id"])


def test_h3_is_judged_by_the_coefficients_that_it_froze():
    assert frozen_default_sha256(H3_COEFFICIENTS) == H3_SHA256
    verdict, provenance = verdict_of("h3")
    assert verdict.verdict == "Not supported"
    met = {r.criterion.name: r.met for r in verdict.criteria}
    assert met == {
        "h100_share": True,
        "h100_mean": False,
        "h100_mspe": False,
        "a100_each": False,
        "l40s_each": False,
        "h100_above_10_percent": False,
        "h100_mspe_above_10_percent": False,
    }
    assert provenance.kind == studies.RECORDED


def test_a_recorded_error_is_what_the_simulator_gives_today(study):
    (experiment, known), frozen = transfer.transfer_cases((FASTEST,))[0], load_coefficients(H3_COEFFICIENTS)
    step_time = frozen.compile(experiment.deployment)
    errors = []
    for seed in SEEDS:
        result = run_experiment(experiment, step_time, process="poisson", seed=seed, **frozen.api_overheads_us())
        errors.append(compare(predicted_latencies(result, experiment.workload.output_len), known))
    again = pd.concat(errors).groupby(["split", "metric", "statistic"])["error_percent"].mean()
    recorded = study["errors"].query("experiment_id == @FASTEST").set_index(["split", "metric", "statistic"])
    both = recorded.join(again.rename("error_percent_now"))
    assert len(both) == 21
    assert np.allclose(both["error_percent"], both["error_percent_now"], rtol=1e-6)


def test_fp8_is_read_as_on_the_day_of_the_freeze(study):
    fp8 = transfer_runs().query("precision == 'fp8'")["experiment_id"]
    assert set(study["widths_by_group"]["experiment_id"]) == set(fp8)
    for experiment, _ in transfer.transfer_cases(tuple(fp8)):
        assert transfer.as_read_when_frozen(experiment).architecture.widths.head == 1.0


def test_groups_hold_all_runs_once(study):
    table = transfer.errors_by_run(study.tables)
    assert len(table) == table["experiment_id"].nunique() == 31
    assert table["group"].value_counts().to_dict() == {
        "H100, large vocabulary, top-p": 13,
        "H100, vocabulary of 32,000": 11,
        "FP8 on H100": 3,
        "a100-80gb": 2,
        "H100, large vocabulary, no top-p": 1,
        "l40s": 1,
    }


def test_peers_are_compared_over_the_same_runs(study):
    table = transfer.peer_comparison(study.tables).set_index("simulator")
    assert table.loc["blis-roofline", "runs"] == 31
    assert table.loc["blis-roofline", "ours_percent"] == pytest.approx(
        transfer.errors_by_run(study.tables)["e2e"].abs().mean()
    )
