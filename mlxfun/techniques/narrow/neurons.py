"""Which neurons of an expert stay.

"obs" is optimal brain surgeon (Hassibi and Stork, 1993) on the expert's output projection: with H
the neurons of the expert's tokens, weighted by the router [n, N], W = D^T the projection [N, D] and

    K = (H^T H + DAMPING x mean(diag(H^T H)) I)^-1

the neuron that goes is the one without which the others, refitted, lose least:

    j = argmin ||W_j||^2 / K_jj,    W -= K_:j W_j / K_jj,    K -= K_:j K_j: / K_jj

again and again. Only ||W_j||^2 is needed of W, so G = W W^T [N, N] is carried instead, whatever the
width of the model. Neurons that are packed together go together: with S the neurons of a group the
cost is tr(K_SS^-1 G_SS).

"mean" and "rms" take the largest mean of |h_j|, or root of the mean of h_j^2, times ||W_j||.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxfun.techniques.refit.least_squares import inverse_of

if TYPE_CHECKING:
    from mlxfun.arrays import Array

DAMPING = 0.01
BLOCK = 32
"""Neurons that go before the matrices are brought up to date at once, which is what makes it fast."""


def kept_by_obs(normal: Array, outward: Array, keep: int, group: int = 1) -> Array:
    """The `keep` neurons that stay of each of B experts, int [B, W], ascending.

    normal: H^T H, float [B, N, N]. outward: W W^T, float [B, N, N]. group: neurons that go together;
    N and keep are multiples of it. Several experts at once, as a step is a handful of short vectors.
    """
    batch, size = normal.shape[:2]
    traces = np.trace(normal, axis1=1, axis2=2, dtype=np.float64)
    damping = np.maximum(DAMPING * traces / size, 1e-12)
    inverse = np.stack([inverse_of(n, mu) for n, mu in zip(normal, damping, strict=True)])
    gram = outward.astype(np.float64)
    alive = np.ones((batch, size), dtype=np.bool_)
    if group > 1:
        for parts in zip(inverse, gram, alive, strict=True):
            _drop_groups(*parts, (size - keep) // group, group)
    else:
        gone = 0
        while gone < size - keep:
            count = min(BLOCK, size - keep - gone)
            _drop_block(inverse, gram, alive, count)
            gone += count
    return np.nonzero(alive)[1].reshape(batch, keep)


def _drop_block(inverse: Array, gram: Array, alive: Array, count: int) -> None:
    """Let `count` neurons of each expert go, one by one; `inverse` and `gram` [B, N, N] are updated
    at the end.

    With k = K_:j / K_jj and v = G_:j - G_jj k / 2, the updates of a step are
    K -= K_jj k k^T and G -= k v^T + v k^T; until they are made, columns are corrected for them.
    """
    batch, size = alive.shape
    each = np.arange(batch)
    roots, ks, vs = (np.zeros((batch, count, size)) for _ in range(3))
    k_diagonal, g_diagonal = (m.diagonal(axis1=1, axis2=2).copy() for m in (inverse, gram))
    k_diagonal[~alive], g_diagonal[~alive] = 1.0, np.inf
    for step in range(count):
        j = (g_diagonal / k_diagonal).argmin(axis=1)
        done = slice(0, step)
        column, g_column = inverse[each, j], gram[each, j]
        if step:
            root, one, other = (a[each, done, j][:, None] for a in (roots, ks, vs))
            column -= (root @ roots[:, done])[:, 0]
            g_column -= (other @ ks[:, done])[:, 0] + (one @ vs[:, done])[:, 0]
        pivot = column[each, j][:, None]
        k = column / pivot
        v = g_column - 0.5 * g_column[each, j][:, None] * k
        root = column / np.sqrt(pivot)
        roots[:, step], ks[:, step], vs[:, step] = root, k, v
        k_diagonal -= np.square(root)
        g_diagonal -= 2 * k * v
        alive[each, j] = False
        k_diagonal[each, j], g_diagonal[each, j] = 1.0, np.inf
    inverse -= roots.swapaxes(1, 2) @ roots
    change = ks.swapaxes(1, 2) @ vs
    gram -= change + change.swapaxes(1, 2)


def _drop_groups(inverse: Array, gram: Array, alive: Array, count: int, group: int) -> None:
    """Let `count` groups of `group` neighbours go, one by one."""
    groups = np.arange(len(alive)).reshape(-1, group)
    left = list(range(len(groups)))
    for _ in range(count):
        costs = [
            float(np.trace(np.linalg.solve(inverse[np.ix_(s, s)], gram[np.ix_(s, s)])))
            for s in (groups[g] for g in left)
        ]
        out = groups[left.pop(int(np.argmin(costs)))]
        b = np.linalg.solve(inverse[np.ix_(out, out)], inverse[out]).T
        rows, inner = gram[out], gram[np.ix_(out, out)]
        inverse -= b @ inverse[out]
        gram += b @ inner @ b.T - b @ rows - rows.T @ b.T
        alive[out] = False


def kept_by_size(scores: Array, keep: int, group: int = 1) -> Array:
    """The `keep` neurons with the largest scores [N], or sums of scores of groups, ascending."""
    sums = scores.reshape(-1, group).sum(axis=1)
    best = np.sort(np.argsort(-sums, kind="stable")[: keep // group])
    return np.asarray((best[:, None] * group + np.arange(group)).reshape(-1))
