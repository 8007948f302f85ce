"""Which experts of a layer stay in memory: those that were used most, of late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlxfun.arrays import Array

HALF_LIFE = 256
"""Forwards after which a use counts half."""


class Usage:
    """How much each of E experts of one layer was used: every use counts 1 when it happens and
    decays by half in `half_life` forwards. A forward over many tokens counts each expert by the
    share of its tokens that it got, so that a prompt weighs no more than one decoded token a layer.
    """

    def __init__(self, experts: int, half_life: float = HALF_LIFE) -> None:
        self.scores: Array = np.zeros(experts, np.float64)
        self._keep = 0.5 ** (1 / half_life)

    def seed(self, scores: Array) -> None:
        """Begin with recorded use, float64 [E], scaled so that the most used expert has the score
        that one reaches which is used in every forward."""
        top = float(scores.max(initial=0.0))
        if top > 0:
            self.scores = scores.astype(np.float64) / (top * (1 - self._keep))

    def note(self, counts: Array, tokens: int) -> None:
        """A forward over `tokens` has used each expert `counts` [E] times."""
        self.scores *= self._keep
        self.scores += counts / max(tokens, 1)

    def ranked(self, experts: Iterable[int]) -> list[int]:
        """The least used first; of equals the one with the larger number."""
        return sorted(experts, key=lambda e: (self.scores[e], -e))
