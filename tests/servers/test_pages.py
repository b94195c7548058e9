"""The pages about one's own server: the tutorial's commands run, the tables hold what the code does, the report builds."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.ingest import definitions_table, ingest
from stepcal.locations import book_folder
from stepcal.report.own_server import is_own_server
from stepcal.servers.coefficient_file import load_known
from stepcal.servers.demo import write_demo
from stepcal.servers.dossier import Dossier, verdict_table

RUNNER = CliRunner()


def commands(page: str) -> list[str]:
    text = (book_folder() / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_every_command_of_the_tutorial_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands("own_tutorial.md"):
        words = shlex.split(line)
        if words[0] == "cp":
            shutil.copy(words[1], words[2])
        elif words[1] != "report":  # below, on one page
            result = RUNNER.invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}: {result.output}"
            ran.append(words[1])
    assert ran == ["demo", "ingest", "check", "calibrate", "design", "plan", "export", "drift"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "recipe").iterdir()} >= {
        "vllm-bench.sh",
        "guidellm.sh",
        "inference-perf-0.yaml",
    }
    assert load_known("mine.json").log_sd < 0.05


def test_the_page_of_words_says_what_the_readers_do() -> None:
    page = (book_folder() / "own_tools.md").read_text(encoding="utf-8")
    for row in definitions_table():
        assert f"| {row['word']} | {row['meaning']} |" in page
        assert f"Tested on: {row['tested_on']}." in page


def test_the_page_of_errors_names_every_kind_of_suspicion() -> None:
    page = (book_folder() / "own_errors.md").read_text(encoding="utf-8")
    source = (Path(__file__).parents[2] / "stepcal" / "servers" / "suspicions.py").read_text(encoding="utf-8")
    kinds = set(re.findall(r'"([a-z]+(?:-[a-z]+)+|units|accelerator)"', source))
    assert len(kinds) >= 10
    for kind in kinds:
        assert kind in page, kind


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    files = write_demo(folder / "raw", rates_per_s=(3.0, 6.0), stage_s=40.0)
    ingest(files, folder / "mine")
    shutil.copy(folder / "raw" / "exp-config.yaml", folder / "mine")
    return folder / "mine"


def test_a_dossier_holds_these_runs_and_no_others(mine: Path) -> None:
    assert is_own_server(mine)
    assert not is_own_server(mine.parent / "raw")
    dossier = Dossier.read(mine)
    assert dossier.data_table()["run"].tolist() == ["bench-3-per-s", "bench-6-per-s"]
    verdict = dossier.verdict()
    table = verdict_table(verdict)
    # Criteria of A100 and L40S cannot be evaluated, so it is never supported.
    assert verdict.verdict in {"Not supported", "Refuted", "Inconclusive"}
    assert len(table) == len(verdict.criteria)
    assert "<" in table["criterion"].iloc[0], "escaped once, by the page"
    units = table[table["role"] == "success"]["evidence"].iloc[0]
    assert "2 of 2" in units


def test_a_page_about_ones_own_server_is_built(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPCAL_DATA", "")
    arguments = ["report", "--data", str(mine), "--output", str(tmp_path / "book"), "--only", "check"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "book" / "html" / "book" / "check.html").read_text(encoding="utf-8")
    assert "bench-3-per-s" in page
    assert "llama-2-70b" not in page  # nothing of the study's runs
    assert "stepcal report --only check --data FOLDER --set" in re.sub("<[^>]+>", "", page)
