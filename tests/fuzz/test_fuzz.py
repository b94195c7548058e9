"""No reader fails in a way that nobody foresaw: a short run of what `make fuzz` does at length."""

import json
import random
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.campaign import TOO_SLOW_S, one_input, outcome_of
from fuzz.readers import Reader, readers

READERS = readers()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_good_files_are_read(reader: Reader, tmp_path: Path) -> None:
    for number, content in enumerate(reader.seeds):
        path = tmp_path / str(number) / reader.file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        reader.read(path)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_read_or_refused(reader: Reader, seed: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, seconds, _ = one_input(reader, random.Random(seed), tmp_path)
    assert outcome in ("read", "refused")
    assert seconds < TOO_SLOW_S


@pytest.mark.parametrize(
    "name", ["architecture", "coefficients", "summary", "requests of inference-perf", "trace, JSON lines"]
)
@given(document=JSON_VALUES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused(name: str, document: object, tmp_path: Path) -> None:
    (reader,) = (r for r in READERS if r.name == name)
    path = tmp_path / reader.file
    path.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
    assert outcome_of(reader, path) in ("read", "refused")
