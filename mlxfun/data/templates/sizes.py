"""How much the operations of a chat template would make or take, judged by their operands.

Only what one call of C does is judged here, since nothing can interrupt it; see
`mlxfun.data.templates.bounds` for the rest. Sizes are characters, or elements of a list counted as
`ELEMENT` each, and right up to a small factor: what was made is measured afterwards.

Comparing, sorting, hashing and printing take time in proportion to the `weight` of their operands,
at most its logarithm times more. So no list, tuple or mapping may be made whose weight is beyond the
bound: lists that hold one list twice, which holds one twice, and so on, would be compared for ever.
What takes longer than in proportion is judged here as the product that it takes.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MappingView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

TOO_LARGE = float(1 << 62)
"""More than any bound."""

ELEMENT = 8
"""What an element of a list counts, in characters."""

BITS = 1 << 20
"""The longest integer, as numbers of thousands of digits take long to multiply and to print."""

STEPS = 64
"""Steps of a simple loop in C that count as one character."""

_LARGE_NUMBER = 4096
"""What a whole number of more than 60 bits counts, and a tuple that is a key, too: there are as many
as one likes that have the same hash, and a mapping of such takes the square of their number."""

_MOST_VISITED = 1 << 19
_MOST_KNOWN = 64
_DIGITS = re.compile(r"\d{6,}")

Known = OrderedDict[int, tuple[Any, float]]
_KNOWN: ContextVar[Known | None] = ContextVar("weights", default=None)


@contextmanager
def remembered() -> Iterator[None]:
    """Inside the block the weights of the last few lists and mappings are kept, and these with them."""
    token = _KNOWN.set(OrderedDict())
    try:
        yield
    finally:
        _KNOWN.reset(token)


def weight(value: Any) -> float:
    """Characters of `str(value)`, about: what a list holds twice counts twice."""
    if isinstance(value, str | bytes):
        return len(value)
    known = _KNOWN.get()
    total, visited, left = 0.0, 0, [value]
    while left:
        one = left.pop()
        visited += 1
        if visited > _MOST_VISITED:  # lists in lists in lists, each twice
            return TOO_LARGE
        if isinstance(one, str | bytes):
            total += len(one)
        elif not isinstance(one, _HOLDING):
            large = isinstance(one, int) and one.bit_length() > 60
            total += _LARGE_NUMBER if large else 32
        elif known and id(one) in known:
            total += known[id(one)][1]
        else:
            total += _opened(one, left)
    remember(value, total)
    return total


def remember(value: Any, total: float) -> None:
    """The weight of a list as known."""
    known = _KNOWN.get()
    if known is not None and isinstance(value, _HOLDING):
        known[id(value)] = (value, total)
        if len(known) > _MOST_KNOWN:
            known.popitem(last=False)


_HOLDING = (list, tuple, set, frozenset, Mapping, MappingView)


def _opened(one: Any, left: list[Any]) -> float:
    """What it counts without what it holds, which goes to `left`."""
    if isinstance(one, Mapping):
        left += [*one.keys(), *one.values()]
        return 4.0 * len(one) + 2 + _LARGE_NUMBER * sum(isinstance(key, tuple) for key in one)
    left += list(one)
    return 2.0 * len(one) + 2


def binary(operator: str, left: Any, right: Any) -> float:
    """The size of `left operator right`, for +, -, *, **, // and %."""
    if operator == "%" and isinstance(left, str | bytes):
        return formatted(left, (right,))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else _bits(left) + _bits(right)
        return TOO_LARGE if bits > 2 * BITS or (operator in ("*", "**") and bits > BITS) else 0
    if operator == "+":
        return _length(left) + _length(right)
    if operator == "-" and isinstance(left, MappingView):
        return weight(left) * weight(right) / STEPS
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int):
                return _length(sequence) * max(count, 0)
    return 0


def _bits(number: int) -> int:
    return number.bit_length()


def _length(value: Any) -> float:
    return weight(value) if isinstance(value, str | bytes | list | tuple) else 0


def called(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], float]:
    """(the arguments to call it with, the size of what it makes or takes) for a function.

    Its arguments are together in a tuple or a mapping once it is a macro, and are weighed as one.
    """
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    given = sum(map(weight, (*args, *kwargs.values())))
    if isinstance(text, int) and name == "to_bytes":
        return args, _largest(args, kwargs)
    if name == "strftime_now":
        return args, 256 * given
    if name == "fromkeys" and args and not isinstance(args[0], str):
        args = (_gathered(args[0]), *args[1:])
        return args, sum(map(weight, args)) + _keys(args[0])
    if isinstance(text, MappingView):
        return args, weight(text) * given / STEPS
    if not isinstance(text, str | bytes):
        return args, given
    if name == "join" and args:
        args = (_gathered(args[0]), *args[1:])
    return args, _of_text(text, name, args, kwargs)


