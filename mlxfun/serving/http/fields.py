"""Reads the fields of a JSON body, each checked: what is wrong is said in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from mlxfun.serving.http.errors import Bad
from mlxfun.text import one_line, shown

DEPTH = 64
"""How deep a body may be nested."""


def parse(body: bytes) -> dict[str, Any]:
    """A body as an object. Raises Bad: no JSON, NaN, lone surrogates, no object, too deep."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise Bad(f"the body is not UTF-8: byte {problem.start} cannot be read") from None
    try:
        found = json.loads(text or "null", parse_constant=_no_number)
    except RecursionError:
        raise Bad("the body is nested too deeply") from None
    except ValueError as problem:
        where = f" at character {problem.pos}" if isinstance(problem, json.JSONDecodeError) else ""
        raise Bad(f"the body is not JSON{where}") from None
    if not isinstance(found, dict):
        raise Bad("the body must be a JSON object")
    _check(found)
    return found


def _no_number(word: str) -> NoReturn:
    raise Bad(f"{word} is not a number that JSON knows")


def _check(value: Any, depth: int = 0) -> None:
    """Raise Bad for what is nested too deeply, infinite, or text that no encoding has."""
    if depth > DEPTH:
        raise Bad("the body is nested too deeply")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Bad("the body holds a number that is too large")
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check(inner, depth + 1)
        for key in value if isinstance(value, dict) else ():
            _check_text(key)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Bad("the body holds half of a surrogate pair, which is no text") from None


def quoted(value: object) -> str:
    """A value of somebody else's, for a sentence."""
    return one_line(shown(value, 60))


class Fields:
    """The fields of an object. where: what they belong to, for sentences, e.g. "messages[2]."."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self._where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as it is, None where there is none."""
        return self.values.get(name)

    def bad(self, name: str, must: str) -> Bad:
        """The error for a field."""
        full = f"{self._where}{name}"
        return Bad(f"{full} {must}, not {quoted(self.values.get(name))}", full)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number from `low` to `high`."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(name, "must be a number")
        if not low <= value <= high:
            raise self.bad(name, f"must be from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int, default: int | None) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.values.get(name)
        if value is None:
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole:
            raise self.bad(name, "must be a whole number")
        if not low <= value <= high:
            raise self.bad(name, f"must be from {low:,} to {high:,}")
        return int(value)

    def switch(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None, longest: int | None = None) -> str | None:
        """A text."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.bad(name, "must be a text")
        if longest is not None and len(value) > longest:
            raise self.bad(name, f"must have at most {longest:,} characters")
        return value

    def need(self, name: str) -> Any:
        """A value that must be there."""
        value = self.values.get(name)
        if value is None:
            raise Bad(f"{self._where}{name} is missing", f"{self._where}{name}")
        return value

    def choice(self, name: str, values: tuple[str, ...], default: str) -> str:
        """One of a few words."""
        value = self.values.get(name)
        if value is None:
            return default
        if value not in values:
            raise self.bad(name, f"must be one of {', '.join(values)}")
        return str(value)

    def table(self, name: str) -> Fields | None:
        """An object."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, "must be an object")
        return Fields(value, f"{self._where}{name}.")

    def tables(self, name: str, most: int) -> list[Fields]:
        """A list of objects."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.bad(name, "must be a list")
        if len(value) > most:
            raise Bad(f"{self._where}{name} has {len(value):,} entries, at most {most:,} are read")
        found = []
        for number, entry in enumerate(value):
            if not isinstance(entry, dict):
                raise Bad(
                    f"{self._where}{name}[{number}] must be an object, not {quoted(entry)}",
                    f"{self._where}{name}",
                )
            found.append(Fields(entry, f"{self._where}{name}[{number}]."))
        return found
