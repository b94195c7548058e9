"""Every example in a docstring runs and shows what it says; each of the ten public names has one."""

from __future__ import annotations

import doctest
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_folders import PROFILE, summary, write_run
from simulated_requests import measured_table

import stepcal
from stepcal.locations import book_folder
from stepcal.step_time.coefficients import load_coefficients
from stepcal.units import MS_PER_S

MODULES = [m.name for m in pkgutil.walk_packages(stepcal.__path__, "stepcal.") if not m.name.endswith("__main__")]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(module: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(import_module(module)) if test.examples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the examples read: ``profile.yaml``, and ``my-runs`` with one run whose clients saw what the model says."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    deployment = stepcal.Deployment.of("llama-2-7b", "h100-sxm", kv_blocks=7462)
    load = stepcal.Workload.read(folder / "profile.yaml")
    result = stepcal.simulate(load, deployment, load_coefficients("default"), seed=3)
    e2e_s = result.summary()["overall"]["e2e_ms"]["mean"] / MS_PER_S
    counts = {"summary": 120, "stage_0": 40, "stage_1": 80}
    files = {f"results/{name}_lifecycle_metrics.json": summary(n, e2e_s=e2e_s) for name, n in counts.items()}
    run = write_run(folder / "my-runs", "llama-2-7b-run", files=files)
    measured_table(result, "llama-2-7b-run").to_parquet(run / "requests.parquet")
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_examples_of(module, folder, monkeypatch):
    monkeypatch.chdir(folder)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for test in examples(module):
        with np.printoptions(legacy=False):
            runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", stepcal.__all__)
def test_each_public_name_has_an_example_that_uses_it(name):
    value = getattr(stepcal, name)
    tests = doctest.DocTestFinder(recurse=False).find(value, name)
    assert any(f"stepcal.{name}" in example.source for test in tests for example in test.examples)


def test_the_code_of_the_book_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    page = (book_folder() / "api.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "api.md", "exec"), {})
    assert capsys.readouterr().out.startswith("kernels model, 1 experiment")


def test_the_book_page_shows_the_public_names():
    page = (book_folder() / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\.\. auto(?:class|function):: (\w+)\n", page))
    assert shown == set(stepcal.__all__)
