"""Token ids of conversations, by the tokenizer's chat template.

Without a template the contents are joined by newlines, and that is counted as a remark on the data.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlxfun.data.conversations import REASONING
from mlxfun.data.lines import BrokenLine, Message
from mlxfun.data.templates.bounds import bounded
from mlxfun.errors import DatasetError

Tokens = NDArray[np.int32]

NO_TEMPLATE = "as turns joined by newlines, since the model has no chat template"
NO_TOOLS = "with tools that the chat template has no place for"
NO_REASONING = "with reasoning that the chat template has no place for"
QUOTED = 200
"""Characters of somebody else's text that a message quotes at most."""


class Tokenizer(Protocol):
    """What the engine needs of mlx-lm's TokenizerWrapper."""

    has_chat_template: bool

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    @property
    def detokenizer(self) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...

    def decode(self, tokens: Sequence[int], **options: Any) -> str: ...

    def apply_chat_template(self, messages: list[Message], **options: Any) -> Any: ...


def prompt_tokens(
    messages: list[Message],
    tokenizer: Tokenizer,
    thinking: bool | None = None,
    tools: Sequence[Message] = (),
    where: str = "chat",
) -> Tokens:
    """int32 [T]: the conversation and the generation prompt that asks the assistant to answer.

    thinking: switch reasoning on or off where the template knows it; None keeps its default.
    Without a template the contents are joined by newlines.

    Raises DatasetError where the template refuses the conversation, or makes nothing of it.
    """
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    ids = chat_ids(messages, tokenizer, where, tools, add_generation_prompt=True, **options)
    if not ids:
        raise DatasetError(
            f"{where}: the model's chat template makes nothing of this conversation; give another "
            "with load --chat-template FILE"
        )
    return np.asarray(ids, dtype=np.int32)


def chat_ids(
    messages: list[Message],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] = (),
    **options: Any,
) -> list[int]:
    """The ids of a conversation. Raises BrokenLine where the template refuses it."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode("\n".join(m["content"] for m in messages))
    from jinja2 import TemplateError

    if tools:
        options["tools"] = [dict(tool) for tool in tools]
    try:
        with bounded(where):
            result = tokenizer.apply_chat_template(messages, **options)
    except (
        TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if len(text) <= QUOTED else f"{text[:QUOTED]}..."
        what = f"the model's chat template refuses this conversation: {text}"
        raise BrokenLine(where, what) from error
    return _ids(result)


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of plain text. One that is a rendered conversation has its BOS in it already."""
    ids = list(tokenizer.encode(text))
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    return ids


def remarks(
    messages: Sequence[Message], tools: Sequence[Message], tokenizer: Tokenizer
) -> list[str]:
    """What the template (or its absence) leaves out of a conversation."""
    if not tokenizer.has_chat_template:
        return [NO_TEMPLATE]
    template = _template_text(tokenizer)
    if template is None:
        return []
    found = [NO_TOOLS] if tools and "tools" not in template else []
    if any(m.get(k) for m in messages for k in REASONING):
        found += [NO_REASONING] if not any(k in template for k in REASONING) else []
    return found


def _template_text(tokenizer: Tokenizer) -> str | None:
    """The text of the templates, None where a model is rendered by code."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else None


def _ids(result: Any) -> list[int]:
    """Token ids from whatever shape apply_chat_template returns (it changed between releases)."""
    if hasattr(result, "keys"):
        result = result["input_ids"]
    if hasattr(result, "ids"):
        result = result.ids
    if len(result) == 1 and not isinstance(result[0], int | np.integer):
        result = result[0]
    return [int(token) for token in result]
