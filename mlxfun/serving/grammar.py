"""Answers that follow a JSON schema, by llguidance: tokens that would break it are barred.

The library is an extra; it is imported by the functions that use it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxfun.data.datasets import Tokenizer


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


class Constraint:
    """A processor of logits that leaves the tokens with which the answer can still follow a schema.

    after: the tokens that end thinking, where the prompt has opened it; until they come nothing is
    barred. It waits for the token before, so that a batch with one in it keeps the device less busy.
    """

    def __init__(
        self,
        schema: str,
        tokenizer: Tokenizer,
        size: int,
        stops: Collection[int],
        after: Sequence[int] = (),
    ) -> None:
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask

        self._matcher = LLMatcher(_vocabulary(cast(Hashable, tokenizer), size), _grammar(schema))
        self._mask = allocate_token_bitmask(1, size)
        self._size, self._stops, self._after = size, sorted(stops), tuple(after)
        self._tail: tuple[int, ...] = ()
        self._begun = False

    def __call__(self, context: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, V] with -inf for what would break the schema. context: tokens so far [T]."""
        if self._begun:
            self._said(int(np.array(context[-1])))
        self._begun = True
        if self._after:
            return logits
        return mx.where(mx.array(self._allowed(logits.shape[-1])), logits, -mx.inf)

    def _said(self, token: int) -> None:
        if self._after:
            self._tail = (*self._tail, token)[-len(self._after) :]
            if self._tail == self._after:
                self._after = ()
        elif token not in self._stops:
            self._matcher.consume_token(token)

    def _allowed(self, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        from llguidance.numpy import fill_next_token_bitmask

        allowed = np.zeros(width, dtype=np.bool_)
        if not self._matcher.is_stopped():
            fill_next_token_bitmask(self._matcher, self._mask, 0)
            bits = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little")
            known = min(width, self._size)
            allowed[:known] = bits[:known].astype(np.bool_)
        if self._matcher.is_stopped() or self._matcher.is_accepting() or not allowed.any():
            allowed[self._stops] = True
        return allowed
