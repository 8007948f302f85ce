"""Global pruning budget: n experts per layer on average, distributed over layers by measured KL.

What it costs is measured, not guessed from scores: each layer alone is pruned to a few counts c,
and the mean KL on held-out samples is taken as its price. The counts with the least total price
and the sum n x L are found by dynamic programming over the layers.

Stock loading holds one number of experts for all layers. Where every router has a selection bias
the plan can be padded: all layers are sliced to the largest number that any of them keeps, and in
the others the experts that should have gone stay in the file with a bias that no score overcomes
(live biases are first shifted above what losing groups are filled with: where a live score lies
below that, a router chooses among the losers, and would find the silent ones there). Such a file
is as large as its fullest layer says; nothing smaller is claimed. Routers without a selection bias have no place
for that, and are refused before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, lcm
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.calibration.options import METRICS
from mlxfun.context import SILENT, Context
from mlxfun.errors import PlanError, UsageError
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.delta import Delta, LayerDelta, Resident
from mlxfun.model.parameters import Stored
from mlxfun.model.router_edit import RouterEdit
from mlxfun.model.slicing import prune_layer
from mlxfun.steering import rules
from mlxfun.techniques.prune import selection
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.options import PruneOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlxfun.arrays import Array
    from mlxfun.model.live_experts import LiveExperts


def require_options(options: PruneOptions) -> None:
    """Raise UsageError for options that a global budget cannot be combined with."""
    surplus = {
        f"--metric {options.metric}": options.metric not in METRICS,
        "--model-wide": options.model_wide,
        f"--strategy {options.strategy}": options.strategy != "bottom",
        "--sequential": options.sequential,
        "--refit-experts": options.refit_experts,
        "--expert-list": options.expert_list is not None,
    }
    named = [name for name, given in surplus.items() if given]
    if named:
        raise UsageError(
            f"--budget global measures prunes by a metric of the statistics, lowest first; leave "
            f"out {' and '.join(named)}"
        )


def require_paddable(anatomy: MoEMap) -> None:
    """Raise PlanError where stock loading could not hold layers of different numbers of experts."""
    for layer in anatomy.layers:
        if layer.bias_name is None or layer.router_rows > layer.num_experts:
            raise PlanError(
                "--budget global leaves layers with different numbers of experts; stock loading "
                "holds one number for all, and the routers of "
                f"{layer.family} have no selection bias that could keep surplus experts from ever "
                "being chosen; use --budget equal"
            )


@dataclass(frozen=True, slots=True)
class Budgeted:
    """live: {decoder layer: experts in the file}, the same number everywhere; dead: those of them
    that are never chosen. counts: how many go from each layer.
    """

    live: dict[int, tuple[int, ...]]
    dead: dict[int, tuple[int, ...]]
    counts: tuple[int, ...]


def grid(n_prune: int, step: int) -> list[int]:
    """The counts that are priced: multiples of `step` from none to twice `n_prune`.

    >>> grid(4, 1)
    [0, 2, 4, 6, 8]
    """
    aligned = {round(n_prune * share / step) * step for share in (0, 0.5, 1, 1.5, 2)}
    return sorted(aligned | {n_prune})


def cheapest(prices: Sequence[dict[int, float]], total: int) -> tuple[int, ...]:
    """One count per layer with the least sum of prices among those that sum to `total`.

    prices: for each layer {count: price}. Raises PlanError if no choice sums to it.

    >>> cheapest([{0: 0.0, 1: 5.0, 2: 9.0}, {0: 0.0, 1: 1.0, 2: 2.5}], 2)
    (0, 2)
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in prices:
        further: dict[int, tuple[float, tuple[int, ...]]] = {}
        for gone, (price, counts) in best.items():
            for count, more in layer.items():
                rival = further.get(gone + count, (inf, ()))
                if price + more < rival[0]:
                    further[gone + count] = (price + more, (*counts, count))
        best = further
    if total not in best:
        raise PlanError(f"no counts of the layers sum to {total}; use --budget equal")
    return best[total][1]


