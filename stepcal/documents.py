"""Reads JSON and YAML that others wrote: within bounds of size, depth and time, and never with a traceback.

Whatever cannot be read raises one `InputError` that names the file, what is wrong with it, and the way out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from stepcal.errors import InputError

MOST_YAML_BYTES = 1 << 20
"""A settings file is a few KiB; PyYAML reads about 1 MiB a second."""
MOST_YAML_NODES = 200_000
"""Nodes of a YAML file with its aliases written out."""
MOST_YAML_DEPTH = 64

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _YamlLoader(_SafeLoader):  # type: ignore[misc]
    """The safe loader, which also refuses a name that is given twice; YAML itself takes the last one in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"`{twice[0]}` is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_json(path: Path | str, *, what: str = "JSON file") -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : Path or str
    what : str
        What the file should be, for the message.

    Raises
    ------
    InputError
        If it is absent, not UTF-8 text, not JSON, or nested too deeply.
    """
    text = read_text(path, what=what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). The {what} is corrupt or cut short: copy it again."
        ) from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for a {what}. It is corrupt: copy it again.") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise InputError(f"{path} is not a readable {what}: {bounded(str(error))}.") from None


def read_json_object(path: Path | str, *, what: str = "JSON file") -> dict[str, Any]:
    """Read a JSON file that holds one object; see `read_json`."""
    parsed = read_json(path, what=what)
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds a JSON {type(parsed).__name__}; a {what} is an object.")
    return parsed


def read_yaml(path: Path | str, *, what: str = "YAML file") -> dict[str, Any]:
    """Read a YAML file that holds a mapping, with the safe loader.

    Raises
    ------
    InputError
        If it is absent, not UTF-8 text, not YAML, no mapping, or larger or deeper than any settings file.
    """
    path = Path(path)
    text = read_text(path, what=what, most_bytes=MOST_YAML_BYTES)
    try:
        _check_yaml_size(text, path)
        parsed = yaml.load(text, Loader=_YamlLoader)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for a {what}.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as YAML: {bounded(' '.join(str(error).split()))}.") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds a {type(parsed).__name__}; a {what} is a mapping of names to values.")
    return parsed


def read_text(path: Path | str, *, what: str = "file", most_bytes: int | None = None) -> str:
    """Read a UTF-8 file, with or without a byte-order mark.

    Raises
    ------
    InputError
        If it is absent, no plain text, or larger than `most_bytes`.
    """
    path = Path(path)
    try:
        if path.is_char_device():
            raise InputError(f"{path} is a device; give a {what}.")
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; a {what} has at most {most_bytes:,}.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): it is no {what}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be opened: {reason}. Check the path of the {what}.") from None


def bounded(text: str, most: int = 300) -> str:
    """Return `text`, cut to a length that a message can hold."""
    return text if len(text) <= most else f"{text[:most]}..."


def _check_yaml_size(text: str, path: Path) -> None:
    """Refuse a file whose aliases multiply beyond bounds, before any of it is built."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]

    def close(anchor: str | None, size: int) -> None:
        if anchor is not None:
            sizes[anchor] = size
        outer, before = open_nodes.pop()
        if before + size > MOST_YAML_NODES:
            raise InputError(
                f"{path} stands for more than {MOST_YAML_NODES:,} values once its aliases (`*name`) are written out; a "
                "settings file has a few dozen."
            )
        open_nodes.append((outer, before + size))

    for event in yaml.parse(text, Loader=_YamlLoader):
        if isinstance(event, yaml.AliasEvent):
            close(None, sizes.get(str(event.anchor), 1))
        elif isinstance(event, yaml.ScalarEvent):
            close(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MOST_YAML_DEPTH:
                raise InputError(
                    f"{path} is nested more than {MOST_YAML_DEPTH} levels deep; a settings file has a few."
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            close(anchor, size)
