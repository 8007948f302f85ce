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
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.model.experts import Bank

if TYPE_CHECKING:
    from mlxfun.arrays import Array

SWEEPS = 3
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Tried per layer, ascending. Few tokens per expert need much: each has N unknowns per output."""
STRETCH = 128


@dataclass(frozen=True, slots=True)
class Routed:
    """What the experts of a layer were given and how it was weighted, over all tokens.

    inputs: [T, D], as the experts got them. chosen: int [T, K], positions among the live experts,
    -1 for none. weights: float32 [T, K], of the outputs.
    """

    inputs: mx.array
    chosen: Array
    weights: Array

    def of(self, expert: int) -> tuple[Array, Array]:
        """(tokens that use the expert, ascending; its weight for each)."""
        tokens, place = np.nonzero(self.chosen == expert)
        return tokens.astype(np.uint32), self.weights[tokens, place]


def neurons(bank: Bank, expert: int, x: mx.array) -> mx.array:
    """Neurons [n, N] of one expert for inputs x [n, D]."""
    alone = replace(bank, rows=(bank.rows[expert],))
    out: mx.array = alone.activations(x[None])[0].astype(mx.float32)
    return out


def output(bank: Bank, routed: Routed) -> mx.array:
    """The weighted sum of the experts' outputs, float32 [T, D']."""
    total: mx.array | None = None
    for expert in range(len(bank.rows)):
        tokens, weight = routed.of(expert)
        if not len(tokens):
            continue
        alone = replace(bank, rows=(bank.rows[expert],))
        index = mx.array(tokens)
        y = alone.outputs(alone.activations(routed.inputs[index][None]))[0].astype(mx.float32)
        y = y * mx.array(weight.astype(np.float32))[:, None]
        if total is None:
            total = mx.zeros((routed.inputs.shape[0], y.shape[-1]))
        total = total.at[index].add(y)
        mx.eval(total)
    if total is None:
        raise RuntimeError("no token was routed")
    return total


@dataclass(frozen=True, slots=True)
class _Block:
    """One expert's part. features: w h, float32 [n, N] of the tokens [n]; normal: their products,
    float64 [N, N].
    """

    tokens: mx.array
    features: mx.array
    normal: Array

    def among(self, wanted: Array) -> _Block:
        """The part of the tokens that are `wanted`, bool [T]."""
        mine = np.flatnonzero(wanted[np.array(self.tokens)]).astype(np.uint32)
        features = self.features[mx.array(mine)]
        return _Block(self.tokens[mx.array(mine)], features, _products(features))


def _products(features: mx.array) -> Array:
    return np.array(features.T @ features).astype(np.float64)


Changes = dict[int, mx.array]
"""{position of an expert: what is added to its output projection, transposed, float32 [N, D]}."""


def refit(
    bank: Bank, routed: Routed, rest: mx.array, ridges: Sequence[float] = RIDGES
) -> tuple[Changes, float]:
    """The changes, and the ridge that was best on a fifth of the tokens, left out for that.

    rest: float32 [T, D], what the experts as they are leave over of the output that is wanted.
    """
    blocks = {
        expert: _block(bank, expert, routed)
        for expert in range(len(bank.rows))
        if len(routed.of(expert)[0])
    }
    ridge = ridges[0] if len(ridges) == 1 else _best_ridge(blocks, rest, ridges)
    return _descend(blocks, rest, ridge), ridge


def _block(bank: Bank, expert: int, routed: Routed) -> _Block:
    tokens, weight = routed.of(expert)
    index = mx.array(tokens)
    h = neurons(bank, expert, routed.inputs[index])
    features = h * mx.array(weight.astype(np.float32))[:, None]
    mx.eval(features)
    return _Block(index, features, _products(features))


def left_out(tokens: int) -> Array:
    """bool [T]: every fifth stretch of STRETCH tokens. Neighbours are alike, so single tokens left
    out would be known from those beside them."""
    stretch = max(1, min(STRETCH, tokens // 10))
    return np.asarray(np.arange(tokens) // stretch % 5 == 4)


def _best_ridge(blocks: Mapping[int, _Block], rest: mx.array, ridges: Sequence[float]) -> float:
    out = left_out(int(rest.shape[0]))
    inside = {expert: block.among(~out) for expert, block in blocks.items()}
    outside = {expert: block.among(out) for expert, block in blocks.items()}
    errors: list[float] = []
    for ridge in ridges:
        changes = _descend(inside, rest, ridge, sweeps=2)  # enough to compare ridges
        over = rest
        for expert, block in outside.items():
            over = over.at[block.tokens].add(-(block.features @ changes[expert]))
        errors.append(energy(over * mx.array(out.astype(np.float32))[:, None]))
        if errors[-1] > min(errors):
            break  # from its best on the error only grows
    return ridges[int(np.argmin(errors))]


def _descend(
    blocks: Mapping[int, _Block], rest: mx.array, ridge: float, sweeps: int = SWEEPS
) -> Changes:
    """The changes. The sweeps stay on the device: only the inverses are made on the host."""
    inverses = {expert: _inverse(block.normal, ridge) for expert, block in blocks.items()}
    width = int(rest.shape[-1])
    changes = {e: mx.zeros((len(block.normal), width)) for e, block in blocks.items()}
    for _ in range(sweeps):
        for expert, block in blocks.items():
            moved = rest[block.tokens] + block.features @ changes[expert]
            change = inverses[expert] @ (block.features.T @ moved)
            rest = rest.at[block.tokens].add(block.features @ (changes[expert] - change))
            changes[expert] = change
        mx.eval(rest, changes)
    return changes


def _inverse(normal: Array, ridge: float) -> mx.array:
    """(normal + mu I)^-1, float32 [N, N]: the ridge keeps it far from singular."""
    size = len(normal)
    mu = max(ridge * float(np.trace(normal)) / size, 1e-9)
    inverse = np.linalg.inv(normal + mu * np.eye(size))
    return mx.array(inverse.astype(np.float32))


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
