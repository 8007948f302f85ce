"""Least-squares refit of the remaining experts to the output of the original layer.

A prune leaves a layer with experts made for other company. Of an expert f(x) = D h(x), the output
projection D enters linearly, so the best one is a linear problem. With y the output of the layer
as it was, w'_e the weights after the prune and h_e the neurons, per token,

    minimise over A_e:  sum_t || y - sum_e w'_e (D_e + A_e) h_e ||^2  +  sum_e mu_e || A_e ||^2

by block coordinate descent, an exact solve per expert and sweep: with H the rows w'_e h_e [n, N] of
the expert's tokens and R [n, D] what the others leave over,

    A_e = (H^T H + mu_e I)^-1 H^T R,    mu_e = ridge x trace(H^T H) / N

Routers stay as they are. What the weights become is rounded, or packed, as it is stored, and a
layer whose rounded result is no better than before keeps its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.errors import ModelError
from mlxfun.model.device.memory import free_bytes
from mlxfun.model.device.processors import on_processors
from mlxfun.model.experts import Bank

if TYPE_CHECKING:
    from mlxfun.arrays import Array

SWEEPS = 3
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Tried per layer, ascending. Few tokens per expert need much: each has N unknowns per output."""
STRETCH = 128
HELD_SHARE = 0.25
"""Of the memory that is free, what the neurons of all tokens may take; else they are made anew for
each expert and sweep, which takes about twice as long."""
QUEUED = 8
"""Experts whose work is queued before the host waits."""


@dataclass(frozen=True)
class Routed:
    """What the experts of a layer were given and how it was weighted, over all tokens.

    inputs: [T, D], as the experts got them. chosen: int [T, K], positions among the live experts,
    -1 for none. weights: float32 [T, K], of the outputs.
    """

    inputs: mx.array
    chosen: Array
    weights: Array

    @cached_property
    def _by_expert(self) -> dict[int, tuple[Array, Array]]:
        flat = self.chosen.reshape(-1)
        order = np.argsort(flat, kind="stable")
        experts, starts = np.unique(flat[order], return_index=True)
        tokens = (order // self.chosen.shape[1]).astype(np.uint32)
        weights = self.weights.reshape(-1)[order]
        ends = [*starts[1:], len(flat)]
        return {
            int(expert): (tokens[start:end], weights[start:end])
            for expert, start, end in zip(experts, starts, ends, strict=True)
            if expert >= 0
        }

    @property
    def experts(self) -> list[int]:
        """The experts that some token uses, ascending."""
        return list(self._by_expert)

    def of(self, expert: int) -> tuple[Array, Array]:
        """(tokens that use the expert, ascending; its weight for each)."""
        none = (np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.float32))
        return self._by_expert.get(expert, none)


def neurons(bank: Bank, expert: int, x: mx.array) -> mx.array:
    """Neurons [n, N] of one expert for inputs x [n, D]."""
    alone = replace(bank, rows=(bank.rows[expert],))
    out: mx.array = alone.activations(x[None])[0].astype(mx.float32)
    return out


def output(bank: Bank, routed: Routed, ctx: Context = SILENT) -> mx.array:
    """The weighted sum of the experts' outputs, float32 [T, D']."""
    total: mx.array | None = None
    for number, expert in enumerate(routed.experts):
        tokens, weight = routed.of(expert)
        alone = replace(bank, rows=(bank.rows[expert],))
        index = mx.array(tokens)
        y = alone.outputs(alone.activations(routed.inputs[index][None]))[0].astype(mx.float32)
        y = y * mx.array(weight.astype(np.float32))[:, None]
        if total is None:
            total = mx.zeros((routed.inputs.shape[0], y.shape[-1]))
        total = total.at[index].add(y)
        if number % QUEUED == 0:
            mx.eval(total)
            ctx.check()
    if total is None:
        raise RuntimeError("no token was routed")
    mx.eval(total)
    return total


