"""What the steps of a pass over the layers hold on the device, in bytes, from the shapes alone.

T real tokens, D hidden size, N neurons of an expert, E experts, K top-k. Counted per step: the
arrays that it is given or makes and that are alive together. Where MLX runs ahead of what it lets
go of, as in loops over experts that are queued a few at a time, the number of copies was measured
(tests/mlxfun/techniques/refit/test_sizes.py compares with peaks of whole passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxfun.errors import PlanError
from mlxfun.evaluation.evaluator import LOGITS_BYTES
from mlxfun.model.device.batch_size import HELD_LAYERS, bytes_per_token
from mlxfun.model.device.memory import free_bytes, on_cpu
from mlxfun.model.experts import Bank
from mlxfun.model.parameters import unpacked_shape
from mlxfun.techniques.refit.least_squares import HELD_SHARE, QUEUED
from mlxfun.techniques.refit.output_error import CHUNK_BYTES, most_tokens

if TYPE_CHECKING:
    import mlx.nn as nn

    from mlxfun.data.datasets import Batch
    from mlxfun.model.live_experts import LiveExperts
    from mlxfun.techniques.workspace import ResidentModel

WIDE = 4
"""Bytes of a float32."""

STATES = 5
"""Hidden states that the pass carries (mlxfun.hooks.layerwise): as they came in, as they are now,
and what ran ahead of the experts: two norms and attention."""

FORWARD = 1.8
"""What a layer's forward holds, as a multiple of the outputs of its matrices."""

BACKWARD = 4
"""What a layer's gradient holds, as a multiple of its forward."""

