"""Ways in which a file goes wrong: bytes that flip or vanish, and values that nobody foresaw."""

from __future__ import annotations

import json
import random
from typing import Any

import yaml

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e30, -1e30, 1e308, 2**31, 2**63, 2**64, 10**30, 10**401),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "NaN", "1e999", "false", "-1", "9" * 40, "\x00", "\ud7ff", "é" * 5, "a" * 5000, "../../etc/passwd"),
    *([], [[]], [None], [0] * 50, ["x"] * 3, {}, {"": None}, {"a": {"b": {"c": 1}}}, [[[[[[1]]]]]]),
    *("*", "re:(a+)+$", "2024-99-99"),
)
"""Values that a field may have and should not."""
STRAY_BYTES = (b"\xef\xbb\xbf", b"\x00", b"\xff", b"[" * 2000, b"{", b"]", b"&a *a", b"\n- ")
STRAY_KEYS = ("", "x", "mamba_d_state", "sliding_window")
MOST_DAMAGES = 4
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def damaged(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """Return a file's content, damaged in one to four places."""
    for _ in range(rng.randint(1, MOST_DAMAGES)):
        by_value = suffix in (".json", ".yaml", ".jsonl", ".csv") and rng.random() < 0.7
        content = _other_value(content, suffix, rng) if by_value else _other_bytes(content, rng)
    return content


def _other_bytes(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    length = min(len(content) - place, rng.choice((1, 1, 2, 8, 64)))
    before, here, after = content[:place], content[place : place + length], content[place + length :]
    flipped = bytes(b ^ (1 << rng.randrange(8)) for b in here[:1]) + here[1:]
    choices = (
        before,  # cut short
        before + after,
        before + here * 3 + after,
        before + rng.randbytes(length) + after,
        before + flipped + after,
        before + rng.choice(STRAY_BYTES) + here + after,
    )
    return rng.choice(choices)


def _other_value(content: bytes, suffix: str, rng: random.Random) -> bytes:
    try:
        text = content.decode()
        if suffix == ".csv":
            return _other_cell(text, rng).encode()
        if suffix == ".jsonl":
            lines = text.splitlines()
            i = rng.randrange(len(lines))
            lines[i] = json.dumps(_mutated(json.loads(lines[i]), rng))
            return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
        if suffix == ".yaml":
            parsed = yaml.load(text, Loader=_Loader)
            return yaml.dump(_mutated(parsed, rng), Dumper=_Dumper, allow_unicode=True).encode("utf-8", "replace")
        return json.dumps(_mutated(json.loads(text), rng)).encode("utf-8", "replace")
    except (ValueError, yaml.YAMLError, RecursionError, IndexError, TypeError):
        return _other_bytes(content, rng)


def _other_cell(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    i = rng.randrange(len(lines))
    cells = lines[i].split(",")
    cells[rng.randrange(len(cells))] = str(rng.choice(HOSTILE))[:200]
    lines[i] = ",".join(cells)
    return "\n".join(lines)


def _mutated(document: Any, rng: random.Random) -> Any:
    """Replace, drop, rename or repeat one thing somewhere in a document."""
    if not document or not isinstance(document, dict | list) or rng.random() < 0.1:
        return rng.choice(HOSTILE)
    kind = rng.random()
    if isinstance(document, list):
        i = rng.randrange(len(document))
        own = [] if kind < 0.1 else [document[i]] * 2 if kind < 0.2 else [_mutated(document[i], rng)]
        return [*document[:i], *own, *document[i + 1 :]]
    key = rng.choice(list(document))
    if kind < 0.1:
        return {k: v for k, v in document.items() if k != key}
    if kind < 0.2:
        return {**document, rng.choice((*STRAY_KEYS, f"{key}s", str(key).upper())): rng.choice(HOSTILE)}
    return {**document, key: _mutated(document[key], rng)}