class Features:
    """The weighted neurons w h of each expert's tokens, float32 [n, N]: held where there is room."""

    def __init__(self, bank: Bank, routed: Routed, ctx: Context) -> None:
        self._bank, self._routed, self.ctx = bank, routed, ctx
        self._held: dict[int, mx.array] = {}
        width = bank.projection(bank.inward[0]).weight.shape[1]
        free = free_bytes()
        self._hold = free is None or 4 * width * routed.chosen.size <= HELD_SHARE * free
        self.tokens = {e: mx.array(routed.of(e)[0]) for e in routed.experts}

    def of(self, expert: int) -> mx.array:
        """Of one expert."""
        if expert in self._held:
            return self._held[expert]
        weight = mx.array(self._routed.of(expert)[1].astype(np.float32))
        x = self._routed.inputs[self.tokens[expert]]
        features = neurons(self._bank, expert, x) * weight[:, None]
        if self._hold:
            mx.eval(features)
            self._held[expert] = features
        return features

    def products(self, among: Array | None = None) -> dict[int, Array]:
        """H^T H of each expert, float32 [N, N], of the tokens `among`, bool [T], None for all."""
        found: dict[int, Array] = {}
        experts = list(self.tokens)
        for start in range(0, len(experts), QUEUED):
            self.ctx.check()
            some = experts[start : start + QUEUED]
            products = [self._product(expert, among) for expert in some]
            mx.eval(products)
            found |= {e: np.array(p) for e, p in zip(some, products, strict=True)}
        return found

    def _product(self, expert: int, among: Array | None) -> mx.array:
        features = self.of(expert)
        if among is not None:
            mine = np.flatnonzero(among[self._routed.of(expert)[0]]).astype(np.uint32)
            features = features[mx.array(mine)]
        return features.T @ features


Changes = dict[int, mx.array]
"""{position of an expert: what is added to its output projection, transposed, float32 [N, D]}."""


def refit(
    bank: Bank,
    routed: Routed,
    rest: mx.array,
    ridges: Sequence[float] = RIDGES,
    ctx: Context = SILENT,
) -> tuple[Changes, float]:
    """The changes, and the ridge that was best on a fifth of the tokens, left out for that.

    rest: float32 [T, D], what the experts as they are leave over of the output that is wanted.
    """
    features = Features(bank, routed, ctx)
    normal = features.products()
    ridge = ridges[0] if len(ridges) == 1 else _best_ridge(features, normal, rest, ridges)
    return _descend(features, normal, rest, ridge)[0], ridge


