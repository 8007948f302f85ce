"""How many experts a layer can lose: top-k, groups, protection, one count for all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.errors import PlanError
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.options import PruneOptions


@dataclass(frozen=True, slots=True)
class _Limits:
    """How many experts may go from each layer. step: n must be a multiple of it (groups).

    Each bound has its reason; the smallest is the one that users are told.
    """

    step: int
    alive: int
    bounds: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, constraints: Constraints, protect: Mask, options: PruneOptions) -> _Limits:
        counts = constraints.alive.sum(axis=1)
        if len(set(counts.tolist())) > 1:
            raise PlanError(f"the layers have different numbers of experts left: {counts.tolist()}")
        alive = int(counts[0])
        bounds = []
        least = options.min_experts_per_layer
        if least is not None:
            bounds.append((alive - least, f"--min-experts-per-layer {least} must be left"))
        for i, layer in enumerate(constraints.layers):
            top_k = constraints.top_k[i]
            bounds.append((alive - top_k, f"layer {layer} routes every token to {top_k} experts"))
            bounds += _group_bounds(constraints, i)
        free = constraints.alive & ~protect
        bounds += (
            _model_bounds(constraints, free) if options.model_wide else _free(constraints, free)
        )
        return cls(math.lcm(*constraints.n_group), alive, tuple(bounds))

    def check(self, count: int, constraints: Constraints) -> None:
        bound, reason = min(self.bounds, key=lambda pair: pair[0])
        most = max(bound, 0) // self.step * self.step
        remedy = f"at most --n-prune {most} is possible" if most else "nothing can be pruned"
        if count > self.alive:
            raise PlanError(
                f"--n-prune {count} is more than the {self.alive} experts of a layer; {remedy}"
            )
        if count > bound:
            raise PlanError(
                f"--n-prune {count} would leave {self.alive - count} of {self.alive} experts, but "
                f"{reason}; {remedy}"
            )
        if count % self.step:
            below = count // self.step * self.step
            near = [n for n in (below, below + self.step) if 0 < n <= most]
            choices = " or ".join(f"--n-prune {n}" for n in near)
            remedy = f"the nearest possible: {choices}" if near else "nothing can be pruned"
            raise PlanError(
                f"--n-prune {count} cannot be taken evenly from the router's {self.step} groups "
                f"of experts; {remedy}"
            )


def _groups(constraints: Constraints, layer: int) -> list[range]:
    """Index ranges of a layer's groups. Pruning keeps them aligned to the checkpoint's numbers."""
    size = constraints.shape[1] // constraints.n_group[layer]
    return [range(g * size, (g + 1) * size) for g in range(constraints.n_group[layer])]


def _group_bounds(constraints: Constraints, i: int) -> list[tuple[int, str]]:
    n_group, layer = constraints.n_group[i], constraints.layers[i]
    if n_group == 1:
        return []
    counts = [int(constraints.alive[i, g.start : g.stop].sum()) for g in _groups(constraints, i)]
    if len(set(counts)) > 1:
        raise PlanError(f"layer {layer}: its groups have different numbers of experts: {counts}")
    active = constraints.topk_group[i]
    # A group is scored by the sum of its two best experts, so it needs two.
    needed = max(2, -(-constraints.top_k[i] // active))
    reason = (
        f"layer {layer} routes to {active} of {n_group} groups, each of which must keep "
        f"{needed} experts for top-{constraints.top_k[i]}"
    )
    return [(n_group * (counts[0] - needed), reason)]


def _free(constraints: Constraints, free: Mask) -> list[tuple[int, str]]:
    """Bounds from protection: every group gives n / n_group, so its poorest group decides."""
    bounds = []
    for i, layer in enumerate(constraints.layers):
        groups = _groups(constraints, i)
        poorest = min(int(free[i, g.start : g.stop].sum()) for g in groups)
        where = f"layer {layer} has" if len(groups) == 1 else f"a group of layer {layer} has"
        bounds.append((poorest * len(groups), f"{where} only {poorest} unprotected experts"))
    return bounds


def _model_bounds(constraints: Constraints, free: Mask) -> list[tuple[int, str]]:
    everywhere = np.asarray(free.all(axis=0))
    groups = _model_groups(constraints)
    poorest = min(int(everywhere[g.start : g.stop].sum()) for g in groups)
    where = "only" if len(groups) == 1 else "in one of the router's groups only"
    return [(poorest * len(groups), f"{where} {poorest} indices are unprotected in every layer")]


def _model_groups(constraints: Constraints) -> list[range]:
    return _groups(constraints, int(np.argmax(constraints.n_group)))
