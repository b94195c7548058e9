"""Every page of the built book in a real browser: wide and narrow, light and dark, and what axe finds.

Needs the built book (`make report`), Chromium (`apt-get install chromium`), and the packages `playwright` and
`axe-playwright-python`; what is missing is named where the tests are skipped.
"""

import importlib.util
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from book_browser import served

from stepcal.locations import shipped_folder
from stepcal.report.printing import browser as installed_browser

BOOK = Path(shipped_folder()) / "_build" / "html"
PAGES = sorted(p.stem for p in (BOOK / "book").glob("*.html")) or ["none"]
VIEWS = [(1280, "light"), (390, "dark")]
"""Width in pixels and colour scheme: each page is seen at both widths, and in both schemes."""
OTHER_VIEWS = [(1280, "dark"), (390, "light")]
"""The other two, in which only what depends on both is looked at, on pages that have every kind of thing between them."""
MIXED_PAGES = [p for p in ("summary", "h1", "verdict", "silicon", "try_it", "own_errors") if p in PAGES]
AXE_RULES = {"label-content-name-mismatch": {"enabled": True}}
"""Experimental rules of axe that count here too."""

pytestmark = [
    pytest.mark.skipif(not BOOK.is_dir(), reason="the book has not been built here (make report)"),
    pytest.mark.skipif(installed_browser() is None, reason="no Chromium is installed (apt-get install chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None or importlib.util.find_spec("axe_playwright_python") is None,
        reason="playwright and axe-playwright-python are not installed (pip install stepcal[test])",
    ),
]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def base():
    with served(BOOK) as address:
        yield address


