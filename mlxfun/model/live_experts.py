"""The experts of an MoE layer that its router can select now, and their rows in the resident
stacks.

A prune is virtual while the model is resident: the router is sliced for real (kilobytes), and its
choice, a position among the live experts, is mapped to a row of the unsliced expert stacks. This is
bitwise equal to the physically sliced model for every router family; filling pruned experts with
-inf is not, because grouped routers fill losing groups with 0.0 and because a softmax over fewer
logits rounds differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxfun.model.anatomy import MoELayer


class LiveExperts:
    """The live experts of one MoE layer.

    live: their checkpoint numbers, ascending; the router's output has one logit for each. rows:
    the row of the resident stack of each. index_map: `rows` on the device, uint32 [live], None
    where position and row agree. labels: `live` on the device, None while nothing is pruned.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.live: tuple[int, ...] = tuple(range(layer.num_experts))
        self.rows: tuple[int, ...] = self.live
        self.index_map: mx.array | None = None
        self.labels: mx.array | None = None

    def set(self, live: Sequence[int], resident: Sequence[int]) -> None:
        """The live experts, and those physically in the stack, in checkpoint numbers."""
        self.live = tuple(live)
        where = {expert: row for row, expert in enumerate(resident)}
        self.rows = tuple(where[expert] for expert in live)
        identity = self.rows == tuple(range(len(resident)))
        self.index_map = None if identity else mx.array(self.rows, dtype=mx.uint32)
        whole = self.live == tuple(range(self.layer.num_experts))
        self.labels = None if whole else mx.array(self.live, dtype=mx.uint32)
        # Evaluated here, on the owning thread: a lazy array would be built anew in each forward.
        mx.eval([a for a in (self.index_map, self.labels) if a is not None])

    def labelled(self, indices: mx.array) -> mx.array:
        """Positions among the live experts as checkpoint numbers."""
        return indices if self.labels is None else self.labels[indices]
