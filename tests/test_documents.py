"""JSON and YAML of others are read within bounds, and what cannot be read has one short message."""

import json
import time
from pathlib import Path

import pytest
import yaml

from stepcal.documents import read_json, read_json_object, read_yaml
from stepcal.errors import InputError, shown

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(LAUGHS, "more than 200,000 values once its aliases", id="alias bomb"),
        pytest.param(MERGES, "more than 200,000 values once its aliases", id="merge bomb"),
        pytest.param("[" * 100_000, "nested more than 64 levels deep", id="flow"),
        pytest.param("- " * 100_000 + "x", "nested more than 64 levels deep", id="block"),
        pytest.param("a: " + "9" * 5_000, "cannot be read as YAML: Exceeds the limit", id="long number"),
        pytest.param("a: [1", "cannot be read as YAML", id="cut short"),
        pytest.param("a: 2024-99-99", "cannot be read as YAML", id="no date"),
        pytest.param("? [a]\n: 1", "cannot be read as YAML", id="no key"),
        pytest.param("a: &x 1\nb: *y", "cannot be read as YAML", id="no anchor"),
        pytest.param("a: !!python/object:os.system {}", "cannot be read as YAML", id="an object"),
        pytest.param("- 1", "holds a list; a settings file is a mapping", id="list"),
        pytest.param("", "holds a NoneType", id="empty"),
        pytest.param("#" * (1 << 21), "a settings file has at most 1,048,576", id="large"),
        pytest.param("a: \x00", "cannot be read as YAML", id="null byte"),
    ],
)
def test_a_yaml_file_out_of_bounds_is_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        read_yaml(path, what="settings file")
    assert time.perf_counter() - started < 2.0
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_aliases_within_bounds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    one = {"rate": 1}
    path.write_text("\ufeff" + yaml.safe_dump({"stages": [one, one]}))
    assert "*id" in path.read_text()
    assert read_yaml(path) == {"stages": [{"rate": 1}, {"rate": 1}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1: not JSON"),
        (b'{"a": 1}\n}', "line 2: not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"9" * 5_000, "Exceeds the limit"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_a_json_file_that_is_none_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(InputError):
            read_json(path)
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="holds a JSON list; a JSON file is an object"):
        read_json_object(tmp_path / "list.json")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [[0] * 1000] * 1000, {i: i for i in range(1000)}, 10**5000],
    ids=["text", "list", "dict", "number"],
)
def test_what_an_error_shows_is_short(value: object) -> None:
    assert len(shown(value)) < 300
