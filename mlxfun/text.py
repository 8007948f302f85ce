"""Formatting of numbers, byte counts, options and versions as text; characters made visible."""

from __future__ import annotations

import re
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
        elif value is False:
            words.append(f"--no-{flag[2:]}")
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
    try:
        return cut(repr(value), most)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"a very long {type(value).__name__}"


def cut(text: str, most: int = QUOTED) -> str:
    """`text` cut to `most` characters.

    >>> cut("abc"), cut("abcdef", 3)
    ('abc', 'abc...')
    """
    return text if len(text) <= most else text[:most] + "..."


_TURNING = frozenset((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
_ENDING_LINES = frozenset((0x2028, 0x2029))


def visible(text: str, keep: str = "\n\t") -> str:
    """`text` with nothing in it that drives a terminal or hides what it says.

    C0 controls except those in `keep` and DEL become pictures of themselves; C1 controls,
    surrogates, characters that turn the direction of text, and the line and paragraph separators
    become U+FFFD. What is unprintable but harmless (narrow spaces, joiners in emoji) stays.

    >>> visible("a\\x1b[31mb")
    'a␛[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _picture(c) for c in text)


def one_line(text: str) -> str:
    """`text` as `visible` gives it, with line breaks and tabs made visible too.

    >>> one_line("a\\nb")
    'a␊b'
    """
    return visible(text, keep="")


def _picture(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    dangerous = 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000
    return "\ufffd" if dangerous or code in _TURNING or code in _ENDING_LINES else char


def escaped(json_text: str) -> str:
    """JSON text with every character that `visible` would replace written as an escape.

    The document stays the same.

    >>> escaped('["\\x7f"]')
    '["\\\\u007f"]'
    """
    if json_text.isprintable():
        return json_text
    return "".join(
        c if c in "\n\t" or c.isprintable() or _picture(c) == c else f"\\u{ord(c):04x}"
        for c in json_text
    )


_LONG = re.compile(rf"\S{{{QUOTED + 1},}}")
LONGEST = 4000
"""The most characters of a message."""


def brief(message: str, *words: str) -> str:
    """`message` with long words cut to `QUOTED` characters, and cut in the middle if still long.

    words: values that it may quote whole, blanks included.

    >>> len(brief("no such file: " + "x" * 5000))
    217
    """
    if len(message) <= QUOTED:
        return message
    for word in words:
        if len(word) > QUOTED:
            for quoted in (word, repr(word)[1:-1]):
                message = message.replace(quoted, cut(quoted))
    message = _LONG.sub(_shortened, message)
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 4 :]}"
    return message


def _shortened(match: re.Match[str]) -> str:
    """A long word cut, with the punctuation behind it."""
    word = match[0]
    bare = word.rstrip(":;,.'\")")
    return cut(bare) + word[len(bare) :][:6]  # room for the dots of an earlier cut


def counted(count: int, one: str, more: str) -> str:
    """`count` with its words: 1 expert goes, 4 experts go."""
    return f"{count:,} {one if count == 1 else more}"


FIGURES_NEED = (
    "figures need one package more: pip install 'mlxfun[plots]' (.svg, .csv and .md do not)"
)


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
