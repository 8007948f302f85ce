"""POST /v1/responses: OpenAI's newer API, which Codex speaks. Without memory: a request holds the
whole conversation."""

from __future__ import annotations

from dataclasses import replace
from time import time
from typing import Any
from uuid import uuid4

from mlxfun.serving.ask import Ask
from mlxfun.serving.http.answers import Wording, event
from mlxfun.serving.http.apis.chat import EFFORTS, limited, side_of
from mlxfun.serving.http.apis.structured import grammar_of, with_calls
from mlxfun.serving.http.errors import Bad, kind_of
from mlxfun.serving.http.fields import Fields
from mlxfun.serving.http.flow import Delta, Part, Turn
from mlxfun.serving.http.ours import Extras, extras_of, extras_said
from mlxfun.serving.http.prompts import (
    MESSAGES,
    ROLES,
    TOOLS,
    Chat,
    arguments_of,
    chat_prompt,
    chosen_tools,
    function_tool,
    text_of,
)
from mlxfun.serving.http.sampling import limit_of, sampling_of
from mlxfun.serving.http.tickets import Ticket
from mlxfun.serving.options import ServeOptions
from mlxfun.serving.service import Card


def responses_turn(fields: Fields, card: Card, options: ServeOptions) -> Turn:
    """A response as a request to the model. Raises Bad."""
    for name in ("previous_response_id", "conversation", "background"):
        if fields.raw(name):
            raise Bad(f"{name} is not kept here: send the whole conversation as input", name)
    chat = conversation(fields)
    text = fields.table("text")
    ask = Ask(
        prompt=(),
        max_tokens=limit_of(fields, ("max_output_tokens",), options.max_tokens),
        sampling=sampling_of(fields, card.vocabulary),
        side=side_of(fields.text("model"), card),
        grammar=grammar_of(text, card, "format") if text is not None else None,
    )
    ask = with_calls(ask, chat, card)
    prompt = chat_prompt(chat, card)
    most = limited(prompt.tokens, options, card, ask.max_tokens)
    ask = replace(ask, prompt=prompt.tokens, thinking=prompt.thinking, max_tokens=most)
    return Turn(extras_of(fields, card).on(ask), card.tokenizer, chat.tools)


def conversation(fields: Fields) -> Chat:
    """The conversation and its tools. Raises Bad."""
    messages: list[dict[str, Any]] = []
    instructions = fields.text("instructions")
    if instructions:
        messages.append({"role": "system", "content": instructions})
    given = fields.need("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        for item in fields.tables("input", MESSAGES):
            _item(item, messages)
    if not any(message["role"] != "system" for message in messages):
        raise Bad("input is empty: there is nothing to answer", "input")
    tools, choice = chosen_tools(fields.raw("tool_choice"), _tools(fields))
    one = not fields.switch("parallel_tool_calls", True)
    reasoning = fields.table("reasoning")
    effort = reasoning.choice("effort", EFFORTS, "") if reasoning is not None else ""
    thinks = None if not effort else effort != "none"
    return Chat(messages, tools, thinks, must_call=choice == "required", one_call=one)


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    # What is no function is run by OpenAI's own servers: it is not offered to the model.
    tools = fields.tables("tools", TOOLS)
    return tuple(function_tool(t, "parameters") for t in tools if t.text("type") == "function")


def _item(item: Fields, messages: list[dict[str, Any]]) -> None:
    match item.text("type", "message"):
        case "message":
            role = item.choice("role", ROLES, "user")
            role = "system" if role == "developer" else role
            messages.append({"role": role, "content": text_of(item, "content")})
        case "function_call":
            name = item.text("name")
            if not name:
                raise Bad("a function_call needs a name", "input")
            function = {"name": name, "arguments": arguments_of(item)}
            call = {"id": item.text("call_id", "") or "", "type": "function", "function": function}
            last = messages[-1] if messages else {}
            if last.get("role") == "assistant":
                last.setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        case "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": item.text("call_id", "") or "",
                    "content": text_of(item, "output"),
                }
            )
        case "reasoning" | "item_reference":
            pass
        case _:
            raise item.bad("type", "must be message, function_call or function_call_output")


