"""The live experts of one MoE layer as stacked weights that are evaluated together.

An expert is f(x) = down(act(up_1 x, ...)): projections into H neurons, a function of each neuron,
one projection out. That is all that merging needs to know: neurons can be permuted, and the output
projection is linear, so a mean over tokens may be taken ahead of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import PlanError
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.parameters import dequantised, take_rows, unpacked_shape

PROJECTIONS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))
"""(projections into the neurons, projection out of them) of the expert stacks of mlx-lm."""


def neurons_of(experts: str, modules: dict[str, nn.Module]) -> int | None:
    """N, the neurons of each expert of the stacks at a path; None where they are no known stacks."""
    for _, outward in PROJECTIONS:
        module = modules.get(f"{experts}.{outward}")
        if module is not None:
            return unpacked_shape(module)[-1]
    return None


@dataclass(frozen=True, slots=True)
class Bank:
    """Stacked experts. rows: of the stacks, one for each of the E live experts.

    inward, outward: names of the projections, submodules of `experts` at `path`.
    """

    experts: Any
    path: str
    rows: tuple[int, ...]
    inward: tuple[str, ...]
    outward: str

    @classmethod
    def of(cls, moe: LiveExperts, modules: dict[str, nn.Module]) -> Bank:
        """The bank of a layer. Raises PlanError where its experts are made in another way."""
        layer = moe.layer
        if layer.experts_list:
            raise PlanError(
                f"layer {layer.index} keeps its experts as separate modules ({layer.family}), which "
                "cannot be merged as one stack; prune this model instead"
            )
        if moe.on_disk:
            raise PlanError(
                f"the experts of layer {layer.index} are partly on disk, and all of them are looked "
                "at here: load the model with --resident all"
            )
        experts = modules[layer.experts]
        for inward, outward in PROJECTIONS:
            if outward in experts:
                bank = cls(experts, layer.experts, moe.rows, inward, outward)
                bank._require_known(layer)
                return bank
        raise PlanError(
            f"the experts of layer {layer.index} ({type(experts).__name__}) have projections that "
            "merging does not know; prune this model instead"
        )

    def _require_known(self, layer: MoELayer) -> None:
        known = {f"{self.path}.{name}" for name in self.names}
        other = sorted(
            p.path for p in layer.expert_parameters() if p.path.rpartition(".")[0] not in known
        )
        if other:
            raise PlanError(
                f"layer {layer.index} keeps {', '.join(other)} per expert, which merging does not "
                "know how to combine; prune this model instead"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All projections."""
        return (*self.inward, self.outward)

    def projection(self, name: str) -> Any:
        """One stacked projection."""
        return self.experts[name]

    @property
    def width(self) -> int:
        """N, the neurons of an expert."""
        return unpacked_shape(self.projection(self.outward))[-1]

    def _index(self) -> mx.array:
        return mx.array(self.rows, dtype=mx.uint32)

    def activations(self, x: mx.array) -> mx.array:
        """Neurons of every expert: x [1, T, D] or [E, T, D] -> [E, T, H]."""
        index = self._index()
        values = [self.projection(name)(x, index) for name in self.inward]
        # The order of SwitchGLU's own call is activation(up, gate).
        out: mx.array = self.experts.activation(*reversed(values))
        return out

    def outputs(self, neurons: mx.array) -> mx.array:
        """Outputs of every expert for its neurons [E, T, H] -> [E, T, D], bias included."""
        out: mx.array = self.projection(self.outward)(neurons, self._index())
        return out

    def bias(self, name: str) -> mx.array | None:
        """Bias of a projection, [E, out], None without one."""
        module = self.projection(name)
        return take_rows(module["bias"], self.rows) if "bias" in module else None

    def weights(self, name: str, chosen: Sequence[int] | None = None) -> mx.array:
        """A projection in float32, neurons first: [E, H, D]. chosen: positions among the E."""
        rows = self.rows if chosen is None else tuple(self.rows[i] for i in chosen)
        weight = dequantised(self.projection(name), rows)
        return weight if name in self.inward else weight.swapaxes(-1, -2)
