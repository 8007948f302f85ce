"""Answers that follow a JSON schema, or are calls of tools, by llguidance: other tokens are barred.

The library is an extra; it is imported by the functions that use it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np

from mlxfun.data.datasets import Tokenizer
from mlxfun.serving.ask import Calls

Allowed = np.ndarray[Any, np.dtype[np.bool_]]

Stage = Literal["begin", "inside", "end", "over", "free"]
"""Where an answer of calls stands: in a marker, between them, behind them, or left to the model."""


def available() -> bool:
    """Whether the library is installed."""
    return find_spec("llguidance") is not None


SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One line, as models are used to: with free spacing a model may write blank lines for ever."""


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Hashable, size: int) -> Any:
    """The library's view of a tokenizer; takes a moment for a large one."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(cast(Any, getattr(tokenizer, "_tokenizer", tokenizer)), n_vocab=size)


def _grammar(schema: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(schema, overrides=SPACING))


def problem(schema: str, tokenizer: Tokenizer, size: int) -> str:
    """What is wrong with a JSON schema, "" for nothing. size: tokens in the vocabulary."""
    from llguidance import LLMatcher

    try:
        grammar = _grammar(schema)
        return str(
            LLMatcher.validate_grammar(grammar, _vocabulary(cast(Hashable, tokenizer), size))
        )
    except Exception as error:  # noqa: BLE001
        # The library raises what it likes on what a client made up.
        return str(error) or type(error).__name__


class _Schema:
    """Which tokens may come next in a text that follows a schema. size: tokens in the vocabulary."""

    def __init__(self, schema: str, tokenizer: Tokenizer, size: int) -> None:
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask

        self._matcher = LLMatcher(_vocabulary(cast(Hashable, tokenizer), size), _grammar(schema))
        self._mask = allocate_token_bitmask(1, size)
        self._size = size

    def said(self, token: int) -> None:
        """The next token of the text."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_stopped() or self._matcher.is_accepting())

    def allowed(self, width: int) -> Allowed:
        """bool [width]: whether a token may come next."""
        from llguidance.numpy import fill_next_token_bitmask

        allowed = np.zeros(width, dtype=np.bool_)
        if not self._matcher.is_stopped():
            fill_next_token_bitmask(self._matcher, self._mask, 0)
            bits = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little")
            known = min(width, self._size)
            allowed[:known] = bits[:known].astype(np.bool_)
        return allowed


class _Barred:
    """A processor of logits that leaves some tokens.

    after: the tokens that end thinking, where the prompt has opened it; until they come nothing is
    barred. It waits for the token before, so that a batch with one in it keeps the device less busy.
    """

    def __init__(self, stops: Collection[int], after: Sequence[int]) -> None:
        self._stops, self._after = sorted(stops), tuple(after)
        self._tail: tuple[int, ...] = ()
        self._begun = False

    def __call__(self, context: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, V] with -inf for what is barred. context: tokens so far [T]."""
        if self._begun:
            self._heard(int(np.array(context[-1])))
        self._begun = True
        allowed = None if self._after else self._allowed(logits.shape[-1])
        return logits if allowed is None else mx.where(mx.array(allowed), logits, -mx.inf)

    def _heard(self, token: int) -> None:
        if self._after:
            self._tail = (*self._tail, token)[-len(self._after) :]
            if self._tail == self._after:
                self._after = ()
        elif token not in self._stops:
            self._said(token)

    def _said(self, token: int) -> None:
        raise NotImplementedError

    def _allowed(self, width: int) -> Allowed | None:
        """bool [width], None for all."""
        raise NotImplementedError


class Constraint(_Barred):
    """Leaves the tokens with which the answer can still follow a schema."""

    def __init__(
        self,
        schema: str,
        tokenizer: Tokenizer,
        size: int,
        stops: Collection[int],
        after: Sequence[int] = (),
    ) -> None:
        super().__init__(stops, after)
        self._schema = _Schema(schema, tokenizer, size)

    def _said(self, token: int) -> None:
        self._schema.said(token)

    def _allowed(self, width: int) -> Allowed:
        allowed = self._schema.allowed(width)
        if self._schema.complete or not allowed.any():
            allowed[self._stops] = True
        return allowed


class CallConstraint(_Barred):
    """Leaves the tokens of which calls of tools are made: a marker, what follows their schema, a
    marker, and then the end or another call. Where they have no schema, only the first marker is
    certain, and what the model makes of it is its own."""

    def __init__(
        self,
        calls: Calls,
        tokenizer: Tokenizer,
        size: int,
        stops: Collection[int],
        after: Sequence[int] = (),
    ) -> None:
        super().__init__(stops, after)
        self._calls, self._of = calls, (tokenizer, size)
        self._stage: Stage = "begin"
        self._due = list(calls.begin)  # of a marker
        self._schema: _Schema | None = None

    def _said(self, token: int) -> None:
        match self._stage:
            case "inside" if self._schema is not None and not self._schema.complete:
                self._schema.said(token)
                return
            case "inside":
                self._stage, self._due = "end", list(self._calls.end)
            case "over":
                self._stage, self._due = "begin", list(self._calls.begin)
            case "begin" | "end" | "free":
                pass
        if self._due:
            self._due.pop(0)
        if not self._due:
            self._pass()

    def _pass(self) -> None:
        """A marker is complete."""
        if self._stage == "end":
            self._stage = "over"
        elif self._stage == "begin" and self._calls.schema:
            self._stage, self._schema = "inside", _Schema(self._calls.schema, *self._of)
        else:
            self._stage = "free"

    def _allowed(self, width: int) -> Allowed | None:
        only = np.zeros(width, dtype=np.bool_)
        match self._stage:
            case "free":
                return None
            case "inside" if self._schema is not None and not self._schema.complete:
                return self._schema.allowed(width)
            case "inside":
                only[self._calls.end[0]] = True
            case "over":
                only[self._stops] = True
                only[self._calls.begin[0]] |= self._calls.several
            case _:
                only[self._due[0]] = True
        return only
