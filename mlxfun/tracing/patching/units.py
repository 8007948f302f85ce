"""What is patched: components as points of the forward, and the patch of one row of a batch.

A batch of the corrupted prompt is run, each row with another component taken from the clean run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import UsageError
from mlxfun.tracing.axes import Axes, Span
from mlxfun.tracing.names import Point
from mlxfun.tracing.options import ComponentName
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.patching.result import Across
from mlxfun.tracing.values import RouteSaved, kept

ACROSS: dict[ComponentName, Across] = {
    "residual": "position",
    "attn": "position",
    "mlp": "position",
    "route": "position",
    "head": "head",
    "expert": "expert",
}
POINTS: dict[ComponentName, tuple[str, ...]] = {
    "residual": ("residual",),
    "attn": ("attn.output",),
    "mlp": ("mlp.output",),
    "head": ("attn.heads",),
    "route": ("router.choice", "router.weights"),
    "expert": (),
}


@dataclass(frozen=True, slots=True)
class Unit:
    """One component: of a decoder layer, and a position, a head or an expert."""

    layer: int
    column: int


def layers_of(parts: Parts, component: ComponentName, layers: Sequence[int] | None) -> list[int]:
    """The layers that have a component, or those asked for. Raises UsageError where none has."""
    if component not in ACROSS:
        raise UsageError(f"there is no component {component!r}; there are {', '.join(ACROSS)}")
    names, known = parts.names, []
    for index in range(names.layers):
        if component == "expert":
            there = parts.layer(index).moe is not None
        else:
            there = f"layers.{index}.{POINTS[component][0]}" in names.points
        if there and (layers is None or index in layers):
            known.append(index)
    if layers is not None and (missing := sorted(set(layers) - set(known))):
        raise UsageError(f"decoder layer {missing[0]} of {parts.map.model_type} has no {component}")
    if not known:
        raise UsageError(f"no decoder layer of {parts.map.model_type} has a component {component}")
    return known


def points_of(parts: Parts, component: ComponentName, layer: int) -> list[Point]:
    """The points at which a component of a layer is patched."""
    if component == "expert":
        return [experts_point(parts, layer)]
    return [parts.names.point(f"layers.{layer}.{tail}") for tail in POINTS[component]]


def experts_point(parts: Parts, layer: int) -> Point:
    """What all experts of a layer add, [B, T, K, D]."""
    moe = parts.layer(layer).moe
    assert moe is not None
    return Point(f"layers.{layer}.experts.*.output", "expert", moe.block, layer,
                 route="contribution")  # fmt: skip


class SavedRoutes(RouteSaved):
    """What every expert of a layer adds: contributions, choice and weights, [B, T, K, ...]."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self._choice: list[mx.array] = []

    def take_route(
        self, contribution: mx.array, choice: mx.array, weights: mx.array, span: Span
    ) -> None:
        """See SavedExpert.take_route."""
        self._taken.append(kept(contribution))
        self._choice.append(kept(choice))

    def arrays(self) -> list[mx.array]:
        return [*self._taken, *self._choice]

    def by_expert(self, expert: mx.array) -> mx.array:
        """What expert `expert` [R] adds in the first row, [R, T, D]."""
        hit = self._choice[0][0][None] == expert[:, None, None]
        return mx.sum(mx.where(hit[..., None], self.value[0][None], 0), axis=2)


@dataclass(frozen=True, slots=True)
class Patch:
    """Puts values of the clean run into some rows of a batch.

    where: bool [B, T], or [B, H] for heads: what is patched of each row. clean: the value of the
    clean run, one row of it.
    """

    where: Array
    clean: mx.array
    heads: bool = False

    def __call__(self, value: mx.array, axes: Axes, span: Span) -> mx.array:
        """The value with the clean run's in the patched places; its dtype is kept."""
        second = axes.heads if self.heads else axes.position
        assert axes.batch is not None
        assert second is not None
        shape = [1] * value.ndim
        shape[axes.batch], shape[second] = self.where.shape
        mask = mx.array(self.where.reshape(shape))
        return mx.where(mask, self.clean.astype(value.dtype), value)


@dataclass(frozen=True, slots=True)
class ExpertPatch:
    """Puts what one expert adds in the clean run in place of what it adds in a row.

    rows: the rows that are patched; experts: int [R], the expert of each. clean: [R, T, D]. The sum
    over the chosen experts is what counts, so a part of an expert that a token does not choose is
    added to another place.
    """

    rows: tuple[int, ...]
    experts: mx.array
    clean: mx.array

    def __call__(self, value: mx.array, axes: Axes, span: Span) -> mx.array:
        """Experts are patched all at once, see `on_experts`."""
        raise NotImplementedError

    def on_experts(self, value: mx.array, choice: mx.array) -> mx.array:
        """value: [B, T, K, D]; choice: [B, T, K]."""
        count = value.shape[0]
        expert = np.full(count, -1, np.int64)
        expert[list(self.rows)] = np.array(self.experts)
        hit = choice.astype(mx.int32) == mx.array(expert.astype(np.int32))[:, None, None]
        new = mx.where(hit[..., None], mx.array(0, value.dtype), value)
        place = np.zeros(count, np.int64)
        place[list(self.rows)] = np.arange(len(self.rows))
        patched = mx.array((expert >= 0).reshape(-1, 1, 1))
        added = mx.where(patched, self.clean[mx.array(place)], 0).astype(value.dtype)
        first = mx.arange(value.shape[2])[None, None, :, None] == 0
        return new + mx.where(first, added[:, :, None], mx.array(0, value.dtype))
