"""The tensors of a merged layer: every projection of a group becomes a weighted mean of its members'.

A centroid keeps its router row and bias, a group of one keeps its weights bit for bit. New rows are
rounded to the dtype, or packed in the quantisation, that they are stored in, right here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import LayerDelta
from mlxfun.model.expert_similarity import Groups, group_weights
from mlxfun.model.experts import Bank
from mlxfun.model.identity import Rows
from mlxfun.model.parameters import requantised, rounded, row_digests, take_rows
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.workspace import ResidentModel

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.model.live_experts import LiveExperts


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one layer is merged; experts are positions among the live ones.

    shares: {expert: share of its group}; matches: {member: neurons in its centroid's order}.
    """

    groups: Groups
    shares: Mapping[int, float]
    matches: Mapping[int, Array]

    @property
    def merged(self) -> list[int]:
        """Positions of the groups of more than one."""
        return [i for i, group in enumerate(self.groups) if len(group) > 1]


def recipe_of(
    saliency: Array,
    groups: Sequence[tuple[int, ...]],
    matches: Mapping[int, Array],
    fractions: Mapping[int, float] | None = None,
) -> Recipe:
    """The groups with the shares of their members, see `group_weights`."""
    shares = {
        expert: float(share)
        for group in groups
        for expert, share in zip(group, group_weights(saliency, group, fractions), strict=True)
    }
    return Recipe(tuple(groups), shares, matches)


def router_groups(layer: MoELayer, live: int) -> list[int]:
    """The router's group of each live expert: consecutive runs of the same length."""
    size = live // layer.n_group
    return [position // size for position in range(live)]


@dataclass(frozen=True, slots=True)
class Compared:
    """The live experts of a layer, compared. saliency: float64 [E]; alike: [E, E]; neurons:
    [E, T, H] for the tokens that they are compared on.
    """

    bank: Bank
    saliency: Array
    alike: Array
    neurons: mx.array


def combine(
    rows_of: Callable[[list[int]], mx.array], recipe: Recipe, permuted: bool = True
) -> mx.array:
    """Weighted means of the groups of more than one, float32 [G, H, ...].

    rows_of: experts -> their rows [n, H, ...], neurons first. permuted: reorder each member's
    neurons as its centroid's. One place of all groups at a time: few rows are on the device.
    """
    big = [recipe.groups[i] for i in recipe.merged]
    total = mx.array(0.0)
    for place in range(max((len(group) for group in big), default=0)):
        part = [(i, group[place]) for i, group in enumerate(big) if len(group) > place]
        experts = [expert for _, expert in part]
        rows = rows_of(experts)
        if place and permuted:
            order = mx.array(np.stack([recipe.matches[e] for e in experts]).astype(np.uint32))
            shape = (*order.shape, *(1,) * (rows.ndim - 2))
            rows = mx.take_along_axis(rows, order.reshape(shape), axis=1)
        shares = mx.array(np.array([recipe.shares[e] for e in experts], np.float32))
        rows = rows * shares.reshape(-1, *(1,) * (rows.ndim - 1))
        total = total.at[mx.array([i for i, _ in part])].add(rows) if place else rows
        mx.eval(total)
    return total


def taken(array: mx.array, rows: list[int]) -> mx.array:
    return array[mx.array(rows)]


class MergedWeights:
    """Makes the tensors of merged layers; the model stays as it is."""

    def __init__(self, workspace: ResidentModel) -> None:
        self._workspace, self._resident = workspace, workspace.resident

    def delta(self, moe: LiveExperts, bank: Bank, recipe: Recipe) -> LayerDelta:
        """The router sliced as by a prune, and stacks of the centroids."""
        live = moe.live
        centroids = tuple(live[group[0]] for group in recipe.groups)
        sliced = prune_layer(self._resident, moe.layer, live, centroids)
        if not recipe.merged:
            return sliced  # nobody goes
        arrays: dict[str, Any] = dict(sliced.arrays)
        rows = dict(sliced.rows)
        made = set(sliced.made)
        for name in bank.names:
            for leaf, new in self._new_rows(bank, name, recipe).items():
                path = f"{bank.path}.{name}.{leaf}"
                arrays[path], rows[path] = self._stack(path, bank, recipe, new)
                made.add(path)
                mx.eval(arrays[path])
        return replace(sliced, resident=centroids, arrays=arrays, rows=rows, made=frozenset(made))

    def _new_rows(self, bank: Bank, name: str, recipe: Recipe) -> dict[str, mx.array]:
        """The arrays of one projection for the groups of more than one, by leaf name."""
        module = bank.projection(name)

        def stored(leaf: str) -> mx.Dtype:
            return self._workspace.stored(f"{bank.path}.{name}.{leaf}")

        weight = combine(lambda part: bank.weights(name, part), recipe)
        if name not in bank.inward:
            weight = weight.swapaxes(-1, -2)
        new = requantised(module, weight, stored)
        bias = bank.bias(name)
        if bias is not None:
            wide = bias.astype(mx.float32)
            mixed = combine(lambda part: wide[mx.array(part)], recipe, permuted=name in bank.inward)
            new["bias"] = rounded(mixed, stored("bias"), bias.dtype)
        return new

    def _stack(
        self, path: str, bank: Bank, recipe: Recipe, new: mx.array
    ) -> tuple[mx.array, Rows | None]:
        """All centroids' rows of one array, and their identities."""
        held = self._resident.tree.get(path)
        stack = take_rows(held, [bank.rows[group[0]] for group in recipe.groups])
        where = recipe.merged
        base = stack[mx.array(where)]
        same = np.array(mx.all((new == base).reshape(len(where), -1), axis=1))
        ledger = self._resident.ledger.get(path)
        before = ledger.ids if ledger is not None else tuple(range(len(bank.rows)))
        ids = [before[group[0]] for group in recipe.groups]
        changed = [i for i in range(len(where)) if not same[i]]
        if changed:
            digests = row_digests(new[mx.array(changed)], self._workspace.stored(path))
            for i, digest in zip(changed, digests, strict=True):
                ids[where[i]] = digest
            stack = mx.array(stack)
            stack[mx.array(where)] = new
        whole = ids == list(range(held.shape[0]))
        return stack, None if whole else Rows.of(ids)
