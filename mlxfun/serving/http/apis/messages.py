"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients (Claude Code) speak them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import uuid4

from mlxfun.serving.ask import Ask, WishedSide
from mlxfun.serving.http.answers import Wording, event
from mlxfun.serving.http.apis.chat import limited, side_of
from mlxfun.serving.http.apis.structured import with_calls
from mlxfun.serving.http.errors import Bad, anthropic_error
from mlxfun.serving.http.fields import Fields
from mlxfun.serving.http.flow import Delta, Part, Turn
from mlxfun.serving.http.ours import Extras, extras_of, extras_said
from mlxfun.serving.http.prompts import (
    MESSAGES,
    PARTS,
    TOOLS,
    Chat,
    chat_prompt,
    chosen_tools,
    function_tool,
    text_of,
)
from mlxfun.serving.http.sampling import limit_of, sampling_of, stops_of
from mlxfun.serving.http.tickets import Ticket
from mlxfun.serving.http.tools import ToolCall
from mlxfun.serving.options import ServeOptions
from mlxfun.serving.service import Card


def messages_turn(fields: Fields, card: Card, options: ServeOptions) -> Turn:
    """A message as a request to the model. Raises Bad."""
    fields.need("max_tokens")
    chat = conversation(fields)
    ask = Ask(
        prompt=(),
        max_tokens=limit_of(fields, ("max_tokens",), options.max_tokens),
        sampling=sampling_of(fields, card.vocabulary),
        stop=stops_of(fields, "stop_sequences"),
        side=_side(fields.text("model"), card),
    )
    ask = with_calls(ask, chat, card)
    prompt = chat_prompt(chat, card)
    most = limited(prompt.tokens, options, card, ask.max_tokens)
    ask = replace(ask, prompt=prompt.tokens, thinking=prompt.thinking, max_tokens=most)
    return Turn(extras_of(fields, card).on(ask), card.tokenizer, chat.tools)


def count(fields: Fields, card: Card) -> int:
    """How many tokens the prompt of a message has. Raises Bad."""
    _side(fields.text("model"), card)
    return len(chat_prompt(conversation(fields), card).tokens)


def _side(model: str | None, card: Card) -> WishedSide:
    """Claude Code names a model of its own, whatever it is served by."""
    return "live" if model is not None and model.startswith("claude") else side_of(model, card)


def conversation(fields: Fields) -> Chat:
    """The conversation and its tools. Raises Bad."""
    fields.need("messages")
    messages: list[dict[str, Any]] = []
    system = text_of(fields, "system")
    if system:
        messages.append({"role": "system", "content": system})
    for entry in fields.tables("messages", MESSAGES):
        messages += _message(entry)
    if not any(message["role"] != "system" for message in messages):
        raise Bad("messages is empty: there is nothing to answer", "messages")
    choice = fields.table("tool_choice")
    wanted: Any = None
    if choice is not None:
        kind = choice.choice("type", ("auto", "any", "tool", "none"), "auto")
        named = {"type": "function", "function": {"name": choice.raw("name")}}
        wanted = {"any": "required", "tool": named}.get(kind, kind)
    one = choice is not None and choice.switch("disable_parallel_tool_use")
    tools, chosen = chosen_tools(wanted, _tools(fields))
    thinking = fields.table("thinking")
    kinds = ("enabled", "disabled", "adaptive")
    wish = thinking.choice("type", kinds, "enabled") if thinking is not None else ""
    thinks = {"enabled": True, "disabled": False}.get(wish)
    return Chat(messages, tools, thinks, must_call=chosen == "required", one_call=one)


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    # Tools of other types are run by Anthropic's own servers: they are not offered to the model.
    tools = fields.tables("tools", TOOLS)
    custom = [tool for tool in tools if tool.text("type", "custom") == "custom"]
    return tuple(function_tool(tool, "input_schema") for tool in custom)


