"""Conversations as data sets hold them, brought into the one form that chat templates take.

Read are OpenAI messages (content as text or as parts, tool calls with arguments as an object or as
JSON text, reasoning under any of its names), ShareGPT turns (from, value), and lists written as
JSON text. Values that are null count as absent: columnar files fill every key of every row.
"""

from __future__ import annotations

import json
from typing import Any

from mlxfun.data.lines import BrokenLine, Message

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "ai": "assistant", "bot": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Names of roles elsewhere -> those that chat templates know. Others stay as they are."""

CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT turns whose value is the JSON text of a call."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages hold the reasoning ahead of an answer."""

_TEXT_PARTS = ("text", "input_text", "output_text")


class Unusable(Exception):
    """A line that cannot be used although it is well-formed; the text is the reason to count."""


def kind_of(value: Any) -> str:
    """The JSON type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             bytes: "binary data"}  # fmt: skip
    if value == []:
        return "an empty list"
    return names.get(type(value), "null" if value is None else "a number")


def string(value: Any, key: str, where: str) -> str:
    """`value`, which must be text that a tokenizer takes. Raises BrokenLine."""
    if not isinstance(value, str):
        raise BrokenLine(where, f"{key!r} must be a string, found {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may escape half a surrogate pair; no tokenizer accepts that.
        what = f"{key!r} holds half a surrogate pair"
        raise BrokenLine(where, what, f" at character {error.start}") from error
    return value


def from_json_text(value: Any) -> Any:
    """`value`, or what it holds if it is the JSON text of a list or an object."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list | dict) else value


def conversation(value: Any, key: str, where: str) -> tuple[Message, ...]:
    """The messages under `key`. Raises BrokenLine, or Unusable for parts that are not text."""
    value = from_json_text(value)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BrokenLine(where, f"{key!r} must be a non-empty list, found {kind_of(value)}")
    return tuple(_message(turn, f"{key}[{n}]", where) for n, turn in enumerate(value))


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BrokenLine(where, f"{name} must be an object, found {kind_of(turn)}")
    message = {k: v for k, v in turn.items() if v is not None or k in ("content", "value")}
    if "role" not in message and "from" in message:
        message = _sharegpt(message, name, where)
    if "role" not in message:
        raise BrokenLine(where, f"{name} needs a 'role' and a 'content'")
    role = string(message["role"], f"{name}.role", where)
    message["role"] = ROLES.get(role.lower(), role)
    for reasoning in REASONING:
        if reasoning in message and not isinstance(message[reasoning], str):
            del message[reasoning]  # a list of details, beside the text under another name
    _content(message, name, where)
    _calls(message, name, where)
    found = next((message[k] for k in REASONING if message.get(k)), None)
    if found is not None:
        # Templates differ in the name they look under.
        message |= {"reasoning_content": found, "thinking": found}
    return message


def _sharegpt(turn: Message, name: str, where: str) -> Message:
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "weight")}
    role, value = string(turn["from"], f"{name}.from", where), turn.get("value")
    if role not in CALL_ROLES:
        return rest | {"role": role, "content": "" if value is None else value}
    calls = from_json_text(value)
    calls = calls if isinstance(calls, list) else [calls]
    return rest | {"role": "assistant", "content": "", "tool_calls": calls}


def _content(message: Message, name: str, where: str) -> None:
    content = message.get("content")
    optional = any(message.get(k) for k in ("tool_calls", "function_call", *REASONING))
    if "content" not in message and not optional:
        raise BrokenLine(where, f"{name} needs a 'role' and a 'content'")
    if content is None:
        content = ""
    if isinstance(content, dict) and "type" in content:
        content = [content]
    if isinstance(content, list):
        content = _joined(content, message, name, where)
    message["content"] = string(content, f"{name}.content", where)


def _joined(parts: list[Any], message: Message, name: str, where: str) -> str:
    """The text of typed parts, as mlx-lm's server joins them: nothing in between."""
    texts: list[str] = []
    for number, part in enumerate(parts):
        at = f"{name}.content[{number}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BrokenLine(where, f"{at} must be an object, found {kind_of(part)}")
        type_ = part.get("type") or ("text" if "text" in part else None)
        if type_ in _TEXT_PARTS:
            texts.append(string(part.get("text"), f"{at}.text", where))
        elif type_ in ("thinking", "reasoning"):
            said = part.get("thinking") or part.get("text") or part.get("reasoning") or ""
            message["reasoning_content"] = message.get("reasoning_content", "") + string(
                said, f"{at}.{type_}", where
            )
        else:
            raise Unusable(f"with a part that is not text: {str(type_)[:40]}")
    return "".join(texts)


def _calls(message: Message, name: str, where: str) -> None:
    """Tool calls in the form that templates take: arguments as an object."""
    calls = message.pop("function_call", None)
    calls = [{"function": calls}] if isinstance(calls, dict) else None
    calls = from_json_text(message.get("tool_calls")) or calls
    if calls is None or calls == []:
        message.pop("tool_calls", None)
        return
    if not isinstance(calls, list):
        raise BrokenLine(where, f"{name}.tool_calls must be a list, found {kind_of(calls)}")
    message["tool_calls"] = [
        _call(call, f"{name}.tool_calls[{n}]", where) for n, call in enumerate(calls)
    ]


def _call(call: Any, name: str, where: str) -> Message:
    call = from_json_text(call)
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = from_json_text(call.get("function")) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BrokenLine(where, f"{name} names no function; it needs function.name")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = from_json_text(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    kept = {k: v for k, v in call.items() if v is not None}
    return {"type": "function"} | kept | {"function": function | {"arguments": arguments}}
