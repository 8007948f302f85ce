"""Effect of an edit on refusals and on harmless answers, measured on prompts.

Whole answers are decoded greedily and judged by mlxfun.evaluation.refusal_rule. A search cannot afford that for
every trial. Where it can be told from the first token whether an answer will be a refusal (checked
on the unedited model's own answers), a trial is one forward of the prompts: with w_t the share of
refusals among the answers that began with token t, and p the distribution where the answer begins,

    expected refusals = mean over prompts of sum_t w_t p_t

KL is KL(before || after) in nats on harmless prompts: at the first token of the answer, and on
average over the tokens of the answer that the unedited model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.evaluation.evaluator import EvalSet, Evaluator, StateKey
from mlxfun.evaluation.refusal_rule import is_evasive, is_refusal
from mlxfun.evaluation.reports import RefusalCount
from mlxfun.generation.answers import Answer, Greedy
from mlxfun.generation.thinking import thinking_tags

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Tokens

FIRST_TOKEN_ERROR = 0.1
"""Share of the unedited answers that their first token may misjudge for it to be relied on."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Harmful and harmless prompts, int32 [T] each."""

    harmful: tuple[Tokens, ...]
    harmless: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """Prompts with the answers that some weights gave."""

    prompts: Prompts
    harmful: tuple[Answer, ...]
    harmless: tuple[Answer, ...]
    refused: tuple[bool, ...]  # the harmful ones, then the harmless ones
    evasive: tuple[bool, ...] = ()  # the harmful ones

    @property
    def count(self) -> RefusalCount:
        """How many were refused."""
        split = len(self.harmful)
        return RefusalCount(
            sum(self.refused[:split]),
            split,
            sum(self.refused[split:]),
            len(self.harmless),
            sum(self.evasive),
        )


def ask_all(
    answering: Greedy,
    prompts: Prompts,
    max_tokens: int,
    ctx: Context = SILENT,
    label: str = "answering",
) -> Panel:
    """Answers of the live weights to all prompts. Raises Cancelled."""
    harmful, harmless = (
        tuple(answering(part, max_tokens, ctx, f"{label}, {name}"))
        for part, name in ((prompts.harmful, "harmful"), (prompts.harmless, "harmless"))
    )
    tags = thinking_tags(answering.tokenizer)
    refused = tuple(is_refusal(answer.text, tags) for answer in (*harmful, *harmless))
    evasive = tuple(is_evasive(answer.text, tags) for answer in harmful)
    return Panel(prompts, harmful, harmless, refused, evasive)


# -- one forward of the prompts ---------------------------------------------------------------


class FirstToken:
    """Judges the live weights by what follows the prompts of a panel, against the panel's own."""

    def __init__(self, evaluator: Evaluator, panel: Panel, ctx: Context = SILENT) -> None:
        """The live weights must be those that gave the panel's answers."""
        self._evaluator = evaluator
        size = evaluator.batch_size()
        self._harmful = size.split(panel.prompts.harmful)
        self._harmless = size.split(panel.prompts.harmless)
        self._base = list(evaluator.next_tokens(self._harmless, ctx))
        self._weights, self.error = token_weights(panel, int(self._base[0].shape[-1]))
        self._refusing = mx.array(self._weights.astype(np.float32))

    def judge(self, ctx: Context = SILENT) -> tuple[float, float, float]:
        """(expected share of refusals, mean KL, expected share of false refusals)."""
        # Together: a model on disk is read once for both.
        logs = self._evaluator.next_tokens([*self._harmful, *self._harmless], ctx)
        refused = [
            np.array(mx.exp(found) @ self._refusing) for found in islice(logs, len(self._harmful))
        ]
        kl, false = self._harmless_by(logs)
        return float(np.concatenate(refused).mean()), kl, false

    def harmless(self, ctx: Context = SILENT) -> tuple[float, float]:
        """(mean KL, expected share of false refusals)."""
        return self._harmless_by(self._evaluator.next_tokens(self._harmless, ctx))

    def _harmless_by(self, found: Iterator[mx.array]) -> tuple[float, float]:
        kls: list[Array] = []
        false: list[Array] = []
        for logs, base in zip(found, self._base, strict=True):
            kl = mx.sum(mx.exp(base) * (base - logs), axis=-1)
            share = mx.exp(logs) @ self._refusing
            mx.eval(kl, share)
            kls.append(np.array(kl, dtype=np.float64))
            false.append(np.array(share))
        return max(0.0, float(np.concatenate(kls).mean())), float(np.concatenate(false).mean())


def token_weights(panel: Panel, vocabulary: int) -> tuple[Array, float]:
    """(w float64 [V], share of the panel's answers that w misjudges by their first token)."""
    first = np.array([a.tokens[0] for a in (*panel.harmful, *panel.harmless)])
    refused = np.array(panel.refused, dtype=np.float64)
    seen = np.bincount(first, minlength=vocabulary).astype(np.float64)
    weights = np.bincount(first, weights=refused, minlength=vocabulary) / np.maximum(seen, 1.0)
    return weights, float(np.abs(weights[first] - refused).mean())


# -- KL over answers --------------------------------------------------------------------------


def answer_kl(
    evaluator: Evaluator,
    panel: Panel,
    before: Callable[[], AbstractContextManager[None]],
    key: StateKey,
    ctx: Context = SILENT,
) -> tuple[float, float]:
    """(KL at the first token, mean over the tokens of the panel's answers) on harmless prompts.

    before: makes the weights that gave the answers live; key: names them.
    """
    lengths = [len(prompt) for prompt in panel.prompts.harmless]
    data = EvalSet(
        "harmless answers",
        tuple(
            np.concatenate([prompt, np.asarray(answer.tokens, np.int32)])
            for prompt, answer in zip(panel.prompts.harmless, panel.harmless, strict=True)
        ),
    )
    with before():
        reference = evaluator.reference(key, data, ctx)
    likelihood, (compared,) = evaluator.compare(data, [reference], [before], ctx)
    first, every = split_by_answer(compared.kl, likelihood.sequence, lengths)
    return float(first.mean()), float(every.mean())


def split_by_answer(values: Array, sequence: Array, prompts: Sequence[int]) -> tuple[Array, Array]:
    """Of values [N] at predicting positions: those at answers' first tokens, those at all of them.

    sequence: of each value; within one, positions ascend. prompts: length of each prompt.
    """
    first, every = [], []
    for number, length in enumerate(prompts):
        own = values[sequence == number]
        first.append(own[length - 1])
        every.append(own[length - 1 :])
    return np.array(first), np.concatenate(every)