class ResponsesWording(Wording):
    """Words answers as a response: items of text, reasoning and calls."""

    def __init__(self, turn: Turn, card: Card, fields: Fields) -> None:
        self._turn, self._card, self._fields = turn, card, fields
        self._id, self._created = f"resp_{uuid4().hex}", int(time())
        self._extras = Extras.of(turn.ask, card)
        self._number = -1
        self._items: list[dict[str, Any]] = []  # those that are complete
        self._open: dict[str, Any] | None = None
        self._said = ""
        self._thought = 0  # tokens of reasoning
        self._ticket: Ticket | None = None

    # -- streams ---------------------------------------------------------------------------------

    def begin(self, ticket: Ticket) -> bytes:
        self._ticket = ticket
        body = self._response("in_progress", None)
        return self._event("response.created", response=body) + self._event(
            "response.in_progress", response=body
        )

    def delta(self, delta: Delta) -> bytes:
        if delta.read is not None:
            return b""
        self._thought += delta.thought
        found = [self._part(part) for part in delta.parts]
        if delta.reason is not None:
            found.append(self._close())
            cut = delta.reason == "length"
            body = self._response("incomplete" if cut else "completed", delta)
            name = "response.incomplete" if cut else "response.completed"
            found.append(self._event(name, response=body))
        return b"".join(found)

    def failed(self, problem: Bad) -> bytes:
        body = self._response("failed", None)
        body["error"] = {"code": kind_of(problem.status), "message": problem.message}
        return self._event("response.failed", response=body)

    def _part(self, part: Part) -> bytes:
        if part.call is not None:
            found = self._close()
            item = _call_item(part, "in_progress") | {"arguments": ""}
            found += self._begin(item)
            at = {"item_id": item["id"], "output_index": len(self._items)}
            name = "response.function_call_arguments"
            found += self._event(f"{name}.delta", delta=part.call.arguments, **at)
            found += self._event(
                f"{name}.done", arguments=part.call.arguments, name=part.call.name, **at
            )
            done = _call_item(part, "completed") | {"id": item["id"]}
            return found + self._end(done)
        kind = "reasoning" if part.kind == "reasoning" else "message"
        found = b""
        if self._open is None or self._open["type"] != kind:
            found += self._close() + self._begin(_text_item(kind, ""))
            found += self._event("response.content_part.added", part=_content(kind, ""), **self._at)
        self._said += part.text
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        return found + self._event(f"response.{name}.delta", delta=part.text, **self._at, **more)

    @property
    def _at(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items), "content_index": 0}

    def _begin(self, item: dict[str, Any]) -> bytes:
        self._open, self._said = item, ""
        return self._event("response.output_item.added", item=item, output_index=len(self._items))

    def _close(self) -> bytes:
        """End the item of text that is being said."""
        if self._open is None:
            return b""
        kind = self._open["type"]
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        found = self._event(f"response.{name}.done", text=self._said, **self._at, **more)
        part = _content(kind, self._said)
        found += self._event("response.content_part.done", part=part, **self._at)
        return found + self._end(_text_item(kind, self._said, self._open["id"]))

    def _end(self, item: dict[str, Any]) -> bytes:
        found = self._event("response.output_item.done", item=item, output_index=len(self._items))
        self._items.append(item)
        self._open = None
        return found

    def _event(self, kind: str, /, **data: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **data}, kind)

    # -- whole answers ---------------------------------------------------------------------------

    def whole(self, delta: Delta, ticket: Ticket) -> dict[str, Any]:
        self._ticket, self._thought = ticket, delta.thought
        for part in delta.parts:
            kind = "reasoning" if part.kind == "reasoning" else "message"
            call = part.call is not None
            item = _call_item(part, "completed") if call else _text_item(kind, part.text)
            self._items.append(item)
        status = "incomplete" if delta.reason == "length" else "completed"
        return self._response(status, delta)

    def _response(self, status: str, delta: Delta | None) -> dict[str, Any]:
        fields, sampling = self._fields, self._turn.ask.sampling
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        body = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": fields.raw("instructions"),
            "max_output_tokens": self._turn.ask.max_tokens,
            "metadata": {},
            "model": self._card.model,
            "output": list(self._items),
            "parallel_tool_calls": not self._turn.ask.one_call,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tool_choice": fields.raw("tool_choice") or "auto",
            "tools": fields.raw("tools") or [],
            "usage": self._usage(delta) if delta is not None else None,
        }
        routing = delta.routing if delta is not None else ()
        return body | extras_said(self._extras, self._ticket, routing)

    def _usage(self, delta: Delta) -> dict[str, Any]:
        prompt = len(self._turn.ask.prompt)
        admitted = self._ticket.admitted if self._ticket is not None else None
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": admitted.cached_tokens if admitted else 0},
            "output_tokens": delta.tokens,
            "output_tokens_details": {"reasoning_tokens": self._thought},
            "total_tokens": prompt + delta.tokens,
        }


def _content(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": []}


def _text_item(kind: str, text: str, number: str | None = None) -> dict[str, Any]:
    prefix = "rs" if kind == "reasoning" else "msg"
    item: dict[str, Any] = {"type": kind, "id": number or f"{prefix}_{uuid4().hex[:24]}"}
    content = [_content(kind, text)] if text else []
    if kind == "reasoning":
        return item | {"summary": [], "content": content}
    return item | {
        "role": "assistant",
        "status": "completed" if text else "in_progress",
        "content": content,
    }


def _call_item(part: Part, status: str) -> dict[str, Any]:
    assert part.call is not None
    return {
        "type": "function_call",
        "id": f"fc_{uuid4().hex[:24]}",
        "call_id": part.call.id,
        "name": part.call.name,
        "arguments": part.call.arguments,
        "status": status,
    }
