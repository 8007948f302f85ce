"""Whether a model still ends its answers: loops, natural ends, lengths and repetition.

Perplexity on given text does not see this: a pruned model can read well and still answer in circles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PERIOD = 64
"""Tokens that a loop goes round in, at most."""

ROUNDS, LEAST = 3, 24
"""A loop is a tail of so many rounds, and of at least so many tokens."""

GRAM = 4


@dataclass(frozen=True, slots=True)
class AnswerHealth:
    """Figures of greedy answers. loops: share that goes round in circles to its last token; ended:
    share that the model ended by itself; tokens: mean length; repetition: share of 4-grams that
    stood in the same answer before, mean over answers.
    """

    answers: int
    loops: float
    ended: float
    tokens: float
    repetition: float


def health(answers: Sequence[Sequence[int]], stops: frozenset[int]) -> AnswerHealth:
    """Figures of answers as token ids, the one that ended it included. stops: ids that end answers."""
    count = len(answers)
    if not count:
        raise ValueError("there are no answers to judge")
    ended = [bool(tokens) and tokens[-1] in stops for tokens in answers]
    looping = [not end and loops(tokens) for tokens, end in zip(answers, ended, strict=True)]
    return AnswerHealth(
        count,
        sum(looping) / count,
        sum(ended) / count,
        sum(map(len, answers)) / count,
        sum(map(repeated, answers)) / count,
    )


def loops(tokens: Sequence[int]) -> bool:
    """Whether the end of an answer repeats itself.

    >>> loops([5, 6] * 12), loops([1, 2, 3] + [7] * 24), loops(list(range(40))), loops([7] * 9)
    (True, True, False, False)
    """
    for period in range(1, PERIOD + 1):
        length = max(ROUNDS * period, LEAST)
        if len(tokens) < length:
            return False
        tail = tokens[-length:]
        if all(tail[i] == tail[i - period] for i in range(period, length)):
            return True
    return False


def repeated(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams that stood in it before.

    >>> repeated([1, 2, 3, 4, 1, 2, 3, 4]), repeated([1, 2, 3])
    (0.2, 0.0)
    """
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
