"""How much the operations of a chat template would make, judged by their operands.

Only what one call of C does is judged here, since nothing can interrupt it; see
`mlxfun.data.templates.bounds` for the rest. Sizes are characters, or elements of a list counted as
`ELEMENT` each, and right up to a small factor: what was made is measured afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TOO_LARGE = float(1 << 62)
"""More than any bound."""

ELEMENT = 8
"""What an element of a list counts, in characters."""

BITS = 1 << 20
"""The longest integer, as numbers of thousands of digits take long to multiply and to print."""

_MOST_VISITED = 1 << 19
_DIGITS = re.compile(r"\d{6,}")


def weight(value: Any) -> float:
    """Characters of `str(value)`, about: what a list holds twice counts twice."""
    total, visited, left = 0.0, 0, [value]
    while left:
        one = left.pop()
        visited += 1
        if visited > _MOST_VISITED:  # lists in lists in lists, each twice
            return TOO_LARGE
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, list | tuple | set | frozenset):
            total += 2 * len(one) + 2
            left += one
        elif isinstance(one, Mapping):
            total += 4 * len(one) + 2
            left += [*one.keys(), *one.values()]
        else:
            total += 32
    return total


def binary(operator: str, left: Any, right: Any) -> float:
    """The size of `left operator right`, for +, *, ** and %."""
    if operator == "%":
        return formatted(left, (right,)) if isinstance(left, str | bytes) else 0
    if operator == "+":
        return _length(left) + _length(right)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else _bits(left) + _bits(right)
        return TOO_LARGE if bits > BITS else 0
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int):
                return _length(sequence) * max(count, 0)
    return 0


def _bits(number: int) -> int:
    return number.bit_length()


def _length(value: Any) -> float:
    if isinstance(value, str | bytes):
        return len(value)
    return len(value) * ELEMENT if isinstance(value, list | tuple) else 0


def called(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], float]:
    """(the arguments to call it with, the size of what it makes) for a method of a text."""
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(text, int) and name == "to_bytes":
        return args, _largest(args, kwargs)
    if not isinstance(text, str | bytes):
        return args, 0
    if name == "join" and args:
        args = (_gathered(args[0]), *args[1:])
    return args, _of_text(text, name, args, kwargs)


def _of_text(text: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    if name in ("center", "ljust", "rjust", "zfill"):
        return len(text) + _largest(args, kwargs)
    if name == "expandtabs":
        return len(text) * (1 + _largest(args, kwargs))
    if name in ("split", "rsplit", "splitlines"):
        return len(text) + ELEMENT * _pieces(text, args)
    if name == "replace" and len(args) > 1:
        return _replaced(text, args[0], args[1])
    if name == "join" and args:
        return _joined(text, args[0])
    if name == "translate" and args and isinstance(args[0], Mapping):
        return len(text) * max(map(_length, args[0].values()), default=0)
    return len(text)


def _pieces(text: Any, args: tuple[Any, ...]) -> int:
    """In how many pieces it is split at the most."""
    if args and args[0] and isinstance(args[0], type(text)):
        return int(text.count(args[0])) + 1
    blanks = " \t\n\r" if isinstance(text, str) else (b" ", b"\t", b"\n", b"\r")
    return sum(int(text.count(blank)) for blank in blanks) + 1


def filtered(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], float]:
    """The same for a filter: (its arguments, the size of what it makes)."""
    value, rest = (args[0] if args else ""), args[1:]
    if name == "join":
        value = _gathered(value)
        separator = rest[0] if rest else kwargs.get("d", "")
        size = max(_joined(str(separator), value), weight(value))
        return (value, *rest), size
    if name in _LINEAR:
        return args, weight(value)
    size = 0.0
    if name in ("center", "indent", "tojson", "wordwrap"):
        lines = value.count("\n") + 1 if isinstance(value, str) else weight(value)
        size = weight(value) + lines * max(_largest(rest, kwargs), _longest(rest, kwargs))
    elif name in ("batch", "slice"):
        size = _largest(rest, kwargs) * ELEMENT
    elif name == "replace" and len(rest) > 1:
        size = weight(value)
        if isinstance(value, str):
            size = max(size, _replaced(value, str(rest[0]), str(rest[1])))
    elif name == "format":
        size = formatted(str(value), (*rest, *kwargs.values()))
    elif name == "list" and isinstance(value, str):
        size = len(value) * ELEMENT
    return args, size


_LINEAR = frozenset(
    ("string", "pprint", "xmlattr", "urlize", "urlencode", "escape", "e", "forceescape", "safe",
     "sum", "upper", "lower", "title", "capitalize", "trim", "striptags", "truncate", "wordcount")
)  # fmt: skip


def _gathered(value: Any) -> Any:
    """A list of what an iterator gives, whose elements can then be looked at."""
    if isinstance(value, str | list | tuple | Mapping):
        return value
    try:
        return list(value)
    except TypeError:
        return value  # join says what is wrong


def _joined(separator: Any, parts: Any) -> float:
    count = len(parts) if isinstance(parts, str | list | tuple | Mapping) else 0
    return weight(parts) + len(separator) * count


def _replaced(text: Any, old: Any, new: Any) -> float:
    try:
        return float(len(text) + text.count(old) * len(new))
    except TypeError:
        return 0  # Python says what is wrong


def _largest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The largest whole number among the arguments."""
    numbers = [n for n in (*args, *kwargs.values()) if isinstance(n, int)]
    return float(min(max(numbers, default=0), 1 << 62))


def _longest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The longest text among them."""
    return max((len(t) for t in (*args, *kwargs.values()) if isinstance(t, str)), default=0)


def formatted(text: Any, args: tuple[Any, ...]) -> float:
    """`text % args`: each field may show any argument in any width."""
    shown = text.decode("latin-1") if isinstance(text, bytes) else text
    flat = [one for arg in args for one in (arg if isinstance(arg, tuple | list) else (arg,))]
    width = widest(shown)
    if "*" in shown:  # a width that is an argument
        width = max(width, _largest(tuple(flat), {}))
    return len(shown) + shown.count("%") * max((width, *map(weight, flat)), default=0)


def widest(text: str) -> float:
    """The largest number that is written in `text`, of those with six digits and more."""
    return float(max((int(number[:18]) for number in _DIGITS.findall(text)), default=0))
