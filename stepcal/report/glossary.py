"""Links the first mention of each glossary term on a page, so that authors need not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PROTECTED = re.compile(
    r"^```.*?^```|^:::.*?^:::|^\$\$.*?^\$\$|^[|#>(].*?$|^ {4,}.*?$"  # blocks, tables, headings
    r"|\{[a-z:]+\}`[^`]*`|`[^`]+`|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|\[[^\]]*\]\{[^}]*\}|<[^>]+>|\*\*[^*]+\*\*",
    re.DOTALL | re.MULTILINE,
)
"""Text in which nothing is linked: code, mathematics, roles, links, headings, tables, what is bold."""


def read_terms(glossary: Path) -> list[str]:
    """Return the terms of the book's glossary, longest first."""
    if not glossary.is_file():
        return []
    text = glossary.read_text(encoding="utf-8")
    inside = re.search(r"```\{glossary\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = inside.group(1).splitlines() if inside else []
    return sorted((line.strip() for line in lines if line and not line.startswith(" ")), key=lambda t: (-len(t), t))


def link_terms(cells: Sequence[Mapping[str, Any]], terms: Iterable[str]) -> list[dict[str, Any]]:
    """Return a notebook's cells with the first mention of each term in prose linked to the glossary."""
    left = list(terms)
    linked = []
    for cell in cells:
        if cell["cell_type"] != "markdown":
            linked.append(dict(cell))
            continue
        text = "".join(cell["source"])
        linked.append({**cell, "source": _linked(text, left)})
    return linked


def _linked(text: str, left: list[str]) -> str:
    pieces, at = [], 0
    for match in _PROTECTED.finditer(text):
        pieces += [_first_mentions(text[at : match.start()], left), match.group(0)]
        at = match.end()
    return "".join([*pieces, _first_mentions(text[at:], left)])


def _first_mentions(text: str, left: list[str]) -> str:
    """Link terms that are still to be linked; a term that was is taken off the list."""
    for term in list(left):
        # What is written in capitals is a name; other terms may start a sentence.
        pattern = re.compile(rf"(?<![\w-]){re.escape(term)}(?![\w-])", 0 if term.isupper() else re.IGNORECASE)
        spans = [m.span() for m in re.finditer(r"\{term\}`[^`]*`", text)]
        for match in pattern.finditer(text):
            if any(start <= match.start() < end for start, end in spans):
                continue
            shown = match.group(0)
            role = f"{{term}}`{shown}`" if shown == term else f"{{term}}`{shown} <{term}>`"
            text = text[: match.start()] + role + text[match.end() :]
            left.remove(term)
            break
    return text
