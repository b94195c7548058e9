"""Colours of figures and verdicts stand out from the ground, in light and in dark."""

import re

import pytest

from stepcal.locations import book_folder
from stepcal.report.figures.theme import COLOURS, CSS_NAMES, INK, drawn_twice, panels

STYLE = (book_folder() / "_static" / "stepcal.css").read_text(encoding="utf-8")
GRAPHIC, TEXT = 3.0, 4.5
"""Least contrast of graphics and of text (WCAG 2.2, 1.4.11 and 1.4.3)."""


def variables(selector):
    block = STYLE[STYLE.index(selector) :]
    return dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6})", block[: block.index("}")]))


LIGHT = variables(":root {")
DARK = LIGHT | variables('html[data-theme="dark"] {')


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_of_figures_stand_out_from_the_ground(scheme):
    ground = scheme["--stepcal-ground"]
    for name in [CSS_NAMES[c] for c in COLOURS]:
        assert contrast(scheme[name], ground) >= GRAPHIC, name
    for name in ("--fig-ink", "--fig-faint"):
        assert contrast(scheme[name], ground) >= TEXT, name


def test_the_light_style_sheet_and_the_drawings_have_the_same_colours():
    assert {name: LIGHT[name] for name in CSS_NAMES.values()} == {name: colour for colour, name in CSS_NAMES.items()}
    assert contrast(INK, "#ffffff") > contrast(INK, "#888888") > 1


def test_a_label_that_would_reach_out_of_a_narrow_figure_is_moved_and_broken():
    @drawn_twice
    def draw(narrow):
        figure, (axes,) = panels(narrow, 2.0)
        axes.set_yticks([0.5], ["a name of some length"])
        axes.set(xlabel="what is measured here, in per cent of what was measured elsewhere")
        return figure

    drawn = draw()
    assert drawn.wide.count(">what is measured here, in per cent of what was measured elsewhere<") == 1
    assert "elsewhere<" in drawn.narrow
    assert ">what is measured here, in per cent of what was measured elsewhere<" not in drawn.narrow


def test_numbers_that_are_read_keep_their_digits():
    @drawn_twice
    def draw(narrow):
        figure, (axes,) = panels(narrow, 2.0)
        axes.set(xlim=(0, 1 / 3), xlabel="0.0014 of it")
        return figure

    drawn = draw()
    assert "0.0014 of it" in drawn.wide
    assert "0.0014 of it" in drawn.narrow
    assert not re.search(r' d="[^"]*\d\.\d{3}', drawn.wide)