def left_out(tokens: int) -> Array:
    """bool [T]: every fifth stretch of STRETCH tokens. Neighbours are alike, so single tokens left
    out would be known from those beside them."""
    stretch = max(1, min(STRETCH, tokens // 10))
    return np.asarray(np.arange(tokens) // stretch % 5 == 4)


def _best_ridge(
    features: Features,
    normal: Mapping[int, Array],
    rest: mx.array,
    ridges: Sequence[float],
) -> float:
    out = left_out(int(rest.shape[0]))
    outside = features.products(out)
    inside = {expert: normal[expert] - outside[expert] for expert in normal}
    seen, unseen = (mx.array(part.astype(np.float32))[:, None] for part in (~out, out))
    errors: list[float] = []
    for ridge in ridges:
        # Two sweeps are enough to compare ridges.
        _, over = _descend(features, inside, rest, ridge, seen, sweeps=2)
        errors.append(energy(over * unseen))
        if errors[-1] > min(errors):
            break  # from its best on the error only grows
    return ridges[int(np.argmin(errors))]


def _descend(
    features: Features,
    normal: Mapping[int, Array],
    rest: mx.array,
    ridge: float,
    seen: mx.array | None = None,
    sweeps: int = SWEEPS,
) -> tuple[Changes, mx.array]:
    """The changes, and what they leave over of `rest` [T, D]. seen: float32 [T, 1], the tokens
    that the fit may look at, None for all. Only the inverses are made on the host.

    With r what is left over now, the exact solve of one expert moves its A by
    (H^T H + mu I)^-1 (H^T r - mu A), which needs no product of H with A.
    """
    inverses = _inverses(normal, ridge)
    mus = {expert: _mu(products, ridge) for expert, products in normal.items()}
    changes: Changes = {}
    for _ in range(sweeps):
        for number, (expert, tokens) in enumerate(features.tokens.items()):
            h, before = features.of(expert), changes.get(expert)
            left = rest[tokens]
            right = h.T @ (left if seen is None else left * seen[tokens])
            if before is not None:
                right = right - mus[expert] * before
            step = inverses[expert] @ right
            rest = rest.at[tokens].add(-(h @ step))
            changes[expert] = step if before is None else before + step
            if number % QUEUED == 0:
                mx.eval(rest, changes[expert])
                features.ctx.check()
        mx.eval(rest, changes)
    return changes, rest


def _inverses(normal: Mapping[int, Array], ridge: float) -> dict[int, mx.array]:
    """(normal + mu I)^-1 of each expert, float32 [N, N].

    By Cholesky, in float64, an expert per processor.
    """
    found = on_processors(lambda n: _inverse(n, ridge), normal.values())
    return {e: mx.array(inverse) for e, inverse in zip(normal, found, strict=True)}


def _inverse(normal: Array, ridge: float) -> Array:
    """(normal + mu I)^-1, float32 [N, N]: the ridge keeps it far from singular."""
    return inverse_of(normal, _mu(normal, ridge)).astype(np.float32)


def _mu(normal: Array, ridge: float) -> float:
    """The ridge times the mean of the diagonal."""
    return max(ridge * float(np.trace(normal)) / len(normal), 1e-9)


def inverse_of(normal: Array, mu: float) -> Array:
    """(normal + mu I)^-1 of products [N, N], float64.

    mu grows where the products are too imprecise for it, as those made in TF32 can be. Raises
    ModelError for products that are not finite.
    """
    if not np.isfinite(normal).all():
        raise ModelError("the neurons of an expert are not finite, so nothing can be fitted")
    size = len(normal)
    while True:
        matrix = normal.astype(np.float64)
        matrix[np.diag_indices(size)] += mu
        try:
            # NumPy's factor and products and not SciPy's LAPACK, which holds the interpreter's
            # lock while it computes: inverses on 16 processors then took as long as on one.
            half = _inverse_of_lower(np.linalg.cholesky(matrix))
        except np.linalg.LinAlgError:
            mu *= 10
        else:
            return np.asarray(half.T @ half)


SMALL = 64
"""Triangles of up to so many rows are inverted at once."""


def _inverse_of_lower(factor: Array) -> Array:
    """The inverse of a lower triangle [N, N], by halves: products do most of the work.

    [ A 0 ]^-1   [   A^-1          0   ]
    [ B C ]    = [ -C^-1 B A^-1   C^-1 ]
    """
    size = len(factor)
    if size <= SMALL:
        return np.asarray(np.tril(np.linalg.inv(factor)))
    half = size // 2
    found = np.zeros_like(factor)
    first, last = _inverse_of_lower(factor[:half, :half]), _inverse_of_lower(factor[half:, half:])
    found[:half, :half], found[half:, half:] = first, last
    found[half:, :half] = -(last @ (factor[half:, :half] @ first))
    return found


def energy(values: mx.array) -> float:
    """The sum of squares."""
    return number(mx.sum(mx.square(values)))


def number(scalar: mx.array) -> float:
    """A scalar array as a float."""
    return float(np.array(scalar))


def changed(weight: mx.array, changes: Mapping[int, mx.array]) -> mx.array:
    """A stack [E, D, N] with the changes of its rows added, float32."""
    experts = sorted(changes)
    added = mx.stack([changes[e].T for e in experts])
    return weight.at[mx.array(experts, dtype=mx.uint32)].add(added)
