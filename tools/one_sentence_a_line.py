"""Keep Markdown at one sentence a line, so that a diff shows which sentence changed.

``python tools/one_sentence_a_line.py FILE...`` rewrites the files; with ``--check`` it lists what it would change and exits
with 1. Code, tables, headings, mathematics and raw HTML stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "vs.", "al.", "etc.", "no.", "Fig.", "approx.", "resp.")
"""Words whose full stop ends no sentence."""

_SPAN = re.compile(r"(`+).+?\1|\$[^$]+\$|\]\([^)]*\)|\{[^}]*\}")
"""Parts of a line inside which nothing ends: code, mathematics, targets of links, attributes."""
_END = re.compile(r"[.!?][\"')\]*_]*(?= +[\"'(\[*_`$\\{]*[A-Z0-9`$\[{\\])")
"""A full stop, or its like, before what can start a sentence."""
_ITEM = re.compile(r"(?:[-*+]|\d+[.)]) +(?:\[[ xX]\] +)?")
_FENCE = re.compile(r"(`{3,}|~{3,})(.*)")
_VERBATIM = re.compile(r"\||#|:::|<|!\[|\[\^?[^\]]+\]:|\([^)]*\)=$|\+\+\+|[-=*_]{3,}$|:[a-z_-]+:|%")
"""Starts of lines that are no prose: tables, headings, directives and their options, images, HTML, link targets, rules."""
_PROSE_DIRECTIVES = ("{glossary}", "{note}", "{admonition}", "{tip}", "{warning}")


def sentences(text: str) -> list[str]:
    """Split a paragraph that stands on one line."""
    masked = _SPAN.sub(lambda found: "X" * len(found[0]), text)
    parts, start = [], 0
    for found in _END.finditer(masked):
        words = masked[start : found.end()].split()
        if words and words[-1].lstrip("(").endswith(ABBREVIATIONS):
            continue
        parts.append(text[start : found.end()].strip())
        start = found.end()
    return [*parts, text[start:].strip()]


def rewrite(markdown: str) -> str:
    """Return the same document with one sentence a line."""
    out: list[str] = []
    paragraph: list[str] = []
    first_indent = next_indent = ""

    def flush() -> None:
        nonlocal paragraph
        lead = first_indent
        for sentence in sentences(" ".join(paragraph)) if paragraph else ():
            out.append(f"{lead}{sentence}")
            lead = next_indent
        paragraph = []

    for line, is_prose in _lines(markdown):
        text = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if not is_prose or not text or _VERBATIM.match(text):
            flush()
            out.append(line)
            continue
        item = _ITEM.match(text)
        if item or not paragraph or len(indent) > len(next_indent):
            flush()
            marker = item[0] if item else ""
            first_indent, next_indent = indent + marker, indent + " " * len(marker)
            paragraph = [text[len(marker) :]]
        else:
            paragraph.append(text)
    flush()
    return "\n".join(out) + "\n"


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield each line, and whether it may be prose."""
    fence, directive, in_math, in_front = "", "", False, markdown.startswith("---\n")
    for number, line in enumerate(markdown.splitlines()):
        text = line.strip()
        opened = _FENCE.match(text)
        if in_front:
            in_front = number == 0 or text != "---"
            yield line, False
        elif fence:
            closes = opened is not None and opened[1].startswith(fence) and not opened[2]
            fence = "" if closes else fence
            yield line, False
        elif opened is not None:
            if opened[2].split(" ")[0] in _PROSE_DIRECTIVES:
                directive = opened[1]
            elif directive and opened[1].startswith(directive) and not opened[2]:
                directive = ""
            else:
                fence = opened[1]
            yield line, False
        elif text == "$$" or (text.startswith("$$") != text.endswith("$$")):
            in_math = not in_math
            yield line, False
        else:
            yield line, not (in_math or text.startswith("$$") or line.startswith("    "))


def main() -> int:
    """Rewrite or check the files named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    arguments = parser.parse_args()
    changed = []
    for path in arguments.files:
        before = path.read_text(encoding="utf-8")
        after = rewrite(before)
        if after != before:
            changed.append(path)
            if not arguments.check:
                path.write_text(after, encoding="utf-8")
    for path in changed:
        print(f"{path}: {'has' if arguments.check else 'had'} lines that are not one sentence", file=sys.stderr)
    return 1 if changed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
