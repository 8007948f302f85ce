"""A/B decoding: two states of the weights answer the same prompt with the same seed, each with its
own KV cache.

With a plan staged the sides are the committed model and the candidate; with none, the checkpoint
without steering and the model as it is. They answer in turn, a few tokens of each. Then both read the
first one's answer, and at each of its tokens KL(p || q) = sum_v p (ln p - ln q), in nats, tells how
far the second side's next token distribution q is from the first's p, given the same text before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from math import ceil
from time import monotonic
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import Context
from mlxfun.data.datasets import prompt_tokens
from mlxfun.editing.editor import Editor
from mlxfun.errors import StateError, UsageError
from mlxfun.events import Side, Token
from mlxfun.generation.decoder import Decoded, Decoder, advance
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.reports import ABReport, Answer
from mlxfun.model.distributions import log_softmax

CHUNK = 64
"""Positions whose logits are compared at once: a large vocabulary makes them megabytes each."""

TURN_SECONDS = 0.1
"""How long a side's turn lasts at least: going to the other side takes a millisecond or two, and
more often than this nobody sees."""

EDITS_A_STEP = 3
"""Applied edits that may lie between the sides of a turn of one step."""


@dataclass(frozen=True, slots=True)
class ABSide:
    """One of the two. label: in words; live: makes it run; key: what its caches are valid for; turn:
    how many steps it takes at least before the other's turn, None for all.
    """

    name: Side
    label: str
    live: Callable[[], AbstractContextManager[None]]
    key: Callable[[], tuple[str, str]]
    turn: int | None = 1


def sides_of(editor: Editor) -> tuple[ABSide, ABSide]:
    """The two sides there are. Raises StateError when both would be the same."""
    if editor.staged is not None:
        return (
            ABSide("base", "current", lambda: editor.live("base"), editor.key),
            ABSide("candidate", "candidate", lambda: editor.live("candidate"), editor.key),
        )
    if editor.key() == (editor.root_state, ""):
        raise StateError(
            "there is nothing to compare: the model is as it was loaded; stage a plan, apply an "
            "edit or steer first"
        )
    turn = _turn(editor)
    return (
        ABSide("base", "checkpoint", lambda: editor.live("checkpoint"), editor.key, turn),
        ABSide("candidate", "current", lambda: editor.live("base"), editor.key, turn or 1),
    )


def _turn(editor: Editor) -> int | None:
    """Steps in a row so that going to the checkpoint and back costs a small part of them.

    An edit on the way swaps references, which was measured at 3 % of two tokens. One that has to
    read tensors back from the checkpoint's files costs more than an answer: None, then one side
    answers to its end before the other begins.
    """
    edits = editor.edits_to_root()
    if any(edits):
        return None
    return max(1, ceil(len(edits) / EDITS_A_STEP))


def compare(
    model: nn.Module,
    decoder: Decoder,
    editor: Editor,
    asked: tuple[str, GenerateOptions],
    ctx: Context,
) -> ABReport:
    """Ask both sides. asked: the text and how to answer it. Emits a Token for every token.

    Raises Cancelled when cancelled, UsageError for an empty text.
    """
    text, options = asked
    if not text.strip():
        raise UsageError("ab: the text is missing: ab TEXT")
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = [*system, {"role": "user", "content": text}]
    tokens = prompt_tokens(messages, decoder.tokenizer, options.thinking)
    prompt = [int(t) for t in tokens]
    pair = sides_of(editor)
    answers = _in_turn([_Reply(decoder, side, prompt, options, ctx) for side in pair], ctx)
    kl = _divergence(model, pair, prompt, answers[0].token_ids, ctx)
    return ABReport(
        prompt=text,
        base=answers[0],
        candidate=answers[1],
        first_divergence=first_difference(answers[0].token_ids, answers[1].token_ids),
        kl=kl,
        seed=options.seed,
    )


class _Reply:
    """A side's answer on its way. decoded: what came of it, once it is over."""

    def __init__(
        self,
        decoder: Decoder,
        side: ABSide,
        prompt: list[int],
        options: GenerateOptions,
        ctx: Context,
    ) -> None:
        self.decoded: Decoded | None = None
        self._side = side
        self._ctx = ctx
        self._pieces: list[str] = []
        self._steps = decoder.steps(prompt, options, side.key, self._hear, None, ctx)

    def _hear(self, index: int, token: int, text: str, experts: Any, weights: Any) -> None:
        self._pieces.append(text)
        self._ctx.emit(Token(0, self._side.name, index, token, text, experts, weights))

    def take_turn(self) -> None:
        """The side's steps in a row, fewer if the answer ends."""
        turn, until = self._side.turn, monotonic() + TURN_SECONDS
        with self._side.live():
            for step in count(1):
                self.decoded = advance(self._steps)
                if self.decoded is not None:
                    return
                if turn is not None and step >= turn and monotonic() >= until:
                    return

    def answer(self, decoded: Decoded) -> Answer:
        """What it came to."""
        return Answer(
            side=self._side.name,
            label=self._side.label,
            text=decoded.text,
            tokens=tuple(self._pieces),
            token_ids=decoded.tokens,
            finish_reason=decoded.finish_reason,
        )


def _in_turn(replies: Sequence[_Reply], ctx: Context) -> list[Answer]:
    """The answers; who has ended leaves the turns to the others. Raises Cancelled."""
    going = list(replies)
    while going:
        for reply in tuple(going):
            reply.take_turn()
            if reply.decoded is not None:
                going.remove(reply)
            if going:
                # Between turns and not within one: what steers now must not meet a borrowed side.
                ctx.interlude()
    # A cancel has ended each answer where it was, and each cache holds what that one has read.
    ctx.check()
    return [reply.answer(reply.decoded) for reply in replies if reply.decoded is not None]


def first_difference(one: Sequence[int], two: Sequence[int]) -> int | None:
    """The index of the first token that differs, None when the answers are the same.

    >>> first_difference((1, 2, 3), (1, 5, 3)), first_difference((1, 2), (1, 2, 3))
    (1, 2)
    >>> first_difference((1,), (1,)) is None
    True
    """
    for index, (x, y) in enumerate(zip(one, two, strict=False)):
        if x != y:
            return index
    return None if len(one) == len(two) else min(len(one), len(two))


def _divergence(
    model: nn.Module,
    pair: tuple[ABSide, ABSide],
    prompt: list[int],
    answer: Sequence[int],
    ctx: Context,
) -> tuple[float, ...]:
    """KL at each token of `answer`, both sides reading it."""
    if not answer:
        return ()
    tokens = mx.array([[*prompt, *answer[:-1]]])
    first = len(prompt) - 1
    logits = []
    for side in pair:
        ctx.check()
        with side.live():
            logits.append(model(tokens)[0, first:])
            mx.eval(logits[-1])
    out: list[float] = []
    for start in range(0, len(answer), CHUNK):
        p, q = (log_softmax(x[start : start + CHUNK]) for x in logits)
        kl = mx.sum(mx.exp(p) * (p - q), axis=-1)
        out += np.maximum(np.array(kl, dtype=np.float64), 0.0).tolist()
    return tuple(out)
