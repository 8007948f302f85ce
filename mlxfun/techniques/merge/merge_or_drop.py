"""Merge or drop, decided per expert by the error of the layer's output.

A merge puts several experts into one, a prune drops them; which serves the layer better is measured.
With y what the layer put out, and what is left over when all members are dropped,

    rest = y - sum over centroids of w' f,

taking a group of members into its centroid changes the output of the centroid's tokens by
w' (f_merged - f). Members are tried in descending share, one at a time, with their whole share of
the mean and with smaller fractions of it (FRACTIONS; what a member does not take falls to its
centroid), and taken in with the fraction that makes the rest smallest; members that no fraction
serves are dropped. The rest is brought up to date after each group, so that groups do not make good
the same error twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.model.experts import Bank
from mlxfun.techniques.refit.least_squares import Routed, energy

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Group = tuple[int, ...]

FRACTIONS = (1.0, 0.5, 0.25, 0.1)
"""Of a member's share. Experts that have little in common cancel in a whole mean, not in a small part
of one."""

Mixed = Callable[[Mapping[int, float]], dict[str, mx.array]]
"""{member: fraction of its share}, the centroid first -> the merged expert's arrays by name:
projections [N, D], neurons first, float32, and biases under NAME.bias."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """groups: each centroid with the members taken in. fractions: {member: fraction of its share}.
    rest: what is left over, float32 [T, D].
    """

    groups: list[Group]
    fractions: dict[int, float]
    rest: mx.array


def choose(
    bank: Bank,
    routed: Routed,
    rest: mx.array,
    groups: Sequence[Sequence[int]],
    mixed: Mixed,
    ctx: Context = SILENT,
) -> Chosen:
    """Which members are worth taking in. Checks for a cancel before each group.

    bank, routed: of the centroids alone, in the order of `groups`. rest: float32 [T, D]. groups:
    each its centroid, then its members in descending share; positions among the experts that
    `mixed` knows.
    """
    found: list[Group] = []
    fractions: dict[int, float] = {}
    for place, group in enumerate(groups):
        ctx.check()
        tokens, weight = routed.of(place)
        taken: dict[int, float] = {group[0]: 1.0}
        if len(group) > 1 and len(tokens):
            taken, change = _members(bank, routed, rest, (place, tokens, weight), group, mixed)
            if change is not None:
                rest = rest.at[mx.array(tokens)].add(-change)
                mx.eval(rest)
        found.append(tuple(taken))
        fractions |= taken
    return Chosen(found, fractions, rest)


def _members(
    bank: Bank,
    routed: Routed,
    rest: mx.array,
    part: tuple[int, Array, Array],
    group: Sequence[int],
    mixed: Mixed,
) -> tuple[dict[int, float], mx.array | None]:
    """The members of one group that are taken in, each with its fraction, and what that changes
    [n, D]; None for none.
    """
    place, tokens, weight = part
    index = mx.array(tokens)
    x, left = routed.inputs[index], rest[index]
    w = mx.array(weight.astype(np.float32))[:, None]
    alone = _alone(bank, place, x)
    taken = {group[0]: 1.0}
    best, kept = energy(left), None
    for member in group[1:]:
        before = taken
        for fraction in FRACTIONS:
            trial = {**before, member: fraction}
            change = w * (merged_output(bank, x, mixed(trial)) - alone)
            error = energy(left - change)
            if error < best:
                taken, best, kept = trial, error, change
    return taken, kept


def _alone(bank: Bank, place: int, x: mx.array) -> mx.array:
    """The centroid's own outputs [n, D], float32."""
    one = Bank(bank.experts, bank.path, (bank.rows[place],), bank.inward, bank.outward)
    out: mx.array = one.outputs(one.activations(x[None]))[0].astype(mx.float32)
    return out


def merged_output(bank: Bank, x: mx.array, arrays: dict[str, mx.array]) -> mx.array:
    """Outputs [n, D] of an expert given as arrays, see Mixed, for inputs x [n, D]."""
    wide = x.astype(mx.float32)
    values = []
    for name in bank.inward:
        value = wide @ arrays[name].T
        bias = arrays.get(f"{name}.bias")
        # With a token and a place axis, as the stack's own projections put them out.
        values.append((value if bias is None else value + bias)[None])
    neurons: mx.array = bank.experts.activation(*reversed(values))[0]
    out = neurons @ arrays[bank.outward]
    bias = arrays.get(f"{bank.outward}.bias")
    return out if bias is None else out + bias
