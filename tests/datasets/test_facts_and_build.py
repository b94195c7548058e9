"""The shipped tables: their sizes, their agreement with each other, and that `make data` writes them byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from stepcal.datasets import (
    experiments,
    facts,
    load_stages,
    measured,
    peers,
    published_h1_per_experiment,
    published_h2,
)
from stepcal.datasets.build import build_tables, main
from stepcal.errors import InputError, MissingDataError
from stepcal.locations import data_folder
from stepcal.specs.architecture import load_architecture
from stepcal.specs.hardware import load_accelerator

ROWS = {
    "architectures.csv": 4,
    "experiments.csv": 16,
    "load_stages.csv": 24,
    "measured.csv": 1_240,
    "published/h1_pooled.csv": 11,
    "published/h1_per_experiment.csv": 64,
    "published/h2.csv": 16,
    "published/xgboost.csv": 16,
    "published/blis_e2e.csv": 30,
    "published/peers.csv": 592,
    "catalogue/public_files.csv": 34,
    "catalogue/joined_tables.csv": 1,
    "kernel_efficiency.csv": 67,
    "transfer/runs.csv": 31,
    "transfer/measured.csv": 602,
    "transfer/peers.csv": 132,
    "transfer/sampling.csv": 8,
    "sources.csv": 17,
    "hardware/accelerators.csv": 10,
    "hardware/silicon.csv": 329,
    "hardware/silicon_peer.csv": 123,
}
HAND_WRITTEN = {"hardware/accelerators.csv", "hardware/silicon.csv", "hardware/silicon_peer.csv"}


@pytest.mark.parametrize("name", sorted(facts.TABLES))
def test_each_shipped_table_is_valid_and_complete(name: str) -> None:
    assert len(facts.shipped_table(name)) == ROWS[name]
    dictionary = facts.table_columns(name)
    assert (dictionary["meaning"].str.len() > 3).all()


def test_a_caller_may_change_what_it_gets() -> None:
    table = experiments()
    table["model"] = "changed"
    assert "changed" not in set(experiments()["model"])


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(InputError, match=r"No table `nothing\.csv` ships"):
        facts.shipped_table("nothing.csv")


def test_the_published_steps_add_up() -> None:
    per_run = published_h1_per_experiment().groupby("experiment_id")["n_steps"].first()
    assert per_run.sum() == 122_752
    assert published_h2()["n_test"].sum() == 24_550


def test_four_models_meet_four_workloads_and_only_reasoning_is_overloaded() -> None:
    runs = experiments()
    assert runs.groupby("model").size().to_dict() == dict.fromkeys(set(runs["model"]), 4)
    assert set(runs.query("overloaded")["workload"]) == {"reasoning"}
    assert runs["overloaded"].sum() == 4
    assert not runs["run_multi_turn"].any()
    assert runs["asked_multi_turn"].all()


def test_failures_are_those_that_were_published() -> None:
    failed = measured().query("metric == 'requests' and statistic == 'failed' and stage == -1 and value > 0")
    assert sorted(failed["value"]) == [4, 1_600, 3_294, 4_068]


def test_stage_counts_add_up_to_the_whole_run() -> None:
    counts = measured().query("metric == 'requests'")
    whole = counts.query("stage == -1").set_index(["experiment_id", "statistic"])["value"]
    stages = counts.query("stage >= 0").groupby(["experiment_id", "statistic"])["value"].sum()
    pd.testing.assert_series_equal(whole.sort_index(), stages.sort_index())
    sent = load_stages().groupby("experiment_id")["requests"].sum()
    assert sent.to_dict() == whole.xs("requested", level="statistic").to_dict()


def test_peers_were_judged_against_our_measured_figures() -> None:
    judged = peers().query("simulator != 'llmservingsim' and metric != 'itl'")
    ours = judged.merge(measured(), on=["experiment_id", "stage", "metric", "statistic"], validate="many_to_one")
    assert len(ours) == len(judged)
    assert (ours["measured_ms"] / ours["value"]).to_numpy() == pytest.approx(1.0, rel=1e-9)


def test_every_run_names_a_shipped_model_and_gpu() -> None:
    for run in experiments().itertuples():
        assert load_architecture(str(run.model)).name == load_architecture(str(run.model_as_named)).name
        load_architecture(str(run.model)).check_tensor_parallel(int(str(run.tensor_parallel)))
        assert load_accelerator(str(run.gpu)).bf16_dense_flops == 989.5e12


def test_the_ten_gpus_have_datasheet_figures() -> None:
    table = facts.shipped_table("hardware/accelerators.csv")
    assert set(table["name"]) == {
        "h100-sxm", "h100-nvl", "h200-sxm", "a100-80gb", "l40s", "b200", "b300-sxm", "gb200", "gb300", "rtx-pro-6000",
    }  # fmt: skip
    fp8 = table.dropna(subset="fp8_dense_tflops")
    assert (fp8["fp8_dense_tflops"] / fp8["bf16_dense_tflops"]).to_numpy() == pytest.approx(2.0, rel=0.02)


def test_build_writes_the_committed_tables_byte_for_byte(public_layout: Path, tmp_path: Path) -> None:
    written = build_tables(public_layout, tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in written) == sorted(ROWS.keys() - HAND_WRITTEN)
    for path in written:
        assert path.read_bytes() == (data_folder() / path.relative_to(tmp_path)).read_bytes(), path.name
    assert not list(tmp_path.glob(".build-*"))


def test_a_broken_layout_leaves_every_table_as_it_was(public_layout: Path, tmp_path: Path) -> None:
    layout, out = tmp_path / "layout", tmp_path / "out"
    shutil.copytree(public_layout, layout, ignore=shutil.ignore_patterns("steps"), copy_function=_copy)
    out.mkdir()
    (out / "experiments.csv").write_text("as it was", encoding="utf-8")
    broken = layout / "published" / "h2_evaluation_results.csv"
    broken.write_text(broken.read_text(encoding="utf-8").replace("bb_mape", "mape", 1), encoding="utf-8")
    with pytest.raises(InputError, match=r"published/h2\.csv: missing column `blackbox_mape_percent`"):
        build_tables(layout, out)
    broken.unlink()
    assert main(["--public", str(layout), "--out", str(out)]) == 2
    assert [path.name for path in out.iterdir()] == ["experiments.csv"]
    assert (out / "experiments.csv").read_text(encoding="utf-8") == "as it was"


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)  # contents only: the public layout may be read-only


def test_a_folder_that_is_no_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--public", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no `experiments/`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_shipped_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="Restore it from the repository"):
        facts.read_table(tmp_path / "experiments.csv", "experiments.csv")
    text = (data_folder() / "load_stages.csv").read_text(encoding="utf-8").replace(",5.0,600.0,", ",0,600.0,", 1)
    (tmp_path / "load_stages.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"row 1: column `requested_rate_per_s` is 0\.0, but must be a number above 0"):
        facts.read_table(tmp_path / "load_stages.csv", "load_stages.csv")
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="is not a CSV table"):
        facts.read_table(tmp_path / "empty.csv", "load_stages.csv")
