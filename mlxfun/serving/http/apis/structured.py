"""`response_format`: what an answer must look like."""

from __future__ import annotations

import json

from mlxfun.serving import grammar
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields
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
