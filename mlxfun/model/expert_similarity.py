"""Pairwise expert similarity and grouping, as in REAM.

With f_e the output of expert e, p_e its gate probability, and z_e its column of gate logits over
the T tokens, scaled to length 1, the similarity of two experts (B. Knyazev, REAM) is

    s(a, b) = 1/2 [ (1 + cos(u_a, u_b)) / 2  +  1 - |z_a - z_b| / max |z_i - z_j| ]

where u_e = mean over tokens of p_e f_e ("gated") or of f_e ("average"): both are in 0..1.

Pseudo-pruning: from the most to the least salient, each centroid claims up to C - 1 of the nearest
experts that nobody claimed. A few centroids take all that goes, the others stay exactly as they
are; the members weigh little in their group, since groups are weighted by saliency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.errors import PlanError
from mlxfun.model.experts import Bank

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Groups = tuple[tuple[int, ...], ...]
"""Members of each group, its centroid first; positions among the E live experts."""


def mean_outputs(bank: Bank, neurons: mx.array, gates: mx.array | None) -> mx.array:
    """Mean output of every expert over the tokens, [E, D] float32, each token weighted by its gate.

    neurons: [E, T, H]; gates: [T, E], None for weight 1. The mean is taken ahead of the output
    projection, which is linear: a T-th of the work.
    """
    tokens = neurons.shape[1]
    if gates is None:
        return bank.outputs(mx.mean(neurons, axis=1, keepdims=True))[:, 0].astype(mx.float32)
    weights = (gates.T / tokens)[:, None].astype(neurons.dtype)
    mean = bank.outputs(weights @ neurons)[:, 0].astype(mx.float32)
    bias = bank.bias(bank.outward)
    if bias is not None:
        # The projection added its whole bias; each token brings its gate's share of it.
        mean = mean + (mx.mean(gates, axis=0)[:, None] - 1) * bias
    return mean


def similarity(outputs: Array, logits: Array) -> Array:
    """REAM's similarity, float64 [E, E]. outputs: [E, D]; logits: [T, E]. See the module's text."""
    unit = _unit(outputs.astype(np.float64))
    cosine = np.clip(unit @ unit.T, -1.0, 1.0)
    columns = _unit(logits.T.astype(np.float64))
    distance = distances(columns, columns)
    most = distance.max()
    apart = distance / most if most > 0 else distance
    result: Array = 0.5 * ((1 + cosine) / 2 + 1 - apart)
    return result


def distances(a: Array, b: Array) -> Array:
    """Euclidean distances [N, M] between the rows of a [N, D] and b [M, D]."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    result: Array = np.sqrt(np.maximum(squared, 0.0))
    return result


def _unit(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = rows / np.where(length > 0, length, 1.0)
    return unit


def pseudo_prune(
    alike: Array, saliency: Array, centroids: Sequence[int], most: int, kinds: Sequence[int]
) -> Groups:
    """Assign every expert to a centroid; see the module's text. All arguments are per live expert.

    alike: [E, E]; saliency: [E]; most: group size with its centroid; kinds: [E] the router's group
    of each expert. An expert joins a centroid of its own router group only: tokens that select
    that group would not reach it in another. Returns groups by ascending centroid.

    Raises PlanError if the centroids cannot hold everybody.
    """
    free = sorted(set(range(len(saliency))) - set(centroids))
    groups: dict[int, tuple[int, ...]] = {}
    for centroid in sorted(centroids, key=lambda e: (-saliency[e], e)):
        near = [e for e in free if kinds[e] == kinds[centroid]]
        near.sort(key=lambda e: (-alike[centroid, e], e))
        claimed = near[: most - 1]
        groups[centroid] = (centroid, *claimed)
        free = [e for e in free if e not in claimed]
    if free:
        raise PlanError(
            f"--max-group-size {most} lets {len(centroids)} centroids take "
            f"{len(saliency) - len(centroids) - len(free)} of the "
            f"{len(saliency) - len(centroids)} experts to merge; raise it, or merge fewer"
        )
    return tuple(groups[centroid] for centroid in sorted(groups))


def group_weights(
    saliency: Array, group: Sequence[int], fractions: Mapping[int, float] | None = None
) -> Array:
    """Shares of a group's members, float64, adding up to 1: their saliencies, normalised.

    A saliency of zero counts as the smallest other one, at most 0.5, so that nobody is lost
    without a trace (REAM's rule). fractions: {member: part of its share that it takes}; the rest of
    it falls to the centroid, `group[0]`.
    """
    shares = saliency[list(group)].astype(np.float64)
    positive = shares[shares > 0]
    least = min(0.5, float(positive.min())) if positive.size else 0.5
    shares = np.where(shares > 0, shares, least)
    result: Array = shares / shares.sum()
    if fractions is not None:
        result = result * np.array([fractions[member] for member in group])
        result[0] = 1 - result[1:].sum()
    return result
