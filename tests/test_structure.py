"""The house: the picture in CONTRIBUTING is the contract that the import linter checks."""

import re
import tomllib
from pathlib import Path

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
