"""What the bytes of a checkpoint are spent on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from mlxfun.checkpoint.headers import is_packed, times_held
from mlxfun.errors import ModelError
from mlxfun.memory.plan.headers import Entry, Outline
from mlxfun.model.anatomy.stored_names import (
    PARTS,
    Part,
    expert_count,
    expert_of,
    hidden_size,
    layer_of,
    part_of,
    top_k,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """bytes: in memory, by part; what is unused is not loaded and not counted. experts: E, 0 for a
    dense model; top_k: K. expert_bytes: {decoder layer: bytes of one expert}. largest_layer: bytes
    of the decoder layer that has most, experts included. hidden: D."""

    bytes: Mapping[Part, int]
    experts: int
    top_k: int
    expert_bytes: Mapping[int, int]
    largest_layer: int
    hidden: int

    @property
    def whole(self) -> int:
        """Bytes of the model."""
        return sum(self.bytes.values())

    @property
    def kept(self) -> int:
        """Bytes of everything but experts."""
        return self.whole - self.bytes["experts"]

    @property
    def one_each(self) -> int:
        """Bytes of one expert in every layer."""
        return sum(self.expert_bytes.values())

    @property
    def active(self) -> int:
        """Bytes that one token passes: all but the experts it does not choose, and but the token
        embedding, of which it takes a row."""
        return self.kept - self.bytes["embeddings"] // 2 + self.top_k * self.one_each

    def pruned(self, gone: int) -> int:
        """Bytes of the model without `gone` experts a layer."""
        return self.whole - gone * self.one_each


def parts_of(found: Outline, widened: bool = False) -> Parts:
    """What the tensors are. widened: 16-bit weights are held in 32 bits, as MLX's CPU backend needs
    where they are not packed.

    Raises ModelError where experts are found, and config.json does not say how many.
    """
    used = [entry for entry in found.entries if part_of(entry.name) != "unused"]
    packed = is_packed(found.config)
    sizes: dict[Part, int] = dict.fromkeys(PARTS, 0)
    layers: dict[int, int] = defaultdict(int)
    stacks: dict[int, int] = defaultdict(int)
    numbered: set[int] = set()
    for entry in used:
        size = entry.nbytes * times_held(entry.dtype, packed, widened)
        part, layer = part_of(entry.name), layer_of(entry.name)
        sizes[part] += size
        if layer is not None:
            layers[layer] += size
            if part == "experts":
                stacks[layer] += size
                number = expert_of(entry.name)
                numbered |= set() if number is None else {number}
    del sizes["unused"]
    experts = _count(found, used, numbered) if stacks else 0
    return Parts(
        sizes,
        experts,
        top_k(found.config) if stacks else 0,
        {layer: size // experts for layer, size in sorted(stacks.items())},
        max(layers.values(), default=0),
        hidden_size(found.config),
    )


def _count(found: Outline, used: list[Entry], numbered: set[int]) -> int:
    """E, by the tensors, and by config.json where those are stacks of another order."""
    if numbered:
        return max(numbered) + 1
    said = expert_count(found.config)
    shapes = {e.shape[0] for e in used if part_of(e.name) == "experts" and len(e.shape) > 1}
    if said and (said in shapes or not shapes):
        return said
    if len(shapes) == 1:
        return shapes.pop()
    raise ModelError(
        f"{found.model}: cannot tell how many experts a layer has: config.json says {said or 'nothing'} "
        f"and the stacks hold {', '.join(map(str, sorted(shapes)))}; please report the architecture"
    )
