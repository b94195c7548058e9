"""The wheel works outside any checkout: built, installed into an environment of its own, and used from an empty folder.

The environment borrows the libraries of the one that runs the tests, but not stepcal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "stepcal/_shipped/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it, and an empty folder to work in."""

    python: Path
    folder: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        unset = ("PYTHONPATH", "STEPCAL_DATA", "STEPCAL_CACHE")
        environment = {k: v for k, v in os.environ.items() if k not in unset} | variables
        command = [str(self.python.parent / "stepcal"), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    def json(self, *arguments: str, **variables: str) -> dict:
        done = self.run(*arguments, "--json", "-", **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installation:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared_libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Installation(python, tmp_path_factory.mktemp("empty"))


def test_the_wheel_holds_the_code_and_what_git_tracks_of_data_and_book(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tracked = subprocess.run(["git", "ls-files", "data", "book"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    shipped = {n.removeprefix(SHIPPED) for n in names if n.startswith(SHIPPED)}
    assert set(tracked.stdout.split()) - shipped == set()
    assert {"_config.yml", "_toc.yml", "tests/acceptance.csv"} <= shipped
    assert not [n for n in names if "checkpoints" in n or n.startswith("tests/")]


def test_it_is_the_wheel_that_is_imported(installed):
    code = "import stepcal, stepcal.locations as at; print(stepcal.__file__); print(at.shipped_folder())"
    done = subprocess.run(
        [installed.python, "-c", code], cwd=installed.folder, env={}, capture_output=True, text=True, check=True
    )
    package, shipped = map(Path, done.stdout.split())
    assert package.is_relative_to(installed.python.parents[1])
    assert shipped == package.parent / "_shipped"
    toc = yaml.safe_load((shipped / "_toc.yml").read_text(encoding="utf-8"))
    pages = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    assert [p for p in pages if not any((shipped / f"{p}.{end}").is_file() for end in ("md", "ipynb"))] == []


def test_verdict(installed):
    result = installed.json("verdict", "h2")
    assert result["verdict"] in result["possible"]
    assert len(result["preregistration_sha256"]) == 64


def test_simulate(installed, tmp_path):
    workload = tmp_path / "profile.yaml"
    prefix = {"num_groups": 2, "num_prompts_per_group": 2, "system_prompt_len": 20, "question_len": 10, "output_len": 5}
    load = {"type": "constant", "stages": [{"rate": 5, "duration": 4}]}
    content = {"data": {"type": "shared_prefix", "shared_prefix": prefix}, "load": load, "api": {"type": "completion"}}
    workload.write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ("--kv-blocks", "1000", "--workload", str(workload), "--coefficients", "default")
    assert installed.json("simulate", "--architecture", "llama-2-7b", *options)["overall"]["completed"] == 20


def test_evaluate(installed):
    assert len(installed.json("evaluate", "--coefficients", "default", "--arrivals", "poisson")["per_experiment"]) == 16


def test_fit(installed, traces_folder):
    experiment = "20260218-150304-codellama-34b-tp2-general"
    result = installed.json("fit", "blackbox", "--experiment", experiment, STEPCAL_DATA=str(traces_folder))
    assert result["per_experiment"][0]["mape_percent"] == pytest.approx(151.06270494181769, rel=1e-9)


def test_fit_without_traces_says_what_to_do(installed, tmp_path):
    done = installed.run("fit", "blackbox", STEPCAL_CACHE=str(tmp_path))
    assert done.returncode == 2
    assert "stepcal download" in done.stderr


def test_nothing_was_written_where_it_was_called(installed):
    assert list(installed.folder.iterdir()) == []
