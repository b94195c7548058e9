"""Each notebook runs alone, in a kernel of its own, with its defaults and with a changed parameter."""

import asyncio
import resource

import pytest

from stepcal.locations import book_folder
from stepcal.report.execution import execute, install_kernel

NOTEBOOKS = sorted(p.stem for p in book_folder().glob("*.ipynb"))
LIMIT_S = 30
"""Processor time of a notebook with its defaults, on recorded results."""
LONGER = {
    "controlled": "simulates twenty seeds of eight faults, 60 s; run here with two seeds",
}
"""Notebooks that take longer, and why."""
CHANGED = {
    "controlled": {"n_seeds": 2},
    "summary": {"limit_percent": 5.0},
    "simulator": {"seed": 1},
    "h1": {
        "source": "simulated",
        "only_experiments": "20260217-202857-llama-2-70b-tp4-general, 20260218-150304-codellama-34b-tp2-general",
        "n_resamples": 20,
    },
}
"""A parameter of a page that needs no traces to be changed."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return install_kernel(tmp_path_factory.mktemp("jupyter"))


def seconds(name, parameters, kernels):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asyncio.run(execute(book_folder() / f"{name}.ipynb", parameters, kernels))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if n not in LONGER])
def test_alone_with_defaults(name, kernels, monkeypatch):
    monkeypatch.delenv("STEPCAL_DATA", raising=False)
    assert seconds(name, {}, kernels) < LIMIT_S


@pytest.mark.parametrize("name", CHANGED)
def test_with_a_changed_parameter(name, kernels, monkeypatch):
    monkeypatch.delenv("STEPCAL_DATA", raising=False)
    assert seconds(name, CHANGED[name], kernels) < LIMIT_S


@pytest.mark.parametrize(("name", "parameters"), [("h1", {"seed": -1}), ("simulator", {"experiment_id": "none"})])
def test_a_bad_parameter_stops_a_page_with_our_words(name, parameters, kernels):
    from stepcal.report.execution import ReportError

    with pytest.raises(ReportError, match=r"InputError: `(seed=-1|experiment_id='none')`"):
        seconds(name, parameters, kernels)
