"""The look of every figure: vector, transparent, in the page's own colours in light and dark, at two widths.

Matplotlib draws with the colours below; in the SVG each becomes a CSS variable of the same name, so the page's theme
decides. A figure is drawn twice, for wide and for narrow screens, and the style sheet shows one of the two.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

P = ParamSpec("P")

INK, FAINT, RULE = "#1f2329", "#6b7280", "#d5d9df"
"""Text and axes; reference lines and notes; the grid."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0619a", "#a07800", "#3a8fb7", "#8a5a3c")
"""Okabe and Ito's colours for the colour-blind, the light ones darkened to 3:1 on white."""
CSS_NAMES = {INK: "--fig-ink", FAINT: "--fig-faint", RULE: "--fig-rule"} | {
    colour: f"--fig-{i + 1}" for i, colour in enumerate(COLOURS)
}
WIDE_IN, NARROW_IN = 7.2, 3.75
"""Widths (inches): the text column at 1280 px, and a phone of 390 px, each at its size in print."""
FONT_PT = 9.5


@dataclass(frozen=True)
class Drawn:
    """A figure at both widths, as SVG; a notebook shows it as it is."""

    wide: str
    narrow: str

    def html(self, caption: str, alt: str, *, label: str = "") -> str:
        """Return the figure with its caption; `alt` says what is seen, to those who do not see it."""
        name = f' data-figure="{html.escape(label)}"' if label else ""
        # An image may hold nothing that takes the focus; a figure whose marks do is a group of images.
        role = "group" if 'class="tip"' in self.wide else "img"
        return (
            f'<figure class="stepcal-figure"{name}>'
            f'<div class="fig-wide" role="{role}" aria-label="{html.escape(alt)}">{self.wide}</div>'
            f'<div class="fig-narrow" role="{role}" aria-label="{html.escape(alt)}">{self.narrow}</div>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )


def use_style() -> None:
    """Set the look of all figures."""
    mpl.use("svg")
    plt.rcParams.update(mpl.rcParamsDefault)
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "font.family": "sans-serif",
            "font.size": FONT_PT,
            "axes.titlesize": FONT_PT,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": FONT_PT,
            "xtick.labelsize": FONT_PT - 0.5,
            "ytick.labelsize": FONT_PT - 0.5,
            "legend.fontsize": FONT_PT - 0.5,
            "legend.frameon": False,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.edgecolor": FAINT,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": RULE,
            "grid.linewidth": 0.7,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=COLOURS),
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "svg.fonttype": "none",
            "svg.hashsalt": "stepcal",
        }
    )


def drawn_twice(draw: Callable[Concatenate[bool, P], Figure]) -> Callable[P, Drawn]:
    """Make a function that draws for one width (its first argument says whether narrow) draw for both."""

    @wraps(draw)
    def both(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        use_style()
        return Drawn(*(to_svg(keep_labels_inside(draw(narrow, *args, **kwargs))) for narrow in (False, True)))

    return both


def keep_labels_inside(figure: Figure) -> Figure:
    """Move the label of an axis that reaches beyond the figure to the axis' end, in two lines where one is too long."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        label = axes.xaxis.label
        box = label.get_window_extent()
        if box.x0 < 0 or box.x1 > figure.bbox.x1:
            if box.width > axes.bbox.x1:
                label.set_text(in_two_lines(label.get_text()))
            axes.set_xlabel(label.get_text(), loc="right")
    return figure


def in_two_lines(text: str) -> str:
    """Break a text at the space next to its middle.

    Examples
    --------
    >>> in_two_lines("measured time of a step").splitlines()
    ['measured time', 'of a step']
    """
    spaces = [i for i, c in enumerate(text) if c == " "]
    if not spaces:
        return text
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def panels(
    narrow: bool, height: float, *, across: int = 1, down: int = 1, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels in reading order; on narrow screens they stand below each other.

    Parameters
    ----------
    narrow : bool
    height : float
        Of a row of panels (inches).
    across, down : int
        Panels in a row and in a column of the wide figure.
    share_x, share_y : bool
    """
    rows, columns = (across * down, 1) if narrow else (down, across)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(NARROW_IN if narrow else WIDE_IN, height * rows),
        sharex=share_x,
        sharey=share_y,
        squeeze=False,
    )
    return figure, list(axes.flat)


def legend_above(axes: Axes, *, columns: int = 3) -> None:
    """Put the legend over the panel, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.4)


def categories(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a panel, the first on top."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def figure_legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Put one legend for all panels over them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, handlelength=1.4)


def plain_logarithm(axes: Axes) -> None:
    """Write the numbers of a logarithmic axis as they are read."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_formatter(FuncFormatter(lambda x, _: ""))


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG for a page: no size of its own, colours by name, and identifiers that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"([^>]*?)width="[\d.]+pt"', r"<svg \1\2", text)
    text = re.sub(r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"\1", text)
    for colour, name in CSS_NAMES.items():
        text = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var({name}, {colour})", text, flags=re.IGNORECASE)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    # Coordinates need two digits after the point; what is written in the figure keeps its own.
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group(0)), text)
    text = re.sub(r'id="tip:([^"]*)"', r'class="tip" tabindex="0" role="img" aria-label="\1"', text)
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'((?:xlink:)?href=")#', rf"\1#{prefix}-", text)
    return re.sub(r"url\(#", f"url(#{prefix}-", text).strip()
