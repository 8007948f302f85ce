"""Counts the routing of chat traffic: added to the statistics in batches of tokens, exact whenever
they are read.

Adding one token costs as much as adding sixty, and the device would wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration.collect import token_sums
from mlxfun.calibration.routing_stats import RoutingStats, require_finite
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
