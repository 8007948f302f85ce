"""The cheapest choice for each module within a budget of bytes: a multiple-choice knapsack.

    min sum_m cost[m, b_m]   with   sum_m bytes[m, b_m] <= budget

as an integer program (HiGHS, by scipy.optimize.milp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlxfun.errors import PlanError
from mlxfun.text import readable_bytes

SECONDS = 30.0
GAP = 1e-4
"""When the solver is content: the relative distance to the bound that it has proven."""


@dataclass(frozen=True, slots=True)
class Solution:
    """chosen: bits of each module, in their order. gap: how far the cost is above what is proven to be
    the least, relative to it."""

    chosen: tuple[int, ...]
    gap: float


def solve(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, int]], budget: int
) -> Solution:
    """costs, sizes: {bits: cost in nats, bytes} of each module. Raises PlanError for a budget below
    the least size."""
    least = sum(min(each.values()) for each in sizes)
    if least > budget:
        raise PlanError(
            f"what can be packed still takes {readable_bytes(least)} with the fewest bits, and "
            f"{readable_bytes(max(budget, 0))} are left for it; ask for more bytes, allow fewer bits "
            "with --choices, or prune or narrow first"
        )
    options = [(m, b) for m, each in enumerate(sizes) for b in each]
    cost = np.array([costs[m][b] for m, b in options])
    size = np.array([sizes[m][b] for m, b in options], dtype=np.float64)
    one = np.zeros((len(sizes), len(options)))
    one[[m for m, _ in options], range(len(options))] = 1
    scale = max(float(cost.max(initial=0.0)), 1e-30)
    # Imported where it is used: SciPy would take a part of every start.
    from scipy.optimize import Bounds, LinearConstraint, milp

    found = milp(
        cost / scale,
        integrality=np.ones(len(options), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(size[None] / max(budget, 1), -np.inf, 1.0),
        ],
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if found.x is None:
        raise PlanError(f"the solver found no choice of bits within its time ({found.message})")
    chosen = {m: b for (m, b), x in zip(options, found.x, strict=True) if x > 0.5}
    taken = tuple(chosen[m] for m in range(len(sizes)))
    within = _within(taken, costs, sizes, budget)
    return Solution(within, float(found.mip_gap or 0.0))


def _within(
    chosen: tuple[int, ...],
    costs: Sequence[Mapping[int, float]],
    sizes: Sequence[Mapping[int, int]],
    budget: int,
) -> tuple[int, ...]:
    """The choice, with the cheapest steps down where the solver's tolerance left it above the budget."""
    taken = list(chosen)
    while sum(each[b] for each, b in zip(sizes, taken, strict=True)) > budget:
        steps = [
            ((costs[m][b] - costs[m][taken[m]]) / (sizes[m][taken[m]] - sizes[m][b]), m, b)
            for m in range(len(taken))
            for b in sizes[m]
            if sizes[m][b] < sizes[m][taken[m]]
        ]
        _, m, b = min(steps)
        taken[m] = b
    return tuple(taken)
