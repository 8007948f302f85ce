"""The MLPs beside the routed experts: shared experts, and the feed-forward parts of dense layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxfun.model.anatomy.layers import decoder_layers
from mlxfun.model.anatomy.types import DecoderLayer, MoEMap
from mlxfun.model.parameters import unpacked_shape

MlpKind = Literal["shared", "dense"]

OUTWARD = ("down_proj", "w2", "fc2", "output_linear", "c_proj")
"""Names of the projection out of the neurons."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """One MLP. layer: its decoder layer; inward, outward: names of the projections into and out of
    its neurons, submodules of the module at `path`; fused: one that makes more values than there are
    neurons, a gate beside each for instance, None without one.
    """

    kind: MlpKind
    layer: int
    path: str
    inward: tuple[str, ...]
    outward: str
    fused: str | None

    def width(self, modules: Mapping[str, nn.Module]) -> int:
        """N, its neurons."""
        return unpacked_shape(modules[f"{self.path}.{self.outward}"])[-1]


def mlps_of(modules: Mapping[str, nn.Module], anatomy: MoEMap) -> tuple[Mlp, ...]:
    """All whose projections are known by name, in the order of the layers.

    modules: as `in_order` of mlxfun.model.anatomy.layers gives them.
    """
    found = []
    for layer in decoder_layers(modules, anatomy):
        for kind, path in _paths(layer):
            one = _mlp(modules, kind, layer.index, path)
            if one is not None:
                found.append(one)
    return tuple(found)


def _paths(layer: DecoderLayer) -> Iterator[tuple[MlpKind, str]]:
    for path in layer.shared:
        yield "shared", path
    for path in layer.mlps:
        if layer.moe is None or path != layer.moe.block:
            yield "dense", path


def _mlp(modules: Mapping[str, nn.Module], kind: MlpKind, layer: int, path: str) -> Mlp | None:
    outward = next((name for name in OUTWARD if _is_matrix(modules.get(f"{path}.{name}"))), None)
    if outward is None:
        return None
    hidden, neurons = unpacked_shape(modules[f"{path}.{outward}"])
    inward, fused = [], None
    for name, module in modules[path].items():
        if name == outward or not isinstance(module, nn.Module) or not _is_matrix(module):
            continue
        shape = unpacked_shape(module)
        if shape == (neurons, hidden):
            inward.append(name)
        elif shape[1] == hidden:
            fused = name
    return Mlp(kind, layer, path, tuple(sorted(inward)), outward, fused)


def _is_matrix(module: nn.Module | None) -> bool:
    weight = None if module is None else module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2
