"""Values of a ``config.json`` by key, each checked for its kind and its bounds, and a record of which keys were read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stepcal.errors import InputError, shown

SECTIONS = ("attn_config", "ffn_config")
"""Sections in which MPT and DBRX keep dimensions; their keys are known with a dot."""
_MOST_NUMBER = 1e18


class ConfigValues:
    """A parsed ``config.json``: whatever is asked for is checked, and remembered as understood.

    Parameters
    ----------
    content : mapping
    origin : str
        What errors call the file.
    defaults : mapping
        Values of keys that are absent.
    silent : collection of str
        Keys that need not be understood.
    """

    def __init__(
        self, content: Mapping[str, Any], origin: str, defaults: Mapping[str, Any], *, silent: Collection[str] = ()
    ) -> None:
        self.origin = origin
        self._content = dict(content)
        for section in SECTIONS:
            if isinstance(content.get(section), Mapping):
                self._content |= {f"{section}.{key}": item for key, item in content[section].items()}
        self._defaults = defaults
        self._silent = silent
        self._read: set[str] = set()

    def raw(self, key: str) -> Any:
        """Return a value as it stands, the type's default where it is absent."""
        self._read.add(key)
        return self._content[key] if key in self._content else self._defaults.get(key)

    def is_neutral(self, key: str) -> bool:
        """Whether a key is absent, null, false, zero or empty."""
        value = self._content.get(key)
        return not value or key in self._silent

    def is_unread(self, key: str) -> bool:
        """Whether the file has a key that nobody asked for yet."""
        return key in self._content and key not in self._read

    def unread(self, neutral: Collection[str]) -> list[str]:
        """List the keys with a value that nobody asked for and that are not `neutral`."""
        return [k for k in self._content if k not in self._read and k not in neutral and not self.is_neutral(k)]

    def missing(self, key: str) -> InputError:
        """Return the error of a key that must be there."""
        return InputError(f"{self.origin} lacks `{key}`: it does not look like a transformer's config.json.")

    def whole(self, *keys: str, least: int = 1, most: int) -> int:
        """Return a whole number by the first of several keys that is there.

        Raises
        ------
        InputError
            If none is there, or the value is no whole number within the bounds.
        """
        value = self.optional_whole(*keys, least=least, most=most)
        if value is None:
            raise self.missing(keys[0])
        return value

    def optional_whole(self, *keys: str, least: int = 1, most: int) -> int | None:
        """Return a whole number as `whole` does, None where every key is absent or null."""
        found: list[tuple[str, Any]] = [(key, self.raw(key)) for key in keys]
        stated = [(key, value) for key, value in found if value is not None]
        # A key in the file goes before the default of another.
        stated.sort(key=lambda pair: pair[0] not in self._content)
        if not stated:
            return None
        key, value = stated[0]
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole:
            raise self._wrong(key, value, f"a whole number, at least {least} and at most {most:,}")
        if not least <= value <= most:
            raise self._wrong(key, value, f"at least {least} and at most {most:,}")
        return int(value)

    def optional_number(self, key: str) -> float:
        """Return a number, 0 where the key is absent or no number."""
        value = self.raw(key)
        return float(value) if isinstance(value, int | float) and abs(value) < _MOST_NUMBER else 0.0

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false.

        Raises
        ------
        InputError
            If the value is anything else.
        """
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def switch(self, switch: bool | str) -> bool:
        """Return a fixed switch, or the flag of a key (negated with a leading ``!``)."""
        if isinstance(switch, bool):
            return switch
        if switch.startswith("!"):
            return not self.flag(switch[1:], False)
        return self.flag(switch, False)

    def whole_list(self, key: str) -> list[int]:
        """Return a list of whole numbers, empty where the key is absent or null."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise self._wrong(key, value, "a list of whole numbers")
        return [int(v) for v in value]

    def text_list(self, key: str) -> list[str]:
        """Return a list of texts, empty where the key is absent or null."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, value, "a list of names, one a layer")
        return value

    def _wrong(self, key: str, value: Any, bound: str) -> InputError:
        return InputError(f"{self.origin}: `{key}` is {shown(value)}; it must be {bound}.")
