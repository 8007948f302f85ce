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

KNOWN = 4
"""How many numberings of a layer are kept."""

Experts = tuple[int, ...]
Numbering = tuple[Experts, mx.array | None, mx.array | None]


class LiveExperts:
    """The live experts of one MoE layer.

    live: their checkpoint numbers, ascending; the router's output has one logit for each. rows:
    the row of the resident stack of each. index_map: `rows` on the device, uint32 [live], None
    where position and row agree. labels: `live` on the device, None while nothing is pruned; the
    same array as index_map while no row is missing from the stack.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.live: tuple[int, ...] = tuple(range(layer.num_experts))
        self.rows: tuple[int, ...] = self.live
        self.index_map: mx.array | None = None
        self.labels: mx.array | None = None
        self.on_disk = False  # the stacks are placeholders: see mlxfun.memory.slots
        self._known: dict[tuple[Experts, Experts], Numbering] = {}

    def set(self, live: Sequence[int], resident: Sequence[int]) -> None:
        """The live experts, and those physically in the stack, in checkpoint numbers."""
        key = (tuple(live), tuple(resident))
        if key not in self._known:
            # The newest few: sides that take turns on the model go back and forth between two.
            while len(self._known) >= KNOWN:
                del self._known[next(iter(self._known))]
            self._known[key] = self._numbering(*key)
        self.live = key[0]
        self.rows, self.index_map, self.labels = self._known[key]

    def _numbering(self, live: Experts, resident: Experts) -> Numbering:
        """Rows of the live experts; rows and numbers on the device, None where they say nothing."""
        where = {expert: row for row, expert in enumerate(resident)}
        rows = tuple(where[expert] for expert in live)
        identity = rows == tuple(range(len(resident)))
        index_map = None if identity else mx.array(rows, dtype=mx.uint32)
        labels = None
        if live != tuple(range(self.layer.num_experts)):
            labels = index_map if live == rows else mx.array(live, mx.uint32)
        # Evaluated here, on the owning thread: a lazy array would be built anew in each forward.
        mx.eval([a for a in (index_map, labels) if a is not None])
        return rows, index_map, labels

    def mapped(self, indices: mx.array) -> mx.array:
        """Positions among the live experts as rows of the resident stack."""
        return indices if self.index_map is None else self.index_map[indices]

    def labelled(self, indices: mx.array, mapped: mx.array | None = None) -> mx.array:
        """Positions among the live experts as checkpoint numbers.

        mapped: the rows of the same experts where they are known; while no row is missing they are
        the checkpoint numbers, and one gather a layer is saved.
        """
        if self.labels is None:
            return indices
        if mapped is not None and self.labels is self.index_map:
            return mapped
        return self.labels[indices]
