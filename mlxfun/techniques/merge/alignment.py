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

from collections.abc import Callable, Iterable, Iterator, Sequence
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
UNPACKED_BYTES = 64 << 20
"""Bound on the rows in float32 that are looked at at once."""
PAIR_BYTES = 256 << 20
"""Bound on the cost matrices that are on the device at once."""

Match = Callable[["Array"], "Array"]


def weight_features(bank: Bank, rank: int = RANK, seed: int = 0) -> mx.array:
    """Rows of all projections per neuron, unit length, reduced by PCA: float32 [E, H, r].

    PCA over all E x H neurons by randomised subspace iteration (Halko et al., 2011), some experts of
    one projection at a time: neither the concatenation nor a covariance is ever made. Exact where
    the rows are no longer than `rank`.
    """
    rows = _UnitRows(bank)
    widths = [rows.width(name) for name in bank.names]
    neurons = (len(bank.rows), rows.neurons, -1)
    if sum(widths) <= rank:
        whole = [mx.concatenate(_each(rows.some(name)), axis=0) for name in bank.names]
        return mx.concatenate(whole, axis=-1).reshape(neurons)
    # Random directions are orthogonal enough to begin with.
    drawn = np.random.default_rng(seed).standard_normal((sum(widths), rank + OVERSAMPLING))
    basis: Array = drawn.astype(np.float32)
    for _ in range(POWER_ITERATIONS):
        y = rows.times(basis)
        back = mx.concatenate([rows.transposed_times(name, y) for name in bank.names], axis=0)
        basis = _orthonormal(np.array(back, dtype=np.float64))
    y = rows.times(basis)
    _, vectors = np.linalg.eigh(np.array(y.T @ y, dtype=np.float64))
    main = vectors[:, ::-1][:, :rank].astype(np.float32)
    return (y @ mx.array(main)).reshape(neurons)


def _each(arrays: Iterable[mx.array]) -> list[mx.array]:
    """The arrays, each evaluated before the next is made."""
    found = []
    for array in arrays:
        mx.eval(array)
        found.append(array)
    return found


class _UnitRows:
    """The rows of all projections, of unit length over all of them, unpacked some experts at a time
    and anew for every product: a whole stack in float32 is the largest thing there would be."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.neurons = int(bank.weights(bank.names[0], [0]).shape[1])
        self._scale: mx.array | None = None
        squares = [
            mx.concatenate(_each(mx.sum(mx.square(part), axis=-1) for part in self._parts(name)))
            for name in bank.names
        ]
        length = mx.sqrt(sum(squares[1:], squares[0]))[..., None]
        self._scale = mx.where(length > 0, 1 / mx.maximum(length, 1e-30), 0.0)
        mx.eval(self._scale)

    def width(self, name: str) -> int:
        """D of a projection."""
        return int(self._bank.weights(name, [0]).shape[-1])

    def some(self, name: str) -> Iterator[mx.array]:
        """Rows [n * H, D] of a projection, in order."""
        for part in self._parts(name):
            yield part.reshape(-1, part.shape[-1])

    def times(self, basis: Array) -> mx.array:
        """Rows of all projections times the basis [sum of D, q], centred: [E * H, q]."""
        start, y = 0, mx.array(0.0)
        for name in self._bank.names:
            width = self.width(name)
            part = mx.array(basis[start : start + width])
            y = y + mx.concatenate(_each(rows @ part for rows in self.some(name)), axis=0)
            mx.eval(y)
            start += width
        return y - mx.mean(y, axis=0, keepdims=True)

    def transposed_times(self, name: str, y: mx.array) -> mx.array:
        """Rows of a projection, transposed, times y [E * H, q]: [D, q]."""
        start, total = 0, mx.array(0.0)
        for rows in self.some(name):
            total = total + rows.T @ y[start : start + len(rows)]
            mx.eval(total)
            start += len(rows)
        return total

    def _parts(self, name: str) -> Iterator[mx.array]:
        """Unpacked rows [n, H, D] of some experts."""
        count = len(self._bank.rows)
        step = max(1, UNPACKED_BYTES // (4 * self.neurons * self.width(name)))
        for start in range(0, count, step):
            part = self._bank.weights(name, range(start, min(start + step, count)))
            yield part if self._scale is None else part * self._scale[start : start + step]


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
