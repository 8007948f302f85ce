"""One layer with narrower experts: its neurons chosen, its stacks sliced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.context import Context
from mlxfun.model.delta import LayerDelta
from mlxfun.model.device.processors import on_processors
from mlxfun.model.experts import Bank
from mlxfun.model.identity import Rows
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.parameters import (
    Stored,
    padded_neurons,
    requantised,
    row_digests,
    sliced_neurons,
    take_rows,
)
from mlxfun.techniques.narrow.neurons import kept_by_obs, kept_by_size
from mlxfun.techniques.narrow.options import Method
from mlxfun.techniques.refit.least_squares import Features, Routed

if TYPE_CHECKING:
    from mlxfun.arrays import Array

LEAST_TOKENS = 32
"""Experts with fewer are not judged by their tokens: their largest neurons stay."""

TOGETHER = 8
"""Experts whose neurons are chosen together."""

Named = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Choice:
    """kept: int [E, W], ascending neurons of each live expert. scarce: positions of the experts that
    too few tokens were routed to."""

    kept: Array
    scarce: tuple[int, ...]


def choose(
    bank: Bank, routed: Routed, keep: int, method: Method, group: int, ctx: Context
) -> Choice:
    """Which neurons of each expert stay. group: neurons that go together."""
    outward = bank.weights(bank.outward)  # [E, N, D]
    gram = np.array(outward @ outward.swapaxes(1, 2))
    lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    features = Features(bank, routed, ctx)
    scarce = tuple(e for e in range(len(bank.rows)) if len(routed.of(e)[0]) < LEAST_TOKENS)
    kept: dict[int, Array] = {e: kept_by_size(lengths[e], keep, group) for e in scarce}
    judged = [e for e in range(len(bank.rows)) if e not in kept]
    if method == "obs":
        kept |= _by_obs(features.products(), judged, gram, keep, group)
    else:
        for e in judged:
            size = lengths[e] * _sizes(features.of(e), method)
            kept[e] = kept_by_size(size, keep, group)
    return Choice(np.stack([kept[e] for e in range(len(bank.rows))]), scarce)


def _by_obs(
    normal: dict[int, Array], judged: list[int], gram: Array, keep: int, group: int
) -> dict[int, Array]:
    """Neurons of each judged expert, a few experts per processor at a time."""
    parts = [judged[start : start + TOGETHER] for start in range(0, len(judged), TOGETHER)]

    def of(part: list[int]) -> Array:
        return kept_by_obs(np.stack([normal[e] for e in part]), gram[part], keep, group)

    found = [kept for part in on_processors(of, parts) for kept in part]
    return dict(zip(judged, found, strict=True))


def _sizes(features: mx.array, method: Method) -> Array:
    """Of each neuron [N]: the mean of |h|, or the root of the mean of h^2."""
    if method == "mean":
        return np.array(mx.mean(mx.abs(features), axis=0))
    return np.array(mx.sqrt(mx.mean(mx.square(features), axis=0)))


def narrowed(moe: LiveExperts, bank: Bank, kept: Array, repack: bool, stored: Stored) -> LayerDelta:
    """The layer's stacks with the neurons `kept` [E, W] of its live experts, the model unchanged.

    repack: pack the output projections anew, which single neurons of packed stacks need.
    """
    arrays: Named = {}
    for name in bank.names:
        module, path = bank.projection(name), f"{bank.path}.{name}"
        if repack and name == bank.outward:
            index = mx.array(kept.astype(np.uint32))[:, :, None]
            weight = mx.take_along_axis(bank.weights(name), index, axis=1).swapaxes(1, 2)
            new = requantised(module, weight, _under(path, stored))
            if "bias" in module:
                new["bias"] = take_rows(module["bias"], bank.rows)
        else:
            new = sliced_neurons(module, bank.rows, kept, inward=name in bank.inward)
        for leaf, array in new.items():
            arrays[f"{path}.{leaf}"] = mx.contiguous(array)
            mx.eval(arrays[f"{path}.{leaf}"])
    rows = {path: Rows.of(row_digests(array, stored(path))) for path, array in arrays.items()}
    return LayerDelta(
        moe.layer.position, moe.live, moe.live, arrays=arrays, rows=rows, made=frozenset(arrays)
    )


def _under(path: str, stored: Stored) -> Stored:
    """`stored` by the names of the arrays of the module at `path`."""
    return lambda leaf: stored(f"{path}.{leaf}")


def padded_shared(
    modules: dict[str, Any], shared: Sequence[str], width: int, stored: Stored
) -> tuple[Named, dict[str, Rows | None]]:
    """A layer's shared experts with zeros up to `width` neurons, which changes no output."""
    arrays: Named = {}
    for path in shared:
        for name, inward in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
            for leaf, array in padded_neurons(modules[f"{path}.{name}"], width, inward).items():
                arrays[f"{path}.{name}.{leaf}"] = array
    mx.eval(list(arrays.values()))
    rows: dict[str, Rows | None] = {
        path: Rows.of(row_digests(array[None], stored(path))) for path, array in arrays.items()
    }
    return arrays, rows
