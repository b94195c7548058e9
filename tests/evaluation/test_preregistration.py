import dataclasses
import hashlib
import json
import shutil

import pytest
import yaml

from stepcal.errors import InputError
from stepcal.evaluation.preregistration import frozen_digests, load_preregistration, preregistration_ids
from stepcal.locations import book_folder

FOLDER = book_folder() / "preregistrations"


@pytest.fixture
def copy(tmp_path):
    """The pre-registrations in a folder that may be tampered with."""
    return shutil.copytree(FOLDER, tmp_path / "preregistrations")


def freeze(folder, name, content):
    """Write a file together with its digest, as freezing does."""
    (folder / name).write_text(content, encoding="utf-8")
    frozen = json.loads((folder / "frozen.json").read_text(encoding="utf-8"))
    frozen[name] = {"frozen": "2026-11-24", "sha256": hashlib.sha256(content.encode()).hexdigest()}
    (folder / "frozen.json").write_text(json.dumps(frozen), encoding="utf-8")


def changed(folder, name, change):
    """Freeze a file anew after `change` was applied to its parsed content."""
    parsed = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
    change(parsed)
    freeze(folder, name, yaml.safe_dump(parsed))


@pytest.mark.parametrize("hypothesis", preregistration_ids())
def test_every_preregistration_validates_and_is_what_was_frozen(hypothesis):
    loaded = load_preregistration(hypothesis)
    path = FOLDER / f"{hypothesis}.yaml"
    assert loaded.id == hypothesis
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.sha256 == frozen_digests()[path.name]
    assert loaded.frozen == json.loads((FOLDER / "frozen.json").read_text(encoding="utf-8"))[path.name]["frozen"]
    for criterion in (*loaded.success, *loaded.refuted_if, *loaded.choices):
        assert (criterion.at_least is None) != (criterion.at_most is None) or criterion.aggregate != "count"


def test_nothing_is_frozen_that_is_not_there():
    assert {f"{hypothesis}.yaml" for hypothesis in preregistration_ids()} == set(frozen_digests())


def test_the_studys_thresholds_are_in_h2():
    h2 = load_preregistration("H2")
    assert (h2.date, h2.status, h2.type["number"]) == ("2026-02-26", "confirmatory", 2)
    e2e, mspe = h2.success
    assert (e2e.operator, e2e.threshold, e2e.at_least, e2e.of) == ("<", 10, 12, 16)
    assert (mspe.aggregate, mspe.operator, mspe.threshold) == ("absolute_mean", "<", 5)
    above, biased = h2.refuted_if
    assert (above.operator, above.threshold, above.at_least) == (">", 10, 5)
    assert (biased.aggregate, biased.operator, biased.threshold) == ("absolute_mean", ">", 10)
    assert h2.choices[0].threshold == 2


def test_the_studys_thresholds_are_in_h1():
    h1 = load_preregistration("h1")
    assert (h1.success[0].operator, h1.success[0].threshold, h1.success[0].at_least, h1.success[0].of) == (
        ">",
        0.8,
        2,
        4,
    )
    assert (h1.refuted_if[0].operator, h1.refuted_if[0].threshold, h1.refuted_if[0].at_most) == (">", 0.6, 0)


def test_what_was_written_with_the_results_known_is_post_hoc():
    assert load_preregistration("h2_step").status == "post hoc"


def test_either_case_names_the_same_file(copy):
    assert load_preregistration("H1", copy) == load_preregistration("h1", copy) == load_preregistration("h1")


@pytest.mark.parametrize("name", ["h1.yaml", "h2.yaml", "h2_step.yaml"])
def test_any_changed_byte_is_refused(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        edited = content.copy()
        edited[position] ^= 1
        path.write_bytes(edited)
        with pytest.raises(InputError, match=r"changed after it was frozen: SHA-256 is [0-9a-f]{64}, frozen was"):
            load_preregistration(path.stem, copy)
    path.write_bytes(content + b"\n")
    with pytest.raises(InputError, match="changed after it was frozen"):
        load_preregistration(path.stem, copy)
    path.write_bytes(content)
    assert load_preregistration(path.stem, copy).id == path.stem


def test_a_lowered_threshold_is_refused(copy):
    path = copy / "h2.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("at_least: 12", "at_least: 2"), encoding="utf-8")
    with pytest.raises(InputError, match="register the new rules under a new name"):
        load_preregistration("h2", copy)


def test_a_file_that_was_never_frozen_is_refused(copy):
    shutil.copy(copy / "h1.yaml", copy / "h99.yaml")
    with pytest.raises(InputError, match=r"h99\.yaml was never frozen"):
        load_preregistration("h99", copy)


def test_without_a_record_nothing_is_frozen(copy):
    (copy / "frozen.json").unlink()
    with pytest.raises(InputError, match="was never frozen"):
        load_preregistration("h1", copy)


def test_an_unknown_hypothesis_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"Unknown hypothesis `h99`\. Pre-registered: h1, h1b, h2, h2_step, h2b, h3"):
        load_preregistration("h99")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda p: p.pop("statement"), r"\$`.*must contain .'statement'"),
        (lambda p: p.update(extra=1), r"\$`.*'extra'"),
        (lambda p: p.update(status="exploratory"), r"\$\.status`"),
        (lambda p: p.update(date="February"), r"\$\.date`"),
        (lambda p: p.update(success=[]), r"\$\.success`"),
        (lambda p: p["success"][0].update(operator="=="), r"\$\.success\[0\]\.operator`"),
        (lambda p: p["refuted_if"][0].update(of=0), r"\$\.refuted_if\[0\]\.of`"),
        (lambda p: p["success"][0].pop("at_least"), r"\$\.success\[0\]`"),
        (lambda p: p["success"][0].update(at_most=3), r"\$\.success\[0\]`"),
    ],
)
def test_a_breach_of_the_schema_names_its_place(copy, change, path):
    changed(copy, "h1.yaml", change)
    with pytest.raises(InputError, match=rf"h1\.yaml breaks the schema at `{path}"):
        load_preregistration("h1", copy)


def test_a_file_that_is_no_yaml_is_refused(copy):
    freeze(copy, "h1.yaml", "id: [unclosed")
    with pytest.raises(InputError, match=r"h1\.yaml is not YAML"):
        load_preregistration("h1", copy)


def test_what_was_loaded_cannot_be_changed():
    loaded = load_preregistration("h1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.success[0].threshold = 0.1
