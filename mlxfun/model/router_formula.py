"""A router as a formula: logits in, chosen experts and weights out, for any subset of experts.

To ask what a layer would put out without one of its experts, the router's choice must be made
again for sets of experts that were never built. The formula has a few variants, and which one a
model follows is not taken on trust: `Routing.of` keeps the variant that reproduces the choices and
weights seen in a forward, and refuses when none does.

    s = softmax(z) over the living | sigmoid(z) | z          z: logits [T, E] of the live experts
    r = s + selection bias, in losing groups a fill value    chosen: the K largest r
    w = s[chosen] | softmax(z[chosen]), / sum, x scale[e]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.errors import PlanError
from mlxfun.model.anatomy.facts import Scoring
from mlxfun.model.delta import Resident

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.model.live_experts import LiveExperts

AGREE = 0.97
"""Share of the tokens whose chosen experts must be reproduced, ties excepted. Another formula misses
far more than that."""

CLOSE = 0.02
"""How far a weight may be off, relatively: bfloat16 routers round at 0.4 % an operation."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The formula of one layer's router.

    score: see mlxfun.model.anatomy.facts. normalised: weights are divided by their sum.
    best: how many of a group's experts make its score. bias: selection bias float32 [E], None
    without. scale: float32 [E], what each expert's weight is multiplied by.
    """

    score: Scoring
    top_k: int
    normalised: bool = True
    n_group: int = 1
    topk_group: int = 1
    best: int = 2
    fill: float = 0.0
    bias: mx.array | None = None
    scale: mx.array | None = None

    def __call__(self, logits: mx.array, alive: mx.array) -> tuple[mx.array, mx.array]:
        """(chosen, weights), [T, K] each, lazy; differentiable in `logits` through the weights.

        logits: float32 [T, E]. alive: bool [E] or [T, E]; at least top-k experts of each token.
        """
        never = -mx.inf
        living = mx.where(alive, logits, never)
        scores = living
        if self.score == "softmax":
            scores = mx.softmax(living, axis=-1)
        elif self.score == "sigmoid":
            scores = mx.sigmoid(logits)
        rank = scores if self.bias is None else scores + self.bias
        rank = mx.stop_gradient(mx.where(alive, rank, never))
        if self.n_group > 1:
            rank = mx.where(alive, self._without_losing_groups(rank), never)
        chosen = mx.argpartition(-rank, self.top_k - 1, axis=-1)[..., : self.top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if self.score == "topk-softmax":
            weights = mx.softmax(weights, axis=-1)
        elif self.normalised:
            weights = weights / mx.sum(weights, axis=-1, keepdims=True)
        if self.scale is not None:
            weights = weights * self.scale[chosen]
        return chosen, weights

    def _without_losing_groups(self, rank: mx.array) -> mx.array:
        grouped = rank.reshape(*rank.shape[:-1], self.n_group, -1)
        best = mx.topk(grouped, min(self.best, grouped.shape[-1]), axis=-1).sum(axis=-1)
        losing = self.n_group - self.topk_group
        lost = mx.argpartition(best, max(losing - 1, 0), axis=-1)[..., :losing]
        mask = mx.zeros(best.shape, dtype=mx.bool_)
        if losing:
            mask = mx.put_along_axis(mask, lost, mx.array(True), axis=-1)
        return mx.where(mask[..., None], self.fill, grouped).reshape(rank.shape)

    def _tied(self, seen: Seen, chosen: Array) -> Array:
        """Whether `chosen` [T, K] and what was seen differ by experts, or by groups, that are equal
        within what the model's dtype can tell apart; bool [T]."""
        scores = seen.logits
        if self.score == "softmax":
            scores = mx.softmax(scores, axis=-1)
        elif self.score == "sigmoid":
            scores = mx.sigmoid(scores)
        rank = scores if self.bias is None else scores + self.bias
        values = np.array(rank)
        mine, theirs = _membership(chosen, values.shape), _membership(seen.chosen, values.shape)
        # Of each of the two: the score is rounded, and so is its sum with the bias.
        rounding = seen.precision * (np.abs(values) + np.abs(np.array(scores)))
        margin = np.where(mine & ~theirs, values, -np.inf).max(axis=1)
        margin -= np.where(theirs & ~mine, values, np.inf).min(axis=1)
        tied = margin <= np.where(mine != theirs, rounding, 0).max(axis=1)
        if self.n_group > self.topk_group:
            grouped = values.reshape(len(values), self.n_group, -1)
            sums = np.sort(np.sort(grouped, axis=-1)[..., -self.best :].sum(axis=-1), axis=-1)
            gap = sums[:, -self.topk_group] - sums[:, -self.topk_group - 1]
            tied |= gap <= self.best * rounding.max(axis=1)
        return np.asarray(tied)

    @classmethod
    def of(cls, moe: LiveExperts, resident: Resident, seen: Seen) -> Routing:
        """The formula that made what was seen. Raises PlanError where none of the variants did."""
        layer = moe.layer
        if layer.router_rows > layer.num_experts:
            raise PlanError(
                f"layer {layer.index}: the router of {layer.family} also chooses among "
                f"{layer.router_rows - layer.num_experts} experts that are no weights, so outputs "
                "cannot be foreseen from the experts alone; use --metric reap_sum"
            )
        bias = None
        if layer.bias_name is not None:
            own = resident.tree.get(f"{layer.bias_owner}.{layer.bias_name}")
            bias = own.astype(mx.float32).reshape(-1)
        plain = cls(
            layer.facts.score,
            layer.top_k,
            n_group=layer.n_group,
            topk_group=layer.topk_group,
            fill=layer.facts.group_fill,
            bias=bias,
        )
        normalised = (layer.facts.renormalised, not layer.facts.renormalised)
        for norm, best in product(normalised, (2, 1) if layer.grouped else (2,)):
            found = replace(plain, normalised=norm, best=best)._fitted(seen)
            if found is not None:
                return found
        raise PlanError(
            f"layer {layer.index}: no formula known here gives the experts and weights that the "
            f"router of {layer.family} chose, so its choice among fewer experts cannot be "
            "foreseen; use --metric reap_sum"
        )

    def _fitted(self, seen: Seen) -> Routing | None:
        """This formula with the scales that fit what was seen, None if it does not fit."""
        everyone = mx.ones((seen.logits.shape[-1],), dtype=mx.bool_)
        chosen, weights = (np.array(a) for a in self(seen.logits, everyone))
        there = np.sort(chosen, axis=1), np.sort(seen.chosen, axis=1)
        same = (there[0] == there[1]).all(axis=1)
        agree = same if same.all() else same | self._tied(seen, chosen)
        if not same.any() or agree.mean() < AGREE:
            return None
        mine = np.take_along_axis(weights, np.argsort(chosen, axis=1), axis=1)[same]
        model = np.take_along_axis(seen.weights, np.argsort(seen.chosen, axis=1), axis=1)[same]
        ratio = model / np.maximum(mine, 1e-20)
        scale = _by_expert(ratio, there[0][same], seen.logits.shape[-1])
        if (np.abs(scale[there[0][same]] * mine - model) > CLOSE * model.max()).mean() > 1 - AGREE:
            return None
        plain = bool(np.allclose(scale, 1.0, atol=1e-3))
        return self if plain else replace(self, scale=mx.array(scale.astype(np.float32)))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a router did in a forward. logits: float32 [T, E] of the live experts; chosen: [T, K]
    positions among them; weights: float [T, K] as applied. precision: relative, of the dtype that
    the router computes in (2^-7 for bfloat16)."""

    logits: mx.array
    chosen: Array
    weights: Array
    precision: float = float(np.finfo(np.float32).eps)


def _membership(chosen: Array, shape: tuple[int, ...]) -> Array:
    """bool [T, E]: which experts are among `chosen` [T, K]."""
    members = np.zeros(shape, dtype=np.bool_)
    np.put_along_axis(members, chosen.astype(np.int64), True, axis=1)
    return members


def _by_expert(ratio: Array, expert: Array, experts: int) -> Array:
    """The median ratio of each expert [E], the common median for those never chosen."""
    common = float(np.median(ratio)) if ratio.size else 1.0
    return np.array(
        [
            float(np.median(ratio[expert == e])) if (expert == e).any() else common
            for e in range(experts)
        ]
    )
