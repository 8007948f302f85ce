"""Text that would drive a terminal, or hide what it says, for tests of what is shown."""

from __future__ import annotations

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ALONE = (
    *(chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"),
    *BIDI, "\u2028", "\u2029", "\udfff", "\ud800",
)  # fmt: skip
"""Every C0 and C1 control (but line feed and tab), DEL, bidi characters, separators, surrogates."""

SEQUENCES = (
    "\x1b]52;c;ZXZpbA==\x07", "\x1b]0;title\x1b\\", "\x9d52;c;ZXZpbA==\x9c", "\x1b[2J", "\x9b31m",
    "\x1bP+q\x1b\\", "\r\x1b[Aerror",
)  # fmt: skip

EVIL = "".join(SEQUENCES) + "".join(ALONE)
ARGUMENT = "".join(c for c in EVIL if c != "\0" and not "\ud800" <= c <= "\udfff")
"""The part that can be an argument of a program, or part of a path."""


def shown_characters(text: str) -> set[str]:
    """Characters of `text` that no output may hold."""
    return set(text) & set(ALONE)