def _of_text(text: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    if name in ("center", "ljust", "rjust", "zfill"):
        return len(text) + _largest(args, kwargs)
    if name == "expandtabs":
        return len(text) * (1 + _largest(args, kwargs))
    if name in ("split", "rsplit", "splitlines"):
        from_right = len(text) * _longest(args, kwargs) / STEPS if name == "rsplit" else 0
        return len(text) + ELEMENT * _pieces(text, args) + from_right
    if name == "replace" and len(args) > 1:
        return _replaced(text, args[0], args[1])
    if name == "join" and args:
        return _joined(text, args[0])
    if name == "translate" and args and isinstance(args[0], Mapping | list | tuple):
        table = args[0].values() if isinstance(args[0], Mapping) else args[0]
        return len(text) * max(map(_length, table), default=0)
    if name in _PRODUCTS:  # from the right there is only the simplest way of searching
        return len(text) * (1 + _longest(args, kwargs) / STEPS)
    return len(text)


_PRODUCTS = frozenset(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip"))


def _keys(values: Any) -> float:
    """What values that become keys of a mapping count beside their weight."""
    return _LARGE_NUMBER * sum(isinstance(one, tuple) for one in values)


def _pieces(text: Any, args: tuple[Any, ...]) -> int:
    """In how many pieces it is split at the most."""
    if args and args[0] and isinstance(args[0], type(text)):
        return int(text.count(args[0])) + 1
    blanks = " \t\n\r" if isinstance(text, str) else (b" ", b"\t", b"\n", b"\r")
    return sum(int(text.count(blank)) for blank in blanks) + 1


def filtered(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], float]:
    """The same for a filter: (its arguments, the size of what it makes or takes)."""
    value, rest = (args[0] if args else ""), args[1:]
    if name == "join":
        value = _gathered(value)
        separator = rest[0] if rest else kwargs.get("d", "")
        return (value, *rest), max(_joined(str(separator), value), weight(value))
    if name == "sum":
        value = _gathered(value)
        return (value, *rest), _summed(value, (*rest, *kwargs.values()))
    judge = _linear if name in _LINEAR else _FILTERS.get(name)
    return args, judge(value, (*rest, *kwargs.values())) if judge else 0


_LINEAR = frozenset(
    ("string", "pprint", "xmlattr", "urlencode", "escape", "e", "forceescape", "safe", "upper",
     "lower", "title", "capitalize", "striptags", "truncate", "wordcount")
)  # fmt: skip


def _linear(value: Any, _: tuple[Any, ...]) -> float:
    return weight(value)


def _indented(value: Any, more: tuple[Any, ...]) -> float:
    lines = value.count("\n") + 1 if isinstance(value, str) else weight(value)
    return weight(value) + lines * max(_largest(more, {}), _longest(more, {}))


def _filled(_: Any, more: tuple[Any, ...]) -> float:
    return _largest(more, {}) * max((ELEMENT, *map(weight, more)))


def _replaced_in(value: Any, more: tuple[Any, ...]) -> float:
    size = weight(value)
    if isinstance(value, str) and len(more) > 1:
        size = max(size, _replaced(value, str(more[0]), str(more[1])))
    return size


def _rounded(_: Any, more: tuple[Any, ...]) -> float:
    """As many digits as it is rounded to are worked out."""
    return TOO_LARGE if any(isinstance(n, int) and abs(n) > ROUNDED for n in more) else 0


def _searched(value: Any, _: tuple[Any, ...]) -> float:
    """Their regular expressions may take the square of the length."""
    return weight(value) ** 2 / 16


def _trimmed(value: Any, more: tuple[Any, ...]) -> float:
    return weight(value) * (1 + _longest(more, {}) / STEPS)


def _listed(value: Any, _: tuple[Any, ...]) -> float:
    return len(value) * ELEMENT if isinstance(value, str) else 0


_FILTERS: dict[str, Callable[[Any, tuple[Any, ...]], float]] = {
    **dict.fromkeys(("center", "indent", "tojson"), _indented),
    **dict.fromkeys(("batch", "slice"), _filled),
    **dict.fromkeys(("urlize", "wordwrap"), _searched),
    "replace": _replaced_in,
    "round": _rounded,
    "trim": _trimmed,
    "list": _listed,
    "format": lambda value, more: formatted(str(value), more),
}

ROUNDED = 4096
"""Digits to round to, at most."""


def _summed(values: Any, more: tuple[Any, ...]) -> float:
    """Lists are copied with each list that comes to them."""
    size = weight(values) + sum(map(weight, more))
    if not any(isinstance(one, list | tuple) for one in more):
        return size  # numbers
    return max(size, size / ELEMENT * len(values) / STEPS)


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
