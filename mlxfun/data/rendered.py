"""Conversations that a data set holds as text, with the markers of the model's chat template in it.

Such a text goes to the model as it is: through the template once more it would be one turn that
quotes a conversation. It is told by how it begins: with the tokenizer's own BOS, with the token that
the template begins a turn with, or with all that the template writes ahead of a turn.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from mlxfun.data.chat import Tokenizer
from mlxfun.data.lines import BrokenLine, Line, Message
from mlxfun.data.templates.bounds import bounded

RENDERED = "already rendered by the chat template, and taken as they are"

_PROBE = "mlxfunprobe"
_SHORTEST = 3
"""A beginning that is no token must be this long, and hold more than letters."""


@dataclass(frozen=True, slots=True)
class Marks:
    """How a tokenizer's rendered conversations begin and end.

    bos: text of the token that begins every text, "" without one. begins_with_bos: whether the
    template writes it. starts: beginnings of a turn. ask: the generation prompt.
    """

    bos: str
    begins_with_bos: bool
    starts: tuple[str, ...]
    ask: str

    def begin(self, text: str) -> bool:
        """Whether `text` is a rendered conversation."""
        text = text.lstrip()
        return bool(self.bos and text.startswith(self.bos)) or text.startswith(self.starts)


_known: WeakKeyDictionary[Any, tuple[Any, Marks]] = WeakKeyDictionary()


def marks(tokenizer: Tokenizer) -> Marks:
    """Those of a tokenizer; its template runs once for as long as it is the same."""
    template = getattr(tokenizer, "chat_template", None)
    with suppress(KeyError):
        before, found = _known[tokenizer]
        if before is template:
            return found
    found = _marks(tokenizer)
    _known[tokenizer] = template, found
    return found


def _marks(tokenizer: Tokenizer) -> Marks:
    bos = _text(getattr(tokenizer, "bos_token", None))
    texts = [_render(tokenizer, [{"role": role, "content": _PROBE}]) for role in ("user", "system")]
    starts: list[str] = []
    for text in texts:
        ahead, found, _ = text.partition(_PROBE)
        ahead = ahead.removeprefix(bos).strip()
        if found and (start := _start(ahead, tokenizer)):
            starts.append(start)
    plain, asking = texts[0], _render(tokenizer, [{"role": "user", "content": _PROBE}], ask=True)
    ask = asking.removeprefix(plain) if asking.startswith(plain) else ""
    return Marks(bos, bool(bos) and plain.startswith(bos), tuple(starts), ask)


def _start(ahead: str, tokenizer: Tokenizer) -> str:
    """What a turn begins with: the first token of its own, or all that stands ahead of its text."""
    tokens = _added(tokenizer)
    own = max((t for t in tokens if t and ahead.startswith(t)), key=len, default="")
    if own:
        return own
    return ahead if len(ahead) >= _SHORTEST and not ahead.isalnum() else ""


def _added(tokenizer: Tokenizer) -> list[str]:
    """Texts of the tokens that stand for themselves, special or added."""
    found = [_text(token) for token in getattr(tokenizer, "all_special_tokens", ())]
    added = getattr(tokenizer, "get_added_vocab", None)
    return found + ([_text(token) for token in added()] if added is not None else [])


def _text(token: Any) -> str:
    return "" if token is None else str(token)


def _render(tokenizer: Tokenizer, messages: list[Message], ask: bool = False) -> str:
    """The text of a conversation, "" where the template refuses it or makes no text."""
    if not tokenizer.has_chat_template:
        return ""
    from jinja2 import TemplateError

    with suppress(
        TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RuntimeError, BrokenLine,
    ), bounded("the first rendered sample"):  # fmt: skip
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return found if isinstance(found, str) else ""
    return ""


def as_rendered(line: Line, tokenizer: Tokenizer) -> Line:
    """`line`, of kind "rendered" if its text is a rendered conversation."""
    if line.kind not in ("prompt", "text"):
        return line
    head = line.text.lstrip()[:1]
    # Rendered conversations begin with a sign; most texts do not, and need no look at the template.
    if not head or head.isalnum() or not marks(tokenizer).begin(line.text):
        return line
    payload = (line.payload, "") if isinstance(line.payload, str) else line.payload
    return replace(line, kind="rendered", payload=payload, notes=(*line.notes, RENDERED))


def rendered_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a rendered conversation, with the one BOS that the template would have written."""
    found = marks(tokenizer)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not found.bos:
        return ids
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids if ids[:1] == [bos] or not found.begins_with_bos else [bos, *ids]


def asked_ids(line: Line, tokenizer: Tokenizer) -> list[int]:
    """The ids that ask for an answer to the prompt of a rendered line."""
    text, ask = str(line.payload[0]), marks(tokenizer).ask
    if ask.strip() and not text.rstrip().endswith(ask.strip()):
        text += ask
    return rendered_ids(text, tokenizer)
