"""Tool calls: from the text that a model writes between its markers to names and arguments."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from mlxfun.data.datasets import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. arguments: JSON text."""

    id: str
    name: str
    arguments: str


def parse_calls(
    text: str, tokenizer: Tokenizer, tools: Sequence[dict[str, Any]]
) -> list[ToolCall] | None:
    """The calls in the text between two markers; None if it is none, cut short for instance."""
    parser = getattr(tokenizer, "tool_parser", None)
    if parser is None:
        return None
    try:
        parsed = parser(text, list(tools))
        found = parsed if isinstance(parsed, list) else [parsed]
        return [_call(call) for call in found]
    except Exception as problem:  # noqa: BLE001
        # Parsers of a dozen formats raise what they like on text that a model made up.
        log.info("a tool call cannot be parsed: %s", problem)
        return None


def _call(call: dict[str, Any]) -> ToolCall:
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call.get("id") or f"call_{uuid4().hex[:24]}"), str(call["name"]), arguments)


def salvaged(text: str) -> ToolCall | None:
    """What can be saved of a call that was cut short, where it is JSON: its name, and those
    arguments that are complete. None if not even the name is there."""
    closed = _closed(text.strip())
    for end in range(len(closed), 0, -1):
        try:
            found = json.loads(closed[end - 1])
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("name"), str):
            arguments = found.get("arguments", found.get("parameters", {}))
            return _call({"name": found["name"], "arguments": arguments})
        return None
    return None


def _closed(text: str) -> list[str]:
    """Texts that close all brackets which are open after a prefix of `text` that ends a value, the
    longest last."""
    found, open_, quoted, escaped = [], [], False, False
    for at, char in enumerate(text):
        if quoted:
            escaped, quoted = char == "\\" and not escaped, char != '"' or escaped
            continue
        if char == '"':
            quoted = True
        elif char in "{[":
            open_.append("}" if char == "{" else "]")
        elif char in "}]" and open_:
            open_.pop()
        if char in ",}]" and open_:
            found.append(text[: at + (char != ",")] + "".join(reversed(open_)))
    if not open_ and not quoted:
        found.append(text)
    return found
