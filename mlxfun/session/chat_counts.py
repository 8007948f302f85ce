"""Counts the routing of chat and of requests: added to the statistics in batches of tokens, exact
whenever they are read.

Adding one token costs as much as adding sixty, and the device would wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlxfun.calibration.collect import token_sums
from mlxfun.calibration.routing_stats import RoutingStats, require_finite
from mlxfun.context import Context
from mlxfun.model.anatomy import MoEMap

if TYPE_CHECKING:
    from mlxfun.arrays import Array

TOKENS = 64
"""How many tokens wait at most."""


class WaitingTokens:
    """Tokens that are counted but not yet added to statistics, of one state of the weights."""

    def __init__(self, anatomy: MoEMap) -> None:
        self._anatomy = anatomy
        self._rows: list[tuple[Array, Array, Array]] = []
        self._steered = False

    def add(self, experts: Array, weights: Array, norms: Array, steered: bool) -> bool:
        """One token, see `mlxfun.generation.decoder.Counter`. Whether they shall be added now.

        Raises ModelError for NaN and infinity.
        """
        require_finite(norms)
        require_finite(weights)
        self._rows.append((experts, weights, norms))
        self._steered = self._steered or steered
        return len(self._rows) >= TOKENS

    def added_to(self, stats: RoutingStats) -> RoutingStats:
        """`stats` with the waiting tokens, of which none is left."""
        if not self._rows:
            return stats
        experts, weights, norms = (np.stack(part) for part in zip(*self._rows, strict=True))
        steered, tokens = self._steered, len(self._rows)
        self._rows, self._steered = [], False
        sums = token_sums(self._anatomy.layers, experts, weights, norms)
        return stats.plus(sums, 0, tokens, steered)


class Counts(Protocol):
    """Where counted tokens go; `mlxfun.session.observations.Observations` is it."""

    def may_count(self, ctx: Context) -> bool:
        """Whether the statistics are of the weights that run."""

    def count_prompt(self, sums: Array, tokens: int, ctx: Context) -> None:
        """Add sums [L, S, E] of chat tokens."""

    def count_token(self, experts: Array, weights: Array, norms: Array, ctx: Context) -> None:
        """Add a token of chat, [L, K] of each."""

    def add_traffic(self, sums: Array, tokens: int, state: str, steered: bool) -> None:
        """Add sums [L, S, E] of tokens that requests were served."""

    def show_counts(self, ctx: Context) -> None:
        """Show the routing so far."""

    def end_answer(self, ctx: Context) -> None:
        """An answer of the chat is over."""

    def end_request(self) -> None:
        """An answer to a request is over."""


class ChatCounter:
    """Counts the forwards of one answer; see `mlxfun.generation.decoder.Counter`."""

    def __init__(self, counts: Counts, ctx: Context) -> None:
        self._counts, self._ctx = counts, ctx

    def begin(self) -> None:
        """Where others count the forwards: stop counting, with a word, if it is of other weights."""
        self._counts.may_count(self._ctx)

    def prompt(self, sums: Array, tokens: int) -> None:
        """Add a part of the prompt."""
        self._counts.count_prompt(sums, tokens, self._ctx)

    def token(self, experts: Array, weights: Array, norms: Array) -> None:
        """Add one decoded token."""
        self._counts.count_token(experts, weights, norms, self._ctx)

    def end(self) -> None:
        """The answer is over."""
        self._counts.end_answer(self._ctx)


@dataclass(frozen=True, slots=True)
class TrafficCounter:
    """Counts forwards that answer requests. state, steered: what was live when they ran; they may be
    handed over while something else is."""

    counts: Counts
    anatomy: MoEMap = field(compare=False)
    ctx: Context = field(compare=False)
    state: str
    steered: bool

    def prompt(self, sums: Array, tokens: int) -> None:
        """Add tokens of prompts: their sums [L, S, E] in the order of stats.SUMS."""
        self.counts.add_traffic(sums, tokens, self.state, self.steered)

    def token(self, experts: Array, weights: Array, norms: Array) -> None:
        """Add one decoded token, [L, K] of each."""
        self.tokens(experts[:, None], weights[:, None], norms[:, None])

    def tokens(self, experts: Array, weights: Array, norms: Array | None) -> None:
        """Add N decoded tokens: experts int32 [L, N, K], -1 where unused; weights and norms of the
        experts' outputs, float32 [L, N, K], norms None where they are not measured.

        Raises ModelError for NaN and infinity.
        """
        measured = None if norms is None else norms.swapaxes(0, 1)
        chosen, shares = experts.swapaxes(0, 1), weights.swapaxes(0, 1)
        sums = token_sums(self.anatomy.layers, chosen, shares, measured)
        self.counts.add_traffic(sums, experts.shape[1], self.state, self.steered)

    def end(self) -> None:
        """An answer is over."""
        self.counts.end_request()

    def show(self) -> None:
        """Show the routing so far."""
        self.counts.show_counts(self.ctx)
