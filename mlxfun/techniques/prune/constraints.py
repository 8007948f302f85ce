"""What a choice of experts must respect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlxfun.arrays import Mask

Scores = NDArray[np.float64]
"""float64 [L, E], higher is more important."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a selection must respect.

    layers: decoder index of each of the L MoE layers. alive, protect, target: bool [L, E].
    top_k, n_group, topk_group: one number per layer; n_group is 1 where the router has no groups.
    traffic: float64 [L, E], tokens routed to each expert, breaks ties; None when unknown.
    """

    layers: tuple[int, ...]
    alive: Mask
    protect: Mask
    target: Mask
    top_k: tuple[int, ...]
    n_group: tuple[int, ...]
    topk_group: tuple[int, ...]
    traffic: Scores | None = None

    @classmethod
    def free(cls, layers: Sequence[int], experts: int, top_k: int) -> Constraints:
        """All experts alive, none protected or targeted, no groups."""
        count = len(layers)
        none = np.zeros((count, experts), dtype=np.bool_)
        ones = (1,) * count
        return cls(tuple(layers), ~none, none, none, (top_k,) * count, ones, ones)

    def of_layer(self, position: int, traffic: Scores) -> Constraints:
        """Those of one MoE layer, [1, E]. traffic: [1, E], of that layer."""
        one = slice(position, position + 1)
        return Constraints(
            layers=self.layers[one],
            alive=self.alive[one],
            protect=self.protect[one],
            target=self.target[one],
            top_k=self.top_k[one],
            n_group=self.n_group[one],
            topk_group=self.topk_group[one],
            traffic=traffic,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return len(self.layers), int(self.alive.shape[1])
