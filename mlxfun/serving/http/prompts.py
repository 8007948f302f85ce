"""From messages to the tokens of a prompt, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxfun.data.chat import prompt_tokens, text_ids
from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import MlxfunError
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields, quoted
from mlxfun.serving.service import Card

MESSAGES, PARTS, TOOLS = 4096, 1024, 512
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REASONING = ("reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as templates take it. tools: as OpenAI writes them. thinking: None for the
    template's own default. options: more for the template. must_call: whether the answer must be calls
    of them; one_call: whether the first call ends it."""

    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    must_call: bool = False
    one_call: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt. thinking: whether it ends inside a thinking block."""

    tokens: tuple[int, ...]
    thinking: bool = False


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """The messages of a chat completion. Raises Bad."""
    fields.need("messages")
    found = [_message(entry) for entry in fields.tables("messages", MESSAGES)]
    if not found:
        raise Bad("messages is empty: there is nothing to answer", "messages")
    return found


def _message(entry: Fields) -> dict[str, Any]:
    entry.need("role")
    role = entry.choice("role", ROLES, "user")
    message: dict[str, Any] = {
        "role": {"developer": "system", "function": "tool"}.get(role, role),
        "content": text_of(entry, "content"),
    }
    calls = [_call(call) for call in entry.tables("tool_calls", PARTS)]
    if calls:
        if role != "assistant":
            raise entry.bad("tool_calls", "belongs to the assistant")
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if name in entry:
            message[name] = entry.text(name)
    for name in REASONING:
        if name in entry and role == "assistant":
            message["reasoning_content"] = entry.text(name)
    return message


def text_of(entry: Fields, name: str) -> str:
    """A content: a text, or a list of parts that are texts. None is no text."""
    value = entry.raw(name)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise entry.bad(name, "must be a text or a list of parts")
    texts = []
    for part in entry.tables(name, PARTS):
        kind = part.text("type", "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise part.bad("type", "must be text: this server reads no images, sound or files")
        texts.append(str(part.text("refusal" if kind == "refusal" else "text", "")))
    return "".join(texts)


def _call(call: Fields) -> dict[str, Any]:
    function = call.table("function")
    if function is None:
        raise Bad("a tool call needs a function", "messages")
    name = function.text("name")
    if not name:
        raise Bad("a tool call needs the name of its function", "messages")
    return {
        "id": call.text("id", "") or "",
        "type": "function",
        "function": {"name": name, "arguments": arguments_of(function)},
    }


def arguments_of(function: Fields) -> Any:
    """The arguments of a call, as an object: templates write them themselves."""
    value = function.raw("arguments")
    if value is None or value == "":
        return {}
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise function.bad("arguments", "must be JSON in a text")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        # Truncated by some limit, maybe: the model shall see it as it was.
        return value


def tools_of(fields: Fields) -> tuple[dict[str, Any], ...]:
    """The functions that the model may call. Raises Bad."""
    found = []
    for tool in fields.tables("tools", TOOLS):
        kind = tool.text("type", "function")
        if kind != "function":
            raise tool.bad("type", "must be function")
        function = tool.table("function")
        if function is None:
            raise Bad("a tool of type function needs the field function", "tools")
        found.append(function_tool(function, "parameters"))
    return tuple(found)


def function_tool(function: Fields, schema: str) -> dict[str, Any]:
    """A function as templates take it. schema: the field that holds its parameters."""
    name = function.text("name", None, 256)
    if not name:
        raise Bad("a function needs a name", "tools")
    parameters = function.table(schema)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": function.text("description", "") or "",
            "parameters": parameters.values if parameters is not None else {"type": "object"},
        },
    }


def chosen_tools(
    choice: Any, tools: tuple[dict[str, Any], ...]
) -> tuple[tuple[dict[str, Any], ...], str]:
    """(the tools that are offered to the model, "none", "auto" or "required") by `tool_choice`.

    With the name of a function only that one is offered, and "required" is said.
    """
    if choice in (None, "auto"):
        return tools, "auto"
    if choice == "none":
        return (), "none"
    if not tools:
        raise Bad("tool_choice needs tools", "tool_choice")
    if choice == "required":
        return tools, "required"
    name = None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
    named = tuple(tool for tool in tools if name and tool["function"]["name"] == name)
    if not named:
        raise Bad(
            f"tool_choice must be none, auto, required or one of the tools, not {quoted(choice)}",
            "tool_choice",
        )
    return named, "required"


def chat_prompt(chat: Chat, card: Card) -> Prompt:
    """The tokens that ask the model to answer a conversation. Raises Bad."""
    tokenizer = card.tokenizer
    if chat.tools and not getattr(tokenizer, "has_tool_calling", False):
        raise Bad(
            f"{card.model} has no format for tool calls that mlx-lm knows: leave tools out", "tools"
        )
    try:
        ids = prompt_tokens(chat.messages, tokenizer, chat.thinking, chat.tools, "messages")
    except MlxfunError as problem:
        raise Bad(str(problem), "messages") from None
    tokens = tuple(int(token) for token in ids)
    return Prompt(tokens, _thinks(tokens, tokenizer))


def _thinks(tokens: Sequence[int], tokenizer: Tokenizer) -> bool:
    if not getattr(tokenizer, "has_thinking", False):
        return False
    # Only the generation prompt can have opened it; what a user writes is further up.
    tail = list(tokens[-32:])
    opened = tokenizer.rfind_think_start(tail)  # type: ignore[attr-defined]
    return bool(opened > tokenizer.rfind_think_end(tail))  # type: ignore[attr-defined]


def plain_prompt(value: Any, card: Card) -> Prompt:
    """The tokens of a plain text, or of token ids. Raises Bad."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        tokens = text_ids(value, card.tokenizer)
    elif isinstance(value, list) and value and all(type(token) is int for token in value):
        known = card.vocabulary or len(card.tokenizer)  # type: ignore[arg-type]
        wrong = next((token for token in value if not 0 <= token < known), None)
        if wrong is not None:
            raise Bad(f"prompt: {quoted(wrong)} is no token; they are 0 to {known - 1:,}", "prompt")
        tokens = value
    else:
        raise Bad(f"prompt must be a text or a list of token ids, not {quoted(value)}", "prompt")
    if not tokens:
        raise Bad("prompt is empty: there is nothing to continue", "prompt")
    return Prompt(tuple(tokens))
