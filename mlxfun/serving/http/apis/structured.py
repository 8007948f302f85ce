"""`response_format` and `tool_choice`: what an answer must look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlxfun.serving import grammar
from mlxfun.serving.ask import Ask, Calls
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields
from mlxfun.serving.http.prompts import Chat
from mlxfun.serving.service import Card
from mlxfun.text import brief

INSTALL = "this server was started without the library for it: pip install 'mlxfun[structured]'"
LONGEST = 256 << 10


def grammar_of(fields: Fields, card: Card, name: str = "response_format") -> str | None:
    """The JSON schema that the answer must follow, as text; None for plain text. Raises Bad."""
    table = fields.table(name)
    if table is None:
        return None
    table.need("type")
    kind = table.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "text":
        return None
    if not grammar.available():
        raise Bad(f"{name} {kind}: {INSTALL}", name)
    text = json.dumps({"type": "object"} if kind == "json_object" else _schema(table).values)
    if len(text) > LONGEST:
        raise Bad(f"{name}: the schema has more than {LONGEST:,} characters", name)
    wrong = grammar.problem(text, card.tokenizer, size_of(card))
    if wrong:
        raise Bad(f"{name}: the schema cannot be followed: {' '.join(brief(wrong).split())}", name)
    return text


def with_calls(ask: Ask, chat: Chat, card: Card) -> Ask:
    """A request with what `tool_choice` and `parallel_tool_calls` say about its answer. Raises Bad.

    Calls are held to the schema of their function where the model writes them as JSON. Models with
    formats of their own are made to begin one, and finish it as they have learnt.
    """
    ask = replace(ask, tools=bool(chat.tools), one_call=chat.one_call)
    if not chat.must_call:
        return ask
    if ask.grammar is not None:
        raise Bad(
            "tool_choice and response_format exclude each other: leave one out", "tool_choice"
        )
    tokenizer: Any = card.tokenizer
    parser = getattr(tokenizer, "tool_parser", None)
    if parser is None:
        raise Bad(
            f"{card.model} has no format for tool calls that mlx-lm knows: leave tools out", "tools"
        )
    begin, end, schema = tokenizer.tool_call_start, tokenizer.tool_call_end or "", ""
    if parser.__module__.endswith("json_tools") and grammar.available():
        begin, end, schema = f"{begin}\n", f"\n{end}", json.dumps(_one_of(chat.tools))
        wrong = grammar.problem(schema, card.tokenizer, size_of(card))
        if wrong:
            said = " ".join(brief(wrong).split())
            raise Bad(f"tools: the schema of parameters cannot be followed: {said}", "tools")
    first, last = (tuple(tokenizer.encode(m, add_special_tokens=False)) for m in (begin, end))
    return replace(ask, calls=Calls(schema, first, last, several=not chat.one_call))


def _one_of(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a call of one of some tools, as Hermes-style models write it."""
    return {"anyOf": [_call(tool["function"]) for tool in tools]}


def _call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = {"type": "object"} | function["parameters"]
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _schema(table: Fields) -> Fields:
    """OpenAI's two APIs differ by one level."""
    inner = table.table("json_schema")
    found = (inner if inner is not None else table).table("schema")
    if found is None:
        raise Bad("response_format json_schema needs a schema", "response_format")
    return found


def size_of(card: Card) -> int:
    """Tokens in the vocabulary."""
    return card.vocabulary or len(card.tokenizer)  # type: ignore[arg-type]
