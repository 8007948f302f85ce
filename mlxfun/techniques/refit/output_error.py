"""Backward elimination of experts by the error of the layer's output.

With f_e the output of expert e for a token, w its weights in the whole model and w' those of the
router that chooses among the experts S that are left, the error of a layer is

    error(S) = sum over tokens of || sum_e (w'_e - w_e) f_e ||^2

Experts go one at a time, each time the one whose going adds least; what stands in for it (the next
expert in line, and the weights that grow) is part of what is measured, so two experts that do the
same work are not both taken for superfluous. In coefficients c = w' - w a token's error is
c^T G c with G = F F^T [E, E], so that the experts' outputs are computed once and [T, E, E] numbers
are kept, whatever the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.model.experts import Bank
from mlxfun.model.router_formula import Routing
from mlxfun.techniques.refit.least_squares import number

if TYPE_CHECKING:
    from mlxfun.arrays import Array

GRAM_BYTES = 512 << 20
"""Bound on the [T, E, E] products of one layer."""

CHUNK_BYTES = 128 << 20
"""Bound on the outputs of all experts that are held at a time."""


def most_tokens(experts: int) -> int:
    """How many tokens of a layer with so many experts may be looked at."""
    return max(256, GRAM_BYTES // (4 * experts * experts))


@dataclass(frozen=True)
class Problem:
    """One layer's tokens. logits: float32 [T, E] of the live experts; gram: float32 [T, E, E],
    products of the experts' outputs; wanted: float32 [T, E], the weights that are to be matched.
    """

    routing: Routing
    logits: mx.array
    gram: mx.array
    wanted: mx.array

    def errors(self, chosen: mx.array, weights: mx.array) -> mx.array:
        """Squared error of each token [T] when it uses `chosen` [T, K] with `weights`."""
        # Of E coefficients only those of the chosen and of the wanted experts are not zero. An
        # expert that is both counts among the wanted.
        places, values = self.matched
        used = mx.put_along_axis(mx.zeros_like(self.wanted), chosen, weights, axis=-1)
        new = mx.where(mx.take_along_axis(self.wanted, chosen, axis=-1) != 0, 0.0, weights)
        where = mx.concatenate([chosen.astype(mx.uint32), places], axis=-1)
        kept = mx.where(values != 0, mx.take_along_axis(used, places, axis=-1) - values, 0.0)
        off = mx.concatenate([new, kept], axis=-1)
        experts = self.gram.shape[-1]
        pairs = (where[:, :, None] * experts + where[:, None, :]).reshape(len(where), -1)
        flat = self.gram.reshape(len(where), -1)
        products = mx.take_along_axis(flat, pairs, axis=1).reshape(*where.shape, -1)
        return (off[:, None] @ products * off[:, None]).sum(axis=(-2, -1))

    @cached_property
    def matched(self) -> tuple[mx.array, mx.array]:
        """The experts that are wanted, uint32 [T, W], and their weights, of the widest token."""
        there = self.wanted != 0
        width = max(1, int(np.array(there).sum(axis=-1).max()))
        places = mx.argsort(-there.astype(mx.float32), axis=-1)[:, :width].astype(mx.uint32)
        return places, mx.take_along_axis(self.wanted, places, axis=-1)

    @property
    def energy(self) -> float:
        """Squared norm of the whole model's output, over all tokens."""
        want = self.wanted[:, None]
        return number((want @ self.gram * want).sum())

    def error(self, alive: Array) -> float:
        """The layer's error when the experts `alive`, bool [E], are left, relative to the output."""
        chosen, weights = self.routing(self.logits, mx.array(alive))
        return number(self.errors(chosen, weights).sum()) / max(self.energy, 1e-30)


def gram_of(
    bank: Bank, x: mx.array, gates: mx.array | None = None, ctx: Context = SILENT
) -> mx.array:
    """Products [T, E, E] of the outputs of every expert for inputs x [T, D].

    gates: [T, E], for experts whose input is weighted.
    """
    experts = len(bank.rows)
    width = max(int(x.shape[-1]), int(bank.projection(bank.outward).weight.shape[1]))
    step = max(1, CHUNK_BYTES // (4 * experts * width))
    parts = []
    for start in range(0, x.shape[0], step):
        inputs = x[None, start : start + step]
        if gates is not None:
            factor = gates[start : start + step].T[:, :, None]
            inputs = inputs * factor.astype(inputs.dtype)
        outputs = bank.outputs(bank.activations(inputs)).astype(mx.float32).swapaxes(0, 1)
        parts.append(outputs @ outputs.swapaxes(1, 2))
        mx.eval(parts[-1])
        ctx.check()
    return mx.concatenate(parts)


def eliminate(
    problem: Problem,
    count: int,
    allowed: Callable[[list[int]], Array],
    ctx: Context = SILENT,
) -> tuple[list[int], list[float]]:
    """`count` experts in the order in which they go, and the relative error after each.

    allowed: given those gone already, who may go next, bool [E].
    """
    alive = np.ones(problem.logits.shape[-1], dtype=np.bool_)
    gone: list[int] = []
    errors: list[float] = []
    energy = max(problem.energy, 1e-30)
    for _ in range(count):
        ctx.check()
        added, base = _added(problem, alive)
        added[~allowed(gone)] = np.inf
        expert = int(added.argmin())
        gone.append(expert)
        alive[expert] = False
        errors.append((base + float(added[expert])) / energy)
    return gone, errors


def _added(problem: Problem, alive: Array) -> tuple[Array, float]:
    """What the error grows by when each expert goes, float64 [E], and the error now."""
    living = mx.array(alive)
    chosen, weights = problem.routing(problem.logits, living)
    base = problem.errors(chosen, weights)
    parts = []
    for place in range(chosen.shape[-1]):
        # Only tokens that use an expert notice when it goes: each place of the choice in turn.
        without = mx.put_along_axis(
            mx.broadcast_to(living, problem.logits.shape),
            chosen[:, place : place + 1],
            mx.array(False),
            axis=-1,
        )
        parts.append(problem.errors(*problem.routing(problem.logits, without)) - base)
    mx.eval(chosen, base, parts)
    added = np.zeros(len(alive))
    picks = np.array(chosen)
    for place, part in enumerate(parts):
        np.add.at(added, picks[:, place], np.array(part, dtype=np.float64))
    return added, number(base.sum())