def _message(entry: Fields) -> list[dict[str, Any]]:
    """A message as one or more: results of tools are messages of their own."""
    entry.need("role")
    role = entry.choice("role", ("user", "assistant", "system"), "user")
    content = entry.need("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise entry.bad("content", "must be a text or a list of blocks")
    results: list[dict[str, Any]] = []
    said: dict[str, Any] = {"role": role, "content": ""}
    for block in entry.tables("content", PARTS):
        _block(block, said, results)
    own = bool(said["content"] or said.get("tool_calls") or said.get("reasoning_content"))
    # Results come first: they answer the calls of the message before.
    return [*results, *([said] if own or not results else [])]


def _block(block: Fields, said: dict[str, Any], results: list[dict[str, Any]]) -> None:
    match block.text("type"):
        case "text":
            said["content"] += block.text("text", "") or ""
        case "thinking":
            said["reasoning_content"] = block.text("thinking", "") or ""
        case "redacted_thinking":
            pass  # only Anthropic's servers can read it
        case "tool_use":
            name = block.text("name")
            if not name:
                raise Bad("a tool_use block needs a name", "messages")
            arguments = block.table("input")
            call = {"name": name, "arguments": arguments.values if arguments is not None else {}}
            call_ = {"id": block.text("id", "") or "", "type": "function", "function": call}
            said.setdefault("tool_calls", []).append(call_)
        case "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": block.text("tool_use_id", "") or "",
                    "content": text_of(block, "content"),
                }
            )
        case _:
            raise block.bad("type", "must be text, thinking, tool_use or tool_result")


class AnthropicWording(Wording):
    """Words answers as messages: blocks of text, thinking and tool use."""

    keep_alive = event({"type": "ping"}, "ping")

    def __init__(self, turn: Turn, card: Card, fields: Fields) -> None:
        self._turn = turn
        self._model = fields.text("model") or card.model
        self._id = f"msg_{uuid4().hex[:24]}"
        self._extras = Extras.of(turn.ask, card)
        self._open: str | None = None  # the kind of the block that is being said
        self._index = -1
        self._calls = False
        self._ticket: Ticket | None = None

    def begin(self, ticket: Ticket) -> bytes:
        self._ticket = ticket
        message = self._message([], None) | {"usage": self._usage(0)}
        return event({"type": "message_start", "message": message}, "message_start")

    def delta(self, delta: Delta) -> bytes:
        if delta.read is not None:
            return b""
        found = [self._part(part) for part in delta.parts]
        if delta.reason is None:
            return b"".join(found)
        found.append(self._close())
        last = {
            "type": "message_delta",
            "delta": {"stop_reason": self._reason(delta), "stop_sequence": delta.stop},
            "usage": self._usage(delta.tokens),
        }
        found.append(event(last | extras_said(self._extras, self._ticket), "message_delta"))
        found.append(event({"type": "message_stop"}, "message_stop"))
        return b"".join(found)

    def failed(self, problem: Bad) -> bytes:
        return event(anthropic_error(problem.status, problem.message), "error")

    def whole(self, delta: Delta, ticket: Ticket) -> dict[str, Any]:
        self._ticket = ticket
        self._calls = bool(delta.calls)
        blocks = [_block_json(part) for part in delta.parts]
        found = self._message(blocks, self._reason(delta)) | {"usage": self._usage(delta.tokens)}
        found["stop_sequence"] = delta.stop
        return found | extras_said(self._extras, ticket, delta.routing)

    def _part(self, part: Part) -> bytes:
        if part.call is not None:
            return self._call(part.call)
        found = b""
        if self._open != part.kind:
            found += self._close() + self._start(part.kind, _block_json(Part(part.kind)))
        name = "thinking" if part.kind == "reasoning" else "text"
        return found + self._changed({"type": f"{name}_delta", name: part.text})

    def _call(self, call: ToolCall) -> bytes:
        self._calls = True
        empty = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        found = self._close() + self._start("call", empty)
        found += self._changed({"type": "input_json_delta", "partial_json": call.arguments})
        return found + self._close()

    def _start(self, kind: str, block: dict[str, Any]) -> bytes:
        self._open, self._index = kind, self._index + 1
        data = {"type": "content_block_start", "index": self._index, "content_block": block}
        return event(data, "content_block_start")

    def _changed(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return event(data, "content_block_delta")

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return event({"type": "content_block_stop", "index": self._index}, "content_block_stop")

    def _message(self, content: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
        }

    def _reason(self, delta: Delta) -> str:
        if delta.reason == "length":
            return "max_tokens"
        if delta.stop is not None:
            return "stop_sequence"
        return "tool_use" if self._calls else "end_turn"

    def _usage(self, tokens: int) -> dict[str, int]:
        """input_tokens are those that were read; those from the cache are counted beside them."""
        admitted = self._ticket.admitted if self._ticket is not None else None
        cached = admitted.cached_tokens if admitted is not None else 0
        return {
            "input_tokens": len(self._turn.ask.prompt) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": tokens,
        }


def _block_json(part: Part) -> dict[str, Any]:
    if part.call is not None:
        try:
            given = json.loads(part.call.arguments)
        except ValueError:
            given = None
        given = given if isinstance(given, dict) else {"arguments": part.call.arguments}
        return {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": given}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}