LOGITS = 5
"""Arrays of a chunk's logits that are there together when its gradient is taken."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of the widest layer, and of what runs through it.

    padded: tokens of all batches with what fills them up; batch: of the largest. layer: bytes of a
    token's values at the outputs of a layer's matrices. state: bytes of one value of a hidden state.
    unpack, pack: see `copies_of`.
    """

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    padded: int
    batch: int
    layer: int
    state: int
    unpack: float = 0.0
    pack: float = 0.0

    @classmethod
    def of(cls, workspace: ResidentModel, batches: Sequence[Batch]) -> Sizes:
        """The sizes for a pass of these batches."""
        resident = workspace.resident
        shapes = [_shape(moe, resident.tree.modules) for moe in resident.layers]
        copies = [
            copies_of(resident.tree.modules[parameter.path.rpartition(".")[0]])
            for moe in resident.layers
            for parameter in moe.layer.expert_parameters()
        ]
        norms = [p for p in resident.tree.paths if "norm" in p and p.endswith(".weight")]
        state = resident.tree.get(norms[0]).dtype if norms else mx.float32
        return cls(
            tokens=sum(int(batch.mask.sum()) for batch in batches),
            hidden=max((hidden for hidden, _ in shapes), default=0),
            width=max((width for _, width in shapes), default=0),
            experts=max((len(moe.live) for moe in resident.layers), default=0),
            top_k=max(workspace.anatomy.top_k, 1),
            padded=sum(batch.tokens.size for batch in batches),
            batch=max((batch.tokens.size for batch in batches), default=0),
            layer=bytes_per_token(workspace.model, workspace.anatomy) // HELD_LAYERS,
            state=state.size,
            unpack=max((unpack for unpack, _ in copies), default=0.0),
            pack=max((pack for _, pack in copies), default=0.0),
        )

    @property
    def states(self) -> int:
        """What is carried through the layers."""
        return STATES * self.padded * self.hidden * self.state

    @property
    def forward(self) -> int:
        """A layer's forward of one batch."""
        return int(FORWARD * self.batch * self.layer)

    @property
    def inputs(self) -> int:
        """What the experts are given, [T, D], and the router's logits, [T, E]."""
        return self.tokens * (self.hidden * self.state + self.experts * WIDE)

    @property
    def outputs(self) -> int:
        """One layer's output, float32 [T, D]."""
        return self.tokens * self.hidden * WIDE

    @property
    def output(self) -> int:
        """Making that output: a sum for each of the experts that are queued, and their own."""
        each = self.tokens * self.top_k // max(self.experts, 1) * (self.hidden + 3 * self.width)
        return (QUEUED + 1) * self.outputs + 2 * each * WIDE

    def stack(self, width: int | None = None, experts: int | None = None) -> int:
        """A projection of all experts in float32, [E, D, N]."""
        neurons = self.width if width is None else width
        return (self.experts if experts is None else experts) * neurons * self.hidden * WIDE

    def features(self, width: int | None = None) -> int:
        """The neurons of all tokens, float32 [T K, N]; of one expert where they are not held."""
        neurons = self.width if width is None else width
        whole, free = self.tokens * self.top_k * neurons * WIDE, free_bytes()
        held = free is None or whole <= HELD_SHARE * free
        return whole if held else 2 * whole // max(self.experts, 1)

    def refit(self, experts: int, width: int | None = None) -> int:
        """A refit: features, inverses [E, N, N], changes [E, N, D] of two sweeps, and what is left
        over of the output, for each of the experts that are queued.
        """
        neurons = self.width if width is None else width
        inverses = experts * neurons * neurons * WIDE
        left = (QUEUED + 4) * self.outputs
        return self.features(width) + inverses + 2 * self.stack(width, experts) + left

    def refitted(self, experts: int, width: int | None = None) -> int:
        """Storing what was fitted, besides the stack that comes of it: the changes, and the stack
        unpacked, changed, rounded or packed, and sliced; or the output with it.
        """
        kept = self.stack(width, experts)
        copies = 4.0 if not self.unpack else max(self.unpack + 1.8, 2 + self.pack)
        made = int(copies * self.stack(width))
        return kept + max(made, kept + self.output + 2 * self.outputs)

    def gradient(self, layers: int, vocabulary: int) -> int:
        """A step with a gradient through the whole model, layers computed again for it: the input of
        every layer, one layer with its gradient, and a chunk of logits with theirs."""
        inputs = (layers + 2) * self.batch * self.hidden * self.state
        chunk = min(max(LOGITS_BYTES, 64 * vocabulary * WIDE), self.batch * vocabulary * WIDE)
        return inputs + int(BACKWARD * self.forward) + LOGITS * chunk

    def sliced(self) -> int:
        """Packing a stack anew of which neurons were taken out."""
        return int(max(self.unpack + 1.2, 3 + self.pack / 2) * self.stack())

    def mixed(self, experts: int) -> int:
        """Combining rows of some experts: as they are, in the centroid's order, weighted, and their
        sum; and packing that.
        """
        return int(max(self.unpack + 2.5, 4, 2 + self.pack) * self.stack(experts=experts))

    def reduced(self, bound: int) -> int:
        """Going through the rows of a projection, unpacked and scaled, some experts at a time. bound:
        bytes in float32 that are unpacked at once, an expert's at least."""
        some = min(self.stack(), max(bound, self.stack(experts=1)))
        return int((self.unpack + 2.2) * some)

    def elimination(self) -> int:
        """Choosing by output error: the outputs of all experts for a chunk of tokens, their products
        [T, E, E], and what each expert's going changes."""
        count = min(self.tokens, most_tokens(self.experts))
        width = max(self.hidden, self.width, 1)
        chunk = min(count, max(1, CHUNK_BYTES // (WIDE * max(self.experts, 1) * width)))
        copies = 1.9 if self.unpack else 3.2
        made = chunk * self.experts * WIDE * (2 * self.width + copies * self.hidden)
        products = count * self.experts * self.experts * WIDE
        changes = count * (2 * self.top_k) ** 2 * 3 * WIDE * (self.top_k + 1)
        return int(products + max(made + products, changes))


def _shape(moe: LiveExperts, modules: dict[str, nn.Module]) -> tuple[int, int]:
    """(D, N) of a layer's experts; of those that are no known stack, the larger of the two twice."""
    try:
        bank = Bank.of(moe, modules)
        hidden, width = unpacked_shape(bank.projection(bank.outward))[-2:]
    except PlanError:
        owners = {p.path.rpartition(".")[0] for p in moe.layer.expert_parameters()}
        weights = [modules[owner] for owner in owners if "weight" in modules[owner]]
        hidden = width = max((max(unpacked_shape(one)[-2:]) for one in weights), default=0)
    return hidden, width


def copies_of(module: nn.Module) -> tuple[float, float]:
    """How many float32 copies of a projection unpacking it holds, and packing it besides what is
    packed. Measured on MLX 0.32: its CPU backend makes both of simple steps, one of which compares
    every value with each of the 16 that a 4-bit float can be.
    """
    if "scales" not in module:
        return 0.0, 0.0
    if not on_cpu():
        return 1.5, 0.3
    bits = int(module.bits)
    if module.mode == "affine":
        rounded = 1.5 if module.scales.dtype.size < WIDE else 0.0
        return (2.0 if 32 % bits == 0 else bits + 1.0) + rounded, 0.3
    return (2.3, 19.3) if bits == 4 else (1.0, 2.5)
