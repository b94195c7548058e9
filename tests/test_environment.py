"""The frame holds together: lock, environment.yml, citation, changelog, book files and the commands of the Makefile."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from loaded_tools import load_tool
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("setup", "report", "test", "lab", "hooks", "data", "record", "lock", "clean", "help")
MATHJAX_3_2_2_SHA256 = "a4354ff94fd868aea0cc6eaaa79a57fda0588646fc46ee3700a349ee0a11cbe6"


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("environment_from_lock")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(_read("pyproject.toml"))


@pytest.fixture(scope="module")
def locked(tool) -> dict[str, Requirement]:
    requirements = [Requirement(pin) for pin in tool.pins(_read("requirements.lock"))]
    return {canonicalize_name(r.name): r for r in requirements}


class TestLock:
    def test_every_pin_has_a_hash(self, locked):
        blocks = re.split(r"\n(?=[A-Za-z0-9])", _read("requirements.lock").strip())
        assert len(blocks) == len(locked)
        assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []

    def test_one_version_of_each_package(self, tool):
        names = [canonicalize_name(Requirement(pin).name) for pin in tool.pins(_read("requirements.lock"))]
        assert sorted(names) == sorted(set(names))

    def test_meets_pyproject(self, locked, project):
        asked = project["project"]["dependencies"] + project["build-system"]["requires"]
        asked += [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
        unmet = []
        for requirement in map(Requirement, asked):
            pin = locked.get(canonicalize_name(requirement.name))
            version = next(iter(pin.specifier)).version if pin else None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                unmet.append(f"{requirement} (locked: {version}); run `make lock`")
        assert unmet == []

    def test_a_line_that_is_no_pin_is_refused_with_its_number(self, tool):
        with pytest.raises(ValueError, match="line 2: `numpy>=2` is not a pin"):
            tool.pins("scipy==1.0\nnumpy>=2\n")


class TestEnvironmentYml:
    def test_pip_section_equals_the_lock(self, tool):
        dependencies = yaml.safe_load(_read("environment.yml"))["dependencies"]
        assert dependencies[-1]["pip"] == tool.pins(_read("requirements.lock"))

    def test_is_what_the_tool_writes(self, tool):
        assert _read("environment.yml") == tool.environment(_read("requirements.lock")), "run `make lock`"

    def test_python_is_the_oldest_supported(self, project):
        oldest = project["project"]["requires-python"].removeprefix(">=")
        assert f"python={oldest}" in yaml.safe_load(_read("environment.yml"))["dependencies"]


class TestMetadata:
    def test_one_version_everywhere(self, project):
        version = project["project"]["version"]
        assert yaml.safe_load(_read("CITATION.cff"))["version"] == version
        released = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", _read("CHANGELOG.md"), flags=re.MULTILINE)
        assert released is not None
        assert datetime.date.fromisoformat(released[1]) == yaml.safe_load(_read("CITATION.cff"))["date-released"]

    def test_citation_has_what_the_format_requires(self):
        citation = yaml.safe_load(_read("CITATION.cff"))
        assert {"cff-version", "message", "title", "authors"} <= set(citation)
        assert citation["license"] == "Apache-2.0"

    def test_licence_is_apache_in_full(self):
        assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest().startswith("cfc7749b96f63bd3")


class TestCommands:
    @pytest.mark.parametrize("target", TARGETS)
    def test_make_help_names_the_target(self, target):
        shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"  make {target} " in shown

    @pytest.mark.parametrize("name", [".ci/run", "postBuild"])
    def test_script_can_be_run(self, name):
        assert os.access(ROOT / name, os.X_OK)


class TestBook:
    def test_every_reference_is_cited_and_every_citation_has_one(self):
        entries = set(re.findall(r"^@\w+\{([^,]+),", _read("book/references.bib"), flags=re.MULTILINE))
        pages = [
            p.read_text(encoding="utf-8") for suffix in ("md", "ipynb") for p in (ROOT / "book").glob(f"*.{suffix}")
        ]
        cited = {
            key.strip() for keys in re.findall(r"\{cite:\w+\}`([^`]+)`", "\n".join(pages)) for key in keys.split(",")
        }
        assert cited == entries

    def test_every_page_of_the_toc_exists(self):
        toc = yaml.safe_load(_read("_toc.yml"))
        pages = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
        missing = [
            page for page in pages if not any((ROOT / f"{page}.{suffix}").is_file() for suffix in ("md", "ipynb"))
        ]
        assert missing == []

    def test_mathjax_is_the_published_file(self):
        content = (ROOT / "book/_static/tex-svg-full.js").read_bytes()
        assert hashlib.sha256(content).hexdigest() == MATHJAX_3_2_2_SHA256

    def test_nothing_of_ours_loads_from_another_host(self):
        own = [*(ROOT / "book/_static").glob("*.css"), *(ROOT / "book/_static").glob("*.svg"), ROOT / "_config.yml"]
        loads = re.compile(r"""(?:url\(|@import|src=|href=|_path:|_js:)\s*["']?\s*(?:https?:)?//""")
        assert [path.name for path in own if loads.search(path.read_text(encoding="utf-8"))] == []
