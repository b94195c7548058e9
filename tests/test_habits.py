"""What a project keeps besides code: public CI, hooks, templates. They run what README and Makefile say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from stepcal.cli.main import app
from stepcal.evaluation.preregistration import preregistration_ids

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


@pytest.fixture(scope="module")
def jobs() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_ci_runs_the_two_commands_of_readme(jobs):
    promised = re.findall(r"^\$ (make (?:report|test))\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert promised == ["make report", "make test"]
    assert {name: commands(job) for name, job in jobs.items()} == {"linux": promised, "macos": promised}


def test_ci_covers_each_supported_python(jobs):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert jobs["linux"]["strategy"]["matrix"]["python"] == supported
    assert project["requires-python"] == f">={supported[0]}"


def test_what_was_never_tried_may_fail_alone(jobs):
    assert jobs["macos"]["continue-on-error"] is True
    assert "continue-on-error" not in jobs["linux"]
    assert "Not tried by us" in (ROOT / ".github/workflows/test.yml").read_text()


def test_hooks_run_the_static_checks_of_make_test():
    recipe = re.search(r"^test:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None
    tools = {Path(line.split()[0]).name for line in recipe[1].splitlines()} - {"python"}
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split() for repo in repos for hook in repo["hooks"]]
    assert tools == {"ruff", "mypy", "lint-imports"}
    assert tools <= {Path(entry[0]).name for entry in entries}
    scripts = [word for entry in entries for word in entry if word.endswith(".py")]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("form", [f for f in FORMS if f.stem != "config"], ids=lambda f: f.stem)
def test_issue_forms_ask_for_something(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_first_files_to_read_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Start with these three files")[1].split("\n## ")[0]
    files = re.findall(r"^\d\. `([^`]+)`", section, flags=re.MULTILINE)
    assert len(files) == 3
    assert all((ROOT / file).is_file() for file in files)


class TestEvaluatorsPage:
    PAGE = (ROOT / "book/for_evaluators.md").read_text(encoding="utf-8")

    def test_every_command_exists_with_its_options(self):
        group = typer.main.get_command(app)
        found = re.findall(r"(?:\$ |`)stepcal ([^`\n]+)", self.PAGE)
        assert len(found) >= 10
        for text in found:
            name, *words = text.split("#")[0].split()
            command = group.commands[name]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, text

    def test_every_hypothesis_and_page_exists(self):
        named = set(re.findall(r"stepcal verdict (\w+)", self.PAGE))
        assert named <= set(preregistration_ids())
        pages = re.findall(r"\]\((\w+\.(?:ipynb|md))\)", self.PAGE)
        assert [page for page in pages if not (ROOT / "book" / page).is_file()] == []

    def test_every_script_exists(self):
        scripts = re.findall(r"python (benchmarks/\w+\.py)|pytest ([\w/ ]+)", self.PAGE)
        assert all((ROOT / path).exists() for pair in scripts for text in pair for path in text.split())
