"""A seeded generator of damaged files: a valid file of each kind, and ways to damage one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000,
    "\x1b]52;c;x\x07", "\u202e\u2028", "../../x", "\0", [], {}, [[]], [None], {"": {}}, [1] * 5000,
)  # fmt: skip
RAW = (
    b"", b"\0" * 64, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf", b"[" * 20000, b'{"a":' * 20000, b"9" * 9000,
    b"[" + b"9" * 9000 + b"]", b"null", b"NaN", b'"text"', b"[]", b"{}", b"{", b"\n" * 999,
    b"PK\x03\x04", b"\x93NUMPY", b"\x1f\x8b\x08", b"'" * 5000, b"x" * 200_000, b"a,b\n" + b'"' * 200_000,
)  # fmt: skip


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) or 1)]


def flipped(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 4, 32))):
        if found:
            found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def inserted(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(RAW) + data[place:]


def replaced(_data: bytes, rng: random.Random) -> bytes:
    return rng.choice(RAW)


def twice(data: bytes, _rng: random.Random) -> bytes:
    return data + data


def other_value(data: bytes, rng: random.Random) -> bytes:
    """JSON with a value somewhere in it replaced, or a key renamed; other files: bytes flipped."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return flipped(data, rng)
    node, parent, key = document, None, None
    while isinstance(node, dict | list) and node and rng.random() < 0.8:
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[key]
    if parent is None:
        document = rng.choice(STRANGE)
    elif isinstance(parent, dict) and rng.random() < 0.2:
        parent[rng.choice(("", "x" * 5000, "\x1b[2J", "-1"))] = parent.pop(key)
    else:
        parent[key] = rng.choice(STRANGE)
    return json.dumps(document).encode()


DAMAGES: tuple[Damage, ...] = (cut, flipped, inserted, replaced, twice, *[other_value] * 3)


def damaged(data: bytes, seed: int) -> bytes:
    """`data` damaged in one of the ways above, or two; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2))):
        data = rng.choice(DAMAGES)(data, rng)
    return data
