"""`expect`: assertions on the last report, which make a session file a test.

expect perplexity.all <= 14.2
expect state == 1a2b3c4d
expect ok
expect error "nothing to undo"
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mlxfun.errors import MlxfunError, UsageError
from mlxfun.text import cut, shown

Operator = Literal["<=", ">=", "==", "!=", "<", ">"]
OPERATORS: dict[Operator, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}

_COMPARISON = re.compile(
    r"(?P<path>[^\s<>=!]+)\s*+(?P<operator><=|>=|==|!=|<|>)\s*+(?P<value>.+)\Z"
)
_MISSING = object()


FORMER_NAMES = {"staged": "candidate"}
"""What a measured side was called in files that earlier versions recorded."""


class ExpectationFailed(MlxfunError):
    """The last report is not what was expected; the message holds both values."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """A parsed `expect` line."""

    text: str
    operator: Literal["ok", "error", Operator]
    path: str = ""
    value: str = ""


def parse_expectation(text: str) -> Expectation:
    """Parse the text of an `expect` line. Raises UsageError for anything that cannot be checked."""
    text = text.strip()
    if text == "ok":
        return Expectation(text, "ok")
    word, _, rest = text.partition(" ")
    if word == "error":
        return Expectation(text, "error", value=unquoted(rest.strip()))
    match = _COMPARISON.match(text)
    if match is None:
        raise UsageError(
            f"{shown(text)} is not an expectation: write PATH OPERATOR VALUE (operators "
            f"{' '.join(OPERATORS)}), ok, or error TEXT"
        )
    sign = next(known for known in OPERATORS if known == match["operator"])
    expectation = Expectation(text, sign, match["path"], match["value"])
    if expectation.operator not in ("==", "!=") and not _is_number(literal(expectation.value)):
        raise UsageError(f"{match['operator']} compares numbers, not {shown(match['value'])}")
    return expectation


def literal(text: str) -> object:
    """A number, true, false or null as JSON has them; any other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return unquoted(text)


def unquoted(text: str) -> str:
    """`text` without the quotes around it, if there are any."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def find(data: object, path: str) -> object:
    """The value at a dotted path; keys may hold dots themselves. Raises KeyError.

    >>> find({"perplexity": {"a.jsonl": 7.0}, "nodes": [{"id": 3}]}, "perplexity.a.jsonl")
    7.0
    """
    found = _find(data, path)
    if found is _MISSING:
        raise KeyError(path)
    return found


def _find(data: object, path: str | None) -> object:
    """path: None at its end."""
    if path is None:
        return data
    if isinstance(data, list):
        first, dot, rest = path.partition(".")
        index = int(first) if first.isdecimal() and len(first) < 10 else len(data)
        return _find(data[index], rest if dot else None) if index < len(data) else _MISSING
    if isinstance(data, dict):
        # The keys and not the parts of the path are tried: a report has few, a path may have many.
        for key in sorted((k for k in data if isinstance(k, str)), key=len, reverse=True):
            if path == key or path.startswith(f"{key}."):
                found = _find(data[key], path[len(key) + 1 :] if path != key else None)
                if found is not _MISSING:
                    return found
    return _MISSING


def check(expectation: Expectation, data: dict[str, object] | None, error: str | None) -> str:
    """Check the last report; what was found, as a sentence. Raises ExpectationFailed.

    data: of the last report, None when the last command failed with `error` or none has run.
    """
    if expectation.operator == "error":
        return _check_error(expectation, error)
    if data is None:
        problem = f"the last command failed: {error}" if error else "no command has run yet"
        raise ExpectationFailed(f"expect {cut(expectation.text)}: {problem}")
    if expectation.operator == "ok":
        return "ok"
    try:
        found = find(data, expectation.path)
    except KeyError:
        keys = ", ".join(sorted(map(str, data)))
        raise ExpectationFailed(
            f"expect {cut(expectation.text)}: the last report has no {shown(expectation.path)}, it has {keys}"
        ) from None
    ordered = expectation.operator not in ("==", "!=")
    if ordered and not _is_number(found):
        raise ExpectationFailed(
            f"expect {cut(expectation.text)}: found {shown(found)}, not a number"
        )
    # A state such as 12345678 or 1e10 is text, whatever it looks like.
    wanted = unquoted(expectation.value) if isinstance(found, str) else literal(expectation.value)
    if expectation.path in ("subject", "reference") and isinstance(wanted, str):
        wanted = FORMER_NAMES.get(wanted, wanted)
    if not OPERATORS[expectation.operator](found, wanted):
        raise ExpectationFailed(f"expect {cut(expectation.text)}: found {cut(json.dumps(found))}")
    return f"{expectation.path} is {cut(json.dumps(found))}"


def _check_error(expectation: Expectation, error: str | None) -> str:
    if error is None:
        raise ExpectationFailed(f"expect {cut(expectation.text)}: the last command did not fail")
    if expectation.value not in error:
        raise ExpectationFailed(f"expect {cut(expectation.text)}: the error was {shown(error)}")
    return f"it failed: {error}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