@pytest.fixture(scope="module")
def axe():
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def opened(chromium, base, name, width, scheme, javascript=True):
    """Open a page and collect what it complains of and what it asks for."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.complaints, page.elsewhere = [], []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on("requestfailed", lambda r: page.complaints.append(f"failed: {r.url}"))
    page.on("response", lambda r: page.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: None if r.url.startswith((base, "data:")) else page.elsewhere.append(r.url))
    page.goto(f"{base}/book/{name}.html", wait_until="load")
    page.wait_for_function(
        "!window.MathJax || !MathJax.startup || !MathJax.startup.promise || MathJax.startup.promise.then(() => true)"
    )
    return page


@pytest.mark.parametrize(("width", "scheme"), OTHER_VIEWS)
@pytest.mark.parametrize("name", MIXED_PAGES)
def test_colours_and_width_in_the_other_two_views(chromium, base, axe, name, width, scheme):
    page = opened(chromium, base, name, width, scheme)
    assert page.complaints == []
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    seen = page.evaluate(
        "[...document.querySelectorAll('article figure.stepcal-figure')]"
        ".map(f => [...f.querySelectorAll('.fig-wide, .fig-narrow')].filter(d => d.offsetParent).map(d => d.className))"
    )
    assert all(drawings == ["fig-narrow" if width < 600 else "fig-wide"] for drawings in seen)
    page.add_script_tag(content=axe)
    found = page.evaluate("axe.run(document, {runOnly: ['color-contrast'], resultTypes: ['violations']})")
    assert [(n["html"][:200], n["failureSummary"]) for v in found["violations"] for n in v["nodes"]] == []
    page.context.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", PAGES)
def test_page(chromium, base, axe, name, width, scheme):
    page = opened(chromium, base, name, width, scheme)
    assert page.complaints == []
    assert page.elsewhere == []
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    text = page.inner_text("article")
    assert not re.search(r"glue:|\\frac|\\mathrm|\{term\}|\{ref\}", text)
    wrong = page.evaluate(
        """() => {
          const found = [];
          for (const f of document.querySelectorAll('article figure.stepcal-figure')) {
            const drawing = f.querySelector('[role]');
            if (!drawing || (drawing.getAttribute('aria-label') || '').length < 30) found.push('no alternative text');
            const caption = f.querySelector('figcaption');
            if (!caption || caption.innerText.length < 15) found.push('no caption');
            for (const drawn of f.querySelectorAll('.fig-wide, .fig-narrow')) {
              const frame = drawn.getBoundingClientRect();
              for (const t of frame.width ? drawn.querySelectorAll('svg text') : []) {
                const box = t.getBoundingClientRect();
                if (box.width && (box.left < frame.left - 4 || box.right > frame.right + 4)) {
                  found.push('reaches out of its figure: ' + t.textContent);
                }
              }
            }
          }
          for (const i of document.querySelectorAll('article img')) if (!i.alt) found.push('image without alt: ' + i.src);
          for (const i of document.querySelectorAll('article .cell_output img')) found.push('bitmap: ' + i.src);
          for (const n of document.querySelectorAll('td.number')) {
            const range = document.createRange();
            range.selectNodeContents(n);
            const tops = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
            if (tops.size > 1) found.push('a number breaks: ' + n.innerText);
          }
          for (const c of document.querySelectorAll('article td, article th')) {
            if (/`/.test(c.innerText)) found.push('backticks: ' + c.innerText);
          }
          return found;
        }"""
    )
    assert wrong == []
    page.add_script_tag(content=axe)
    result = page.evaluate(
        f"axe.run(document, {{resultTypes: ['violations'], rules: {str(AXE_RULES).replace('True', 'true')}}})"
    )
    serious = [
        (v["id"], v["nodes"][0]["html"][:200], len(v["nodes"]))
        for v in result["violations"]
        if v["impact"] in {"serious", "critical"}
    ]
    assert serious == []
    page.context.close()


def test_links_and_anchors_lead_somewhere():
    targets = {}
    for path in (BOOK / "book").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        targets[path.name] = (set(re.findall(r'\bid="([^"]+)"', text)), text)
    dead = []
    for name, (_, text) in targets.items():
        for link in re.findall(r'<a[^>]+href="([^"]+)"', text):
            if re.match(r"https?:|mailto:|data:", link):
                continue
            path, _, anchor = link.partition("#")
            file = (BOOK / "book" / path).resolve() if path else BOOK / "book" / name
            known = targets.get(file.name) if file.parent == BOOK / "book" else None
            if not file.exists() or (anchor and known and anchor not in known[0]):
                dead.append((name, link))
    assert dead == []


def test_a_mark_names_its_run_to_pointer_and_keyboard(chromium, base):
    page = opened(chromium, base, "summary", 1280, "light")
    mark = page.locator(".fig-wide .tip").first
    mark.hover()
    tip = page.locator(".fig-tip")
    assert tip.inner_text() == mark.get_attribute("aria-label")
    assert "%" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not page.evaluate("document.querySelector('.fig-tip').classList.contains('shown')")
    mark.focus()
    page.keyboard.press("Tab")
    second = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert second != mark.get_attribute("aria-label")
    assert tip.inner_text() == second


def test_the_first_screen(chromium, base):
    """Question, badges and figure lie above the fold, without code and without a hash."""
    page = opened(chromium, base, "summary", 1280, "light")
    for selector in ("h1", ".badges", ".stepcal-figure"):
        assert page.locator(f"article {selector}").first.bounding_box()["y"] < 800, selector
    seen = page.evaluate(
        "[...document.querySelectorAll('article *')]"
        ".filter(e => e.children.length == 0 && e.getBoundingClientRect().top < 800)"
        ".map(e => e.textContent).join(' ')"
    )
    assert not re.search(r"\b[0-9a-f]{10,}\b", seen)
    assert "Show source" not in seen
    words = page.evaluate(
        "[...document.querySelectorAll('article p, article li:not(:has(p)), article h1, article h2, article figcaption')]"
        ".filter(e => !e.closest('#re-run-this-page')).map(e => e.innerText).join(' ').trim().split(/\\s+/).length"
    )
    assert words / 230 < 2, f"{words} words take more than two minutes at 230 a minute"


def test_the_foot_says_what_a_page_was_built_from(chromium, base):
    page = opened(chromium, base, "h1", 1280, "light")
    foot = page.inner_text(".stepcal-foot")
    assert re.search(r"stepcal [\d.]+", foot)
    assert re.search(r"executed on \d{4}-\d\d-\d\d", foot)
    assert re.search(r"data [0-9a-f]{12}", foot)
    assert "parameters: " in foot
    assert "numpy " in foot


def test_downloads_are_there_and_name_no_folder_of_a_machine():
    import json

    for path in (BOOK / "_sources" / "book").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        assert "glue:text" not in text, path.name
        assert str(shipped_folder()) not in text, path.name


def test_the_whole_book_is_one_page_to_print(chromium, base, tmp_path):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{base}/print.html")
    assert page.locator("section.printed-page").count() == len(PAGES)
    anchors = page.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
        ".filter(h => h && !document.getElementById(h))"
    )
    assert anchors == []
    assert shutil.which("chromium") is None or page.pdf(path=str(tmp_path / "book.pdf"))[:4] == b"%PDF"


def test_try_it_equals_the_python_model_to_a_billionth(chromium, base):
    import random

    from stepcal.report.try_it import SAMPLINGS, deployments
    from stepcal.step_time.coefficients import load_coefficients

    page = opened(chromium, base, "try_it", 1280, "light")
    model, chosen = load_coefficients("default"), random.Random(0)
    known = {f"{d.architecture.name}|{d.accelerator.name}|{d.tensor_parallel}": d for d in deployments()}
    assert set(page.evaluate("Object.keys(stepcal.data.deployments)")) == set(known)
    for key in chosen.sample(sorted(known), 12):
        kind, batch, context = chosen.choice(list(SAMPLINGS)), chosen.randint(1, 128), chosen.randint(1, 8000)
        there = page.evaluate(
            "([k, s, b, c]) => stepcal.step(stepcal.data.deployments[k], s, b, c, stepcal.data.relative)",
            [key, kind, batch, context],
        )
        here = model.predict_us(replace(known[key], sampling=SAMPLINGS[kind]), decode_kv_lens=[context] * batch)
        assert there["step_us"] == pytest.approx(here, rel=1e-9)
        assert there["floor_us"] < there["step_us"]
        assert there["low_us"] <= there["step_us"] <= there["high_us"]


def test_try_it_responds_to_the_keyboard_and_refuses_what_cannot_be(chromium, base):
    page = opened(chromium, base, "try_it", 390, "dark")
    before = page.inner_text(".try-step")
    page.focus("#try-batch")
    page.keyboard.press("ArrowUp")
    assert page.inner_text(".try-step") != before
    page.fill("#try-batch", "500")
    assert "from 1 to 128" in page.inner_text("#try-result")
    page.fill("#try-batch", "64")
    page.select_option("#try-gpu", "a100-80gb")
    assert "Extrapolated" in page.inner_text("#try-result")
