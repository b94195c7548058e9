"""The book's sources: notebooks that can be re-run with other parameters, hold no logic and no outputs."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from stepcal.locations import book_folder, shipped_folder

NOTEBOOKS = sorted(book_folder().glob("*.ipynb"))


def cells(notebook, kind):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
class TestNotebook:
    def test_has_no_outputs(self, notebook):
        assert all(not c["outputs"] and c["execution_count"] is None for c in cells(notebook, "code"))

    def test_has_one_parameters_cell_first(self, notebook):
        tagged = [i for i, c in enumerate(cells(notebook, "code")) if "parameters" in c["metadata"].get("tags", [])]
        assert tagged == [0]
        assert "source" in source(cells(notebook, "code")[0])

    def test_hides_its_code_by_default(self, notebook):
        assert all({"hide-input", "remove-input"} & set(c["metadata"].get("tags", [])) for c in cells(notebook, "code"))

    def test_defines_no_functions(self, notebook):
        for cell in cells(notebook, "code"):
            for node in ast.walk(ast.parse(source(cell))):
                assert not isinstance(node, ast.FunctionDef | ast.ClassDef), source(cell)

    def test_ends_with_what_would_change_our_mind(self, notebook):
        last = source(cells(notebook, "markdown")[-1])
        assert "## What would change our mind" in last

    def test_prose_types_no_measured_percentage(self, notebook):
        """A percentage in prose is glued from a computation; thresholds and splits are the only ones typed."""
        typed_by_rule = {"60", "20", "80", "10", "5", "15", "95", "100", "3.7"}
        for cell in cells(notebook, "markdown"):
            text = re.sub(r"\{glue:text\}`[^`]*`", "", source(cell))
            for number in re.findall(r"(\d+(?:\.\d+)?)\s?%", text):
                assert number in typed_by_rule, f"{notebook.name}: {number}% is typed, not computed"


def test_every_page_is_in_the_table_of_contents_and_exists():
    toc = yaml.safe_load((shipped_folder() / "_toc.yml").read_text())
    files = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    pages = {f"book/{p.stem}" for p in book_folder().iterdir() if p.suffix in {".md", ".ipynb"}}
    assert set(files) == pages
    assert len(files) == len(set(files))


def test_glued_names_are_defined_on_their_page():
    for notebook in NOTEBOOKS:
        code = "\n".join(source(c) for c in cells(notebook, "code"))
        # What a page does not compute in its cells it has from a study's functions, named in its imports.
        for package, name in re.findall(r"^from (stepcal\.studies(?:\.pages)?) import (\w+)", code, flags=re.MULTILINE):
            module = importlib.util.find_spec(f"{package}.{name}")
            code += Path(module.origin).read_text() if module and module.origin else ""
        # Names such as f"mape_{variant}": a literal part and a filled one.
        composed = [re.sub(r"\{.*?\}", r"\\w+", c) for c in re.findall(r'f"(\w*\{[\w.]+\}\w*)"', code)]
        for cell in cells(notebook, "markdown"):
            for name in re.findall(r"\{glue:text\}`(\w+)", source(cell)):
                assert f'"{name}"' in code or any(re.fullmatch(c, name) for c in composed), (
                    f"{notebook.name}: `{name}` is cited and never glued"
                )


def test_no_number_is_glued_inside_a_formula():
    """MyST renders a role inside mathematics as text, and no warning says so."""
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "markdown"):
            formulas = re.findall(r"\$\$.*?\$\$|\$[^$\n]*?glue:[^$]*?\$", source(cell), flags=re.DOTALL)
            assert not [f for f in formulas if "glue:" in f], notebook.name


HIDDEN = re.compile(r'<(script|style|pre|code|title|svg)\b.*?</\1>|<(span|div) class="math.*?</\2>', re.DOTALL)
RAW = re.compile(r"\{?glue:[^<]{0,60}|\$[^$<]{1,60}\$|\\(?:frac|mathrm|text)\{")


def test_no_rendered_page_shows_a_role_or_tex():
    for page in rendered_pages():
        found = RAW.search(HIDDEN.sub("", page.read_text(encoding="utf-8")))
        assert not found, f"{page.name}: {found.group(0) if found else ''}"


def rendered_pages():
    folder = Path(shipped_folder() / "_build" / "html" / "book")
    if not folder.is_dir():
        pytest.skip("the book has not been built here (make report)")
    return sorted(folder.glob("*.html"))


def test_no_page_loads_anything_from_elsewhere():
    pages = Path(shipped_folder() / "_build" / "html")
    if not pages.is_dir():
        pytest.skip("the book has not been built here (make report)")
    loads = re.compile(
        r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?:)?//[^\"]+\.(?:js|css|woff2?|png|svg)", re.IGNORECASE
    )
    for page in pages.rglob("*.html"):
        found = loads.search(page.read_text(encoding="utf-8"))
        assert not found, f"{page.name}: {found.group(0) if found else ''}"
