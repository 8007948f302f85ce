"""Two sides of an edit asked the same thing: same prompt, same seed, a KV cache of its own each.

With a plan staged the sides are the committed model and the candidate; with none, the checkpoint
without steering and the model as it is. Both answer; then both read the first one's answer, and at
each of its tokens KL(p || q) = sum_v p (ln p - ln q), in nats, tells how far the second side's next
token distribution q is from the first's p, given the same text before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.context import Context
from mlxfun.datasets import prompt_tokens
from mlxfun.editor import Editor
from mlxfun.errors import StateError, UsageError
from mlxfun.events import Token
from mlxfun.generate import Decoder
from mlxfun.hand_reports import ABReport, Answer
from mlxfun.options import GenerateOptions

CHUNK = 64
"""Positions whose logits are compared at once: a large vocabulary makes them megabytes each."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two. label: in words; name: "base" or "candidate"; live: makes it run; key: what
    its caches are valid for."""

    name: str
    label: str
    live: Callable[[], AbstractContextManager[None]]
    key: Callable[[], tuple[str, str]]


def sides_of(editor: Editor) -> tuple[Side, Side]:
    """The two sides there are. Raises StateError when both would be the same."""
    if editor.staged is not None:
        return (
            Side("base", "committed model", lambda: editor.live("current"), editor.key),
            Side("candidate", "staged plan", lambda: editor.live("staged"), editor.key),
        )
    root = editor.history.root.state
    if editor.key() == (root, ""):
        raise StateError(
            "there is nothing to compare: the model is as it was loaded; stage a plan, apply an "
            "edit or steer first"
        )
    # While the checkpoint is borrowed the editor still names the current state.
    return (
        Side("base", "checkpoint", lambda: editor.live("checkpoint"), lambda: (root, "")),
        Side("candidate", "current state", lambda: editor.live("current"), editor.key),
    )


def compare(
    model: Any, decoder: Decoder, editor: Editor, asked: tuple[str, GenerateOptions], ctx: Context
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
    answers = [_answer(decoder, side, prompt, options, ctx) for side in pair]
    kl = _divergence(model, pair, prompt, answers[0].token_ids, ctx)
    return ABReport(
        prompt=text,
        base=answers[0],
        candidate=answers[1],
        first_divergence=first_difference(answers[0].token_ids, answers[1].token_ids),
        kl=kl,
        seed=options.seed,
    )


def _answer(
    decoder: Decoder, side: Side, prompt: list[int], options: GenerateOptions, ctx: Context
) -> Answer:
    pieces: list[str] = []

    def on_token(index: int, token: int, text: str, experts: Any, weights: Any) -> None:
        pieces.append(text)
        ctx.emit(Token(0, side.name, index, token, text, experts, weights))

    with side.live():
        decoded = decoder.run(prompt, options, side.key, on_token, None, ctx)
    ctx.check()
    return Answer(
        side=side.name,
        label=side.label,
        text=decoded.text,
        tokens=tuple(pieces),
        token_ids=decoded.tokens,
        finish_reason=decoded.finish_reason,
    )


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
    model: Any, pair: tuple[Side, Side], prompt: list[int], answer: Sequence[int], ctx: Context
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
        p, q = (_log_softmax(x[start : start + CHUNK]) for x in logits)
        kl = mx.sum(mx.exp(p) * (p - q), axis=-1)
        out += np.maximum(np.array(kl, dtype=np.float64), 0.0).tolist()
    return tuple(out)


def _log_softmax(logits: mx.array) -> mx.array:
    wide = logits.astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)
