"""The content address of a page moves with everything that can move its numbers, and with nothing else."""

from pathlib import Path

from stepcal.report import fingerprint


def modules(tmp_path: Path, **sources):
    package = tmp_path / "stepcal"
    for name, text in sources.items():
        path = package / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    fingerprint._read.cache_clear()
    return package


def test_the_code_that_is_imported_counts_however_far_down(tmp_path):
    sources = {"a": "from stepcal import b", "b": "X = 1", "c": "X = 1"}
    package = modules(tmp_path, **sources)
    (package / "__init__.py").write_text("")
    before = fingerprint.code_sha256("from stepcal import a", package)
    modules(tmp_path, c="X = 2")
    assert fingerprint.code_sha256("from stepcal import a", package) == before
    modules(tmp_path, b="X = 2")
    assert fingerprint.code_sha256("from stepcal import a", package) != before


def test_a_name_that_cannot_be_followed_stands_for_all(tmp_path):
    package = modules(tmp_path, a="X = 1")
    (package / "__init__.py").write_text("def __getattr__(name): ...")
    before = fingerprint.code_sha256("import stepcal\nstepcal.a", package)
    modules(tmp_path, a="X = 2")
    assert fingerprint.code_sha256("import stepcal\nstepcal.a", package) != before


def test_every_module_that_python_loads_is_found_by_reading():
    """What a fresh interpreter loads for a page's imports is a subset of what the hash covers."""
    import subprocess
    import sys

    code = "from stepcal.studies import registry"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*[m for m in sys.modules if m.split('.')[0] == 'stepcal'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    sources = fingerprint.module_files(Path(fingerprint.__file__).parent.parent)
    assert set(done.stdout.split()) <= fingerprint.modules_of(code, sources)


def test_parameters_and_data_count(tmp_path):
    assert fingerprint.page_key(["x"], {"seed": 0}, "h") != fingerprint.page_key(["x"], {"seed": 1}, "h")
    assert fingerprint.page_key(["x"], {}, "h") != fingerprint.page_key(["y"], {}, "h")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("1")
    before = fingerprint.files_sha256(tmp_path / "d")
    (tmp_path / "d" / "f").write_text("2")
    assert fingerprint.files_sha256(tmp_path / "d") != before
