"""`response_format`: what an answer must look like."""

from __future__ import annotations

from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields
from mlxfun.serving.service import Card

INSTALL = "this server was started without a library for it: pip install 'mlxfun[structured]'"


def grammar_of(fields: Fields, _card: Card, name: str = "response_format") -> str | None:
    """The JSON schema that the answer must follow, as text; None for plain text. Raises Bad."""
    table = fields.table(name)
    if table is None:
        return None
    table.need("type")
    kind = table.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "text":
        return None
    raise Bad(f"{name} {kind}: {INSTALL}", name)
