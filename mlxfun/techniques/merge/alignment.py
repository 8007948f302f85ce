"""Neuron alignment: the permutation that matches a member's neurons to its centroid's.

The neurons of an expert can be permuted without changing what it computes, so experts are averaged
neuron by neuron only after matching them. With a_i a neuron's activations over tokens and w_i its
row of [gate | up | down^T], each scaled to length 1 and the latter reduced to its RANK principal
components (scaled by their singular values), the cost of matching neuron i of the centroid with
neuron j of the member (B. Knyazev, REAM) is

    cost[i, j] = |a_i - a_j| + |w_i - w_j|

"hungarian" minimises the sum of the costs, "greedy" takes the cheapest pair left again and again,
"none" leaves the neurons in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.model.device.processors import on_processors
from mlxfun.model.experts import Bank

if TYPE_CHECKING:
    from mlxfun.arrays import Array

RANK = 64
OVERSAMPLING = 16
POWER_ITERATIONS = 2
GRAM_FLOOR = 1e-10
PAIR_BYTES = 256 << 20
"""Bound on the cost matrices that are on the device at once."""

Match = Callable[["Array"], "Array"]


def weight_features(bank: Bank, rank: int = RANK, seed: int = 0) -> mx.array:
    """Rows of all projections per neuron, unit length, reduced by PCA: float32 [E, H, r].

    PCA over all E x H neurons by randomised subspace iteration (Halko et al., 2011), one
    projection at a time: neither the concatenation nor a covariance is ever made. Exact where the
    rows are no longer than `rank`.
    """
    names = bank.names
    # One projection at a time is unpacked, here and in every product below.
    squares = _each(mx.sum(mx.square(bank.weights(name)), axis=-1, keepdims=True) for name in names)
    length = mx.sqrt(sum(squares[1:], squares[0]))
    scale = mx.where(length > 0, 1 / mx.maximum(length, 1e-30), 0.0)
    mx.eval(scale)

    def pieces() -> Iterator[mx.array]:
        # Made anew for every product: a dequantised stack is the largest thing here.
        for name in names:
            rows = bank.weights(name) * scale
            yield rows.reshape(-1, rows.shape[-1])

    widths = [piece.shape[-1] for piece in pieces()]
    neurons = (scale.shape[0], scale.shape[1], -1)
    if sum(widths) <= rank:
        return mx.concatenate(list(pieces()), axis=-1).reshape(neurons)
    # Random directions are orthogonal enough to begin with.
    drawn = np.random.default_rng(seed).standard_normal((sum(widths), rank + OVERSAMPLING))
    basis: Array = drawn.astype(np.float32)
    for _ in range(POWER_ITERATIONS):
        y = _project(pieces(), basis, widths)
        back = mx.concatenate(_each(piece.T @ y for piece in pieces()), axis=0)
        basis = _orthonormal(np.array(back, dtype=np.float64))
    y = _project(pieces(), basis, widths)
    _, vectors = np.linalg.eigh(np.array(y.T @ y, dtype=np.float64))
    main = vectors[:, ::-1][:, :rank].astype(np.float32)
    return (y @ mx.array(main)).reshape(neurons)


def _each(arrays: Iterator[mx.array]) -> list[mx.array]:
    """The arrays, each evaluated before the next is made."""
    found = []
    for array in arrays:
        mx.eval(array)
        found.append(array)
    return found


def _project(pieces: Iterator[mx.array], basis: Array, widths: Sequence[int]) -> mx.array:
    """Centred rows times the basis, [E * H, q]."""
    start, y = 0, mx.array(0.0)
    for piece, width in zip(pieces, widths, strict=True):
        y = y + piece @ mx.array(basis[start : start + width])
        mx.eval(y)
        start += width
    return y - mx.mean(y, axis=0, keepdims=True)


def _orthonormal(columns: Array) -> Array:
    """An orthonormal basis of what float64 columns [D, q] span, [D, <= q].

    By the q x q Gram matrix: a QR of the tall matrix starts threads that fight with MLX's. What
    is nearly dependent is dropped, so that the basis is orthonormal to about 1e-6 all the same.
    """
    columns = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > GRAM_FLOOR * values[-1]
    q = columns @ (vectors[:, kept] / np.sqrt(values[kept]))
    result: Array = q.astype(np.float32)
    return result


def unit_activations(neurons: mx.array) -> mx.array:
    """[E, T, H] -> float32 [E, T, H], each neuron's column of unit length (or zero)."""
    wide = neurons.astype(mx.float32)
    length = mx.sqrt(mx.sum(mx.square(wide), axis=1, keepdims=True))
    return mx.where(length > 0, wide / mx.maximum(length, 1e-30), 0.0)


def costs(
    activations: mx.array, features: mx.array, pairs: Sequence[tuple[int, int]]
) -> Iterator[Array]:
    """Cost matrices float32 [P, H, H] of (centroid, member) pairs, in order, some at a time.

    activations: [E, T, H] of unit columns; features: [E, H, r].
    """
    width = activations.shape[-1]
    step = max(1, PAIR_BYTES // (4 * 4 * width * width))
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        a, b = (mx.array(side, dtype=mx.uint32) for side in zip(*part, strict=True))
        total = _distances(activations[a].swapaxes(1, 2), activations[b].swapaxes(1, 2))
        total = total + _distances(features[a], features[b])
        yield np.array(total)


def _distances(a: mx.array, b: mx.array) -> mx.array:
    """Euclidean distances [P, N, M] between rows of a [P, N, D] and b [P, M, D]."""
    squares = mx.sum(a * a, axis=-1)[:, :, None] + mx.sum(b * b, axis=-1)[:, None]
    return mx.sqrt(mx.maximum(squares - 2 * a @ b.swapaxes(1, 2), 0.0))


def match_pairs(found: Iterator[Array], match: Match) -> Iterator[Array]:
    """The match of each pair, in order. found: see `costs`."""
    for part in found:
        yield from on_processors(match, part)


def hungarian(cost: Array) -> Array:
    """For each row of cost [H, H] its column, int [H], so that the sum of costs is least."""
    # Imported where it is used: SciPy would take a part of every start.
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost)
    result: Array = columns
    return result


def greedy(cost: Array) -> Array:
    """For each row its column, int [H]: the cheapest pair left is taken until none is.

    Equal costs go to the lower row, then the lower column. A pair that is cheapest for both its
    row and its column would be taken sooner or later, so all of those are taken at once.
    """
    match = np.full(len(cost), -1)
    rows, columns = np.arange(len(cost)), np.arange(len(cost))
    while rows.size:
        left = cost[np.ix_(rows, columns)]
        best = left.argmin(axis=1)
        mutual = left.argmin(axis=0)[best] == np.arange(rows.size)
        match[rows[mutual]] = columns[best[mutual]]
        rows, columns = rows[~mutual], np.delete(columns, best[mutual])
    return match


def unmatched(cost: Array) -> Array:
    """The neurons in their order."""
    return np.arange(len(cost))


MATCHES: dict[str, Match] = {"hungarian": hungarian, "greedy": greedy, "none": unmatched}
