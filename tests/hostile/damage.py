"""Ways to damage a file so that it must be refused: no result of these may be taken for a good file.

Each takes the bytes of a good file and a seeded generator. What is odd and yet valid is in
`test_odd_files`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

LONG = "x" * 5000
ESCAPE = "\x1b]52;c;ZXZpbA==\x07\u202e\u2028"
DEEP_LIST, DEEP_OBJECT, DIGITS = b"[" * 20000, b'{"a":' * 20000, b"9" * 9000
NO_NUMBERS: tuple[Any, ...] = (LONG, ESCAPE, "", "seven", [], {}, [[1]], {"a": 1}, [None])
NO_INTEGERS = (*NO_NUMBERS, 1.5, 1e308, float("nan"), float("inf"), -float("inf"))
NO_SIZES = (*NO_INTEGERS, -1, -(2**63), 2**31, 2**63, 10**400, True)
NO_TEXTS: tuple[Any, ...] = (5, -1, 1.5, [], {}, [[]], {"a": {}}, 10**400, float("nan"))
NO_LISTS: tuple[Any, ...] = (5, "", LONG, {}, {"a": []}, 1.5, True, ESCAPE)
NO_OBJECTS: tuple[Any, ...] = (5, "", LONG, [], [[]], 1.5, True, ESCAPE, [{}])


def cut(data: bytes, rng: random.Random) -> bytes:
    """A document that is not complete."""
    return data[: rng.randrange(len(data.rstrip()))]


def with_nul(data: bytes, rng: random.Random) -> bytes:
    """A control character, which JSON and TOML allow nowhere."""
    place = rng.randrange(len(data.rstrip()))
    return data[:place] + b"\0" + data[place:]


def no_text(data: bytes, rng: random.Random) -> bytes:
    """A byte that is nowhere in UTF-8."""
    place = rng.randrange(len(data.rstrip()))
    return data[:place] + rng.choice((b"\xff", b"\xfe", b"\xc0\x80")) + data[place:]


def twice(data: bytes, _rng: random.Random) -> bytes:
    """One document behind another."""
    return data + data


def junk(_data: bytes, rng: random.Random) -> bytes:
    """Something else altogether; no object, however JSON may see it."""
    return rng.choice(JUNK)


JUNK = (
    b"", b"\0" * 64, b"\xff\xfe{\0", b"\xef\xbb\xbf", DEEP_LIST, DEEP_OBJECT, DIGITS, b"\n" * 999,
    b"[" + DIGITS + b"]", b"null", b'"text"', b"[]", b"{", b"PK\x03\x04", b"\x93NUMPY", b"-",
    b"\x1f\x8b\x08", b"'" * 5000, b"x" * 200_000, b"[" * 400 + b"]" * 400, ESCAPE.encode(),
)  # fmt: skip

TEXT: tuple[Damage, ...] = (cut, with_nul, no_text, twice, junk)


def changed(*ways: tuple[str, Sequence[Any]]) -> tuple[Damage, ...]:
    """JSON with one value replaced: (path like "a.b.0", values none of which is possible there)."""
    return tuple(_change(path, values) for path, values in ways)


def _change(path: str, values: Sequence[Any]) -> Damage:
    def change(data: bytes, rng: random.Random) -> bytes:
        document = json.loads(data)
        *parents, last = path.split(".")
        node = document
        for key in parents:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(last) if isinstance(node, list) else last] = rng.choice(values)
        return json.dumps(document).encode()

    return change


def without(*names: str) -> tuple[Damage, ...]:
    """JSON with one key of the outermost object missing."""

    def take(name: str) -> Damage:
        def taken(data: bytes, _rng: random.Random) -> bytes:
            document = json.loads(data)
            del document[name]
            return json.dumps(document).encode()

        return taken

    return tuple(map(take, names))


def with_line(*lines: str | bytes) -> tuple[Damage, ...]:
    """Text with one of these lines, each of which spoils any file of its kind, at any place."""

    def added(line: str | bytes) -> Damage:
        raw = line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line

        def add(data: bytes, rng: random.Random) -> bytes:
            found = data.rstrip(b"\n").split(b"\n")
            found.insert(rng.randrange(len(found) + 1), raw)
            return b"\n".join(found) + b"\n"

        return add

    return tuple(map(added, lines))


def texts(*contents: str | bytes) -> tuple[Damage, ...]:
    """These contents in place of the file's."""

    def of(content: str | bytes) -> Damage:
        raw = content.encode() if isinstance(content, str) else content
        return lambda _data, _rng: raw

    return tuple(map(of, contents))
