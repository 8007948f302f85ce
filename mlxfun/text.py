"""Formatting of numbers, byte counts, options and versions as text."""

from __future__ import annotations

from importlib import metadata
from typing import Any


def option_words(options: Any, default: Any) -> list[str]:
    """Options of a dataclass as words of a command line, without those that are as in `default`."""
    words = []
    for name in options.__dataclass_fields__:
        value = getattr(options, name)
        if value == getattr(default, name):
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, str(value)]
    return words


def readable_bytes(count: int | float) -> str:
    """`count` bytes in powers of 1024: 0 B, 1.5 KiB, 6.1 MiB."""
    size, sign = abs(float(count)), "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.1f} TiB"


QUOTED = 200
"""The most characters of a value that a message quotes."""


def shown(value: object, most: int = QUOTED) -> str:
    """`value` as Python writes it, cut to `most` characters, for a message.

    >>> shown("abc"), shown("abcdef", 3)
    ("'abc'", "'abc...'")
    """
    if isinstance(value, str):
        return repr(value if len(value) <= most else value[:most] + "...")
    return cut(repr(value), most)


def cut(text: str, most: int = QUOTED) -> str:
    """`text` cut to `most` characters.

    >>> cut("abc"), cut("abcdef", 3)
    ('abc', 'abc...')
    """
    return text if len(text) <= most else text[:most] + "..."


def counted(count: int, one: str, more: str) -> str:
    """`count` with its words: 1 expert goes, 4 experts go."""
    return f"{count:,} {one if count == 1 else more}"


def no_experts(model_type: str, action: str) -> str:
    """The sentence that refuses `action`, an infinitive, on a dense model.

    >>> no_experts("llama", "prune")
    'llama is a dense model: it has no experts to prune'
    """
    return f"{model_type} is a dense model: it has no experts to {action}"


def installed_version(package: str) -> str:
    """The installed version of a distribution, "unknown" where it is not installed.

    >>> installed_version("no such package")
    'unknown'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
