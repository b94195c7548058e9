"""The house: the picture in CONTRIBUTING is the contract that the import linter checks."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]


def test_the_picture_in_contributing_is_the_contract() -> None:
    picture = re.search(r"```text\n(cli.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert picture is not None
    lines = [line.split("  ")[0] for line in picture[1].splitlines()]
    drawn = [name for line in lines for name in re.split(r", ", line) if name]
    contract = [name.removeprefix("stepcal.") for layer in LAYERS for name in re.findall(r"[\w.]+", layer)]
    assert drawn == contract


def test_every_room_stands_in_the_contract() -> None:
    contract = {name for layer in LAYERS for name in re.findall(r"stepcal\.(\w+)", layer)}
    rooms = {p.name for p in (ROOT / "stepcal").iterdir() if (p / "__init__.py").is_file()}
    modules = {p.stem for p in (ROOT / "stepcal").glob("*.py")} - {"__init__", "__main__"}
    assert rooms | modules <= contract


LONGEST_FILE, LONGEST_FUNCTION = 450, 60
SOURCES = sorted((ROOT / "stepcal").rglob("*.py"))


def n_lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body; the signature (a command's options) and the docstring are read by themselves."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_and_each_function_is_read_in_one_go(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: n_lines_of_code(f) for f in functions if n_lines_of_code(f) > LONGEST_FUNCTION}
    assert not long, "split what does more than one thing"