class Budget:
    """Prices counts on a resident model, which is as before when `plan` returns."""

    def __init__(
        self,
        resident: Resident,
        scores: Array,
        constraints: Constraints,
        options: PruneOptions,
        measure: Callable[[], float],
    ) -> None:
        """scores: float64 [L, E]. measure: the price of the live model."""
        self._resident, self._scores = resident, scores
        self._constraints, self._options, self._measure = constraints, options, measure

    def plan(self, ctx: Context = SILENT) -> Budgeted:
        """The counts, and who goes. Raises PlanError for a count that equal layers cannot lose."""
        n_prune = self._options.n_prune or 0
        selection.select(self._scores, self._constraints, self._options)
        taps = self._resident.layers
        counts = grid(n_prune, lcm(*self._constraints.n_group))
        prices = []
        for moe in taps:
            prices.append(self._prices(moe, counts, ctx))
            ctx.progress("pricing layers", len(prices), len(taps), "layers")
        chosen = cheapest(prices, n_prune * len(taps))
        least = min(chosen)
        live, dead = {}, {}
        for moe, count in zip(taps, chosen, strict=True):
            index = moe.layer.index
            live[index] = self._kept(moe, least) or moe.live
            staying = self._kept(moe, count) or moe.live
            dead[index] = tuple(e for e in live[index] if e not in set(staying))
        return Budgeted(live, dead, chosen)

    def _prices(self, moe: LiveExperts, counts: Sequence[int], ctx: Context) -> dict[int, float]:
        """The price of each count that the layer can lose."""
        prices = {0: 0.0}
        for count in counts:
            ctx.check()
            keep = self._kept(moe, count)
            if count and keep is not None:
                delta = prune_layer(self._resident, moe.layer, moe.live, keep)
                with self._resident.trial(Delta((delta,))):
                    prices[count] = self._measure()
        return prices

    def _kept(self, moe: LiveExperts, count: int) -> tuple[int, ...] | None:
        """Who stays when `count` go from a layer, None where so many cannot."""
        if not count:
            return moe.live
        one = slice(moe.layer.position, moe.layer.position + 1)
        whole = self._constraints
        part = replace(
            whole,
            **{
                name: getattr(whole, name)[one]
                for name in ("layers", "alive", "protect", "target", "top_k", "n_group")
            },
            topk_group=whole.topk_group[one],
            traffic=None if whole.traffic is None else whole.traffic[one],
        )
        try:
            options = replace(self._options, n_prune=count)
            return selection.select(self._scores[one], part, options).keep[0]
        except PlanError:
            return None


def padded_delta(resident: Resident, stored: Stored, budgeted: Budgeted) -> Delta:
    """The delta of a budget: sliced to the fullest layer, surplus experts never chosen."""
    layers = []
    for moe in resident.layers:
        live, dead = budgeted.live[moe.layer.index], budgeted.dead[moe.layer.index]
        sliced = None
        if live != moe.live:
            sliced = prune_layer(resident, moe.layer, moe.live, live)
        if dead:
            layers.append(_silenced(RouterEdit(resident, stored), moe, sliced, dead))
        elif sliced is not None:
            layers.append(sliced)
    return Delta(tuple(layers))


def _silenced(
    edit: RouterEdit, moe: LiveExperts, sliced: LayerDelta | None, dead: tuple[int, ...]
) -> LayerDelta:
    """`sliced`, if anything is, with a bias under which the experts `dead` are never chosen."""
    with edit.resident.trial(Delta((sliced,) if sliced is not None else ())):
        path = f"{moe.layer.bias_owner}.{moe.layer.bias_name}"
        own = edit.resident.tree.get(path)
        silent = mx.array(np.isin(np.array(moe.live), dead))
        raised = rules.raised_above_fill(moe.layer, own)
        bias = edit.replaced(moe, path, mx.where(silent, -rules.FORCED, raised))
    if sliced is None:
        return bias
    return replace(
        sliced,
        arrays={**sliced.arrays, **bias.arrays},
        rows={**sliced.rows, **bias.rows},
        made=sliced.made | bias.made,
    )
