"""`stepcal report` without the extra says so before it does anything."""

from importlib.metadata import PackageNotFoundError

import pytest
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.report import extra
from stepcal.report.execution import ReportError

ASKED = [
    "numpy>=2.0",
    "jupyter-book<2,>=1.0.4; extra == 'report'",
    'matplotlib>=3.9; extra == "report"',
    "x; extra == 'test'",
]


def installed(*names: str):
    def version(name: str) -> str:
        if name not in names:
            raise PackageNotFoundError(name)
        return "1"

    return version


@pytest.fixture
def metadata(monkeypatch):
    monkeypatch.setattr(extra, "requires", lambda _: ASKED)
    return lambda *names: monkeypatch.setattr(extra, "version", installed(*names))


def test_what_is_missing_is_named(metadata):
    metadata("numpy", "matplotlib")
    with pytest.raises(
        ReportError, match=r"needs jupyter-book, which is not installed\. `pip install 'stepcal\[report\]'`"
    ):
        extra.refuse_without_extra()
    metadata("numpy")
    with pytest.raises(ReportError, match="jupyter-book, matplotlib, which are not"):
        extra.refuse_without_extra()


def test_with_the_extra_nothing_is_said(metadata):
    metadata("jupyter-book", "matplotlib")
    extra.refuse_without_extra()


def test_the_command_stops_at_once(metadata, tmp_path):
    metadata()
    done = CliRunner().invoke(app, ["report", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "stepcal[report]" in done.stderr
    assert not (tmp_path / "out").exists()
