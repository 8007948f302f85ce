"""Merged expert weights (REAM, B. Knyazev; router-weighted expert activation merging).

Layer by layer, on the inputs that the already merged layers produce:

1. saliency of every expert from the tokens routed to it; the most salient ones are centroids;
2. pseudo-pruning (mlxfun.model.expert_similarity): centroids claim what is like them;
3. the neurons of each member are matched with its centroid's (mlxfun.techniques.merge.alignment);
4. every projection of a group becomes the mean of its members', weighted by saliency.

A centroid keeps its router row and bias, a group of one keeps its weights bit for bit. All new
rows are rounded to the dtype, or packed in the quantisation, that they are stored in, right here:
what is measured and shown is what will be saved.

A mean of weights is a mean of functions only for experts whose neurons correspond. Where they do
not (experts trained from scratch rather than grown from one another), the mean cancels: on such a
model merged experts put out a tenth of what their centroids did, and pruning to the same centroids
was better (tests/bench/merge_quality.py prints the table). Preview, and compare with a prune. Two
options look at what the layer puts out: `auto` drops the members that are not worth their place
(mlxfun.techniques.merge.merge_or_drop), `refit_experts` fits the output projections that are left to the output of
the unmerged layer (mlxfun.techniques.refit.least_squares), which makes up for most of what the mean has lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.expert_similarity import (
    Groups,
    group_weights,
    mean_outputs,
    pseudo_prune,
    similarity,
)
from mlxfun.model.experts import Bank
from mlxfun.model.identity import Rows
from mlxfun.model.parameters import requantised, rounded, row_digests, take_rows
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.merge import merge_or_drop
from mlxfun.techniques.merge.alignment import (
    MATCHES,
    costs,
    match_pairs,
    unit_activations,
    weight_features,
)
from mlxfun.techniques.merge.observe import Observed, observe, spread, spread_of
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.merge.plan import MergePlan
from mlxfun.techniques.refit import layerwise
from mlxfun.techniques.refit.follow import Follow
from mlxfun.techniques.refit.layerwise import Recalibration
from mlxfun.techniques.refit.least_squares import Routed, output
from mlxfun.techniques.workspace import ResidentModel

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.model.live_experts import LiveExperts

Choose = Callable[[int, RoutingStats], tuple[int, ...]]
"""(position of a layer, its statistics [1, E]) -> its centroids, ascending, checkpoint numbers."""


def _layer(stats: RoutingStats, position: int) -> RoutingStats:
    """The statistics [1, E] of one layer of [L, E]."""
    sums = {name: sums[position : position + 1] for name, sums in stats.sums.items()}
    return replace(stats, sums=sums, layer_indices=stats.layer_indices[position : position + 1])


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """groups: {centroid: members, itself first}; weights: {expert: its share of its group}."""

    groups: dict[int, tuple[int, ...]]
    weights: dict[int, float]
    delta: LayerDelta


@dataclass(frozen=True, slots=True)
class _Watch:
    """A layer that is judged by what it puts out. wanted: float32 [T, D], what it put out unmerged,
    over all tokens.
    """

    carrier: Carrier
    moe: LiveExperts
    wanted: mx.array

    def routed(self, ctx: Context = SILENT) -> Routed:
        """What its experts are given as the layer stands now."""
        return layerwise.observe(self.carrier, self.moe, ctx).routed


class Merger:
    """Merges a resident model layer by layer; the model is as before when `run` returns."""

    def __init__(
        self, workspace: ResidentModel, options: MergeOptions, saliency: RoutingStats | None = None
    ) -> None:
        """saliency: statistics [L, E] to go by, instead of those of each layer's own tokens."""
        self._workspace, self._resident = workspace, workspace.resident
        self._modules = workspace.resident.tree.modules
        self._options = options
        self._saliency = saliency
        self._fits: list[layerwise.Fit] = []

    def require_mergeable(self) -> None:
        """Raise PlanError for experts that cannot be merged, before any work."""
        for moe in self._resident.layers:
            Bank.of(moe, self._modules)

    def run(
        self, batches: Sequence[Batch], choose: Choose, ctx: Context = SILENT
    ) -> tuple[MergePlan, Delta]:
        """The plan, and the delta that carries it out.

        Later layers see the merged ones; the model is as before at the end, after a cancel and
        after a failure.
        """
        carrier = Carrier(self._workspace.model, self._workspace.taps, batches, ctx)
        picks = spread(batches, self._options.max_similarity_tokens)
        merged: dict[int, MergedLayer] = {}
        layers = self._resident.layers
        again = self._recalibration() if self._options.refit_experts else None
        with Follow(self._workspace, carrier) as follow:
            for position, moe in enumerate(layers):
                with carrier.at(moe.layer, ctx):
                    observed = observe(carrier, moe, picks, ctx)
                    if self._saliency is not None:
                        observed = replace(observed, stats=_layer(self._saliency, position))
                    watch = self._watch(carrier, moe, ctx)
                    layer = self._merge_layer(
                        watch, moe, observed, choose(position, observed.stats)
                    )
                    if again is not None and watch is not None and layer.delta.live != moe.live:
                        layer = replace(layer, delta=self._refitted(again, watch, layer.delta, ctx))
                    held = follow.passed(moe, layer.delta, ctx)
                    merged[moe.layer.index] = replace(layer, delta=held)
                    del layer, watch, observed
                ctx.progress("merging", position + 1, len(layers), "layers")
        plan = MergePlan(
            groups={index: layer.groups for index, layer in merged.items()},
            weights={index: layer.weights for index, layer in merged.items()},
            metric=self._options.metric,
            strategy=f"{self._options.similarity_mode}, {self._options.alignment}"
            + (", auto" if self._options.auto else "")
            + (", refitted" if self._options.refit_experts else ""),
            warnings=self._notes(merged),
        )
        return plan, Delta(tuple(layer.delta for layer in merged.values()))

    def _notes(self, merged: Mapping[int, MergedLayer]) -> tuple[str, ...]:
        """How many experts were merged, where that was decided for each; what a refit did."""
        fits = layerwise.fit_notes(self._fits)
        if not self._options.auto:
            return fits
        taken = sum(len(g) - 1 for layer in merged.values() for g in layer.groups.values())
        auto = f"{taken} experts are merged, the others dropped: that serves the layers better"
        return (auto, *fits)

    def _recalibration(self) -> Recalibration:
        return Recalibration(self._workspace, follow=True, refit_experts=True)

    def _watch(self, carrier: Carrier, moe: LiveExperts, ctx: Context) -> _Watch | None:
        """The unmerged layer's output, if an option looks at it."""
        if not (self._options.auto or self._options.refit_experts):
            return None
        routed = layerwise.observe(carrier, moe, ctx).routed
        return _Watch(carrier, moe, output(Bank.of(moe, self._modules), routed))

    def _refitted(
        self, again: Recalibration, watch: _Watch, merged: LayerDelta, ctx: Context
    ) -> LayerDelta:
        """The merged layer with output projections that make up for what merging lost."""
        with self._resident.trial(Delta((merged,))):
            delta, fit = again.refitted(watch.moe, merged, watch.routed(ctx), watch.wanted, ctx)
        self._fits.append(fit)
        return delta

    def _merge_layer(
        self, watch: _Watch | None, moe: LiveExperts, observed: Observed, centroids: tuple[int, ...]
    ) -> MergedLayer:
        """One layer, unchanged in the model. centroids: checkpoint numbers, ascending."""
        options, live = self._options, moe.live
        bank = Bank.of(moe, self._modules)
        saliency = observed.stats.score(options.metric)[0][list(live)]
        gated = options.similarity_mode == "gated"
        inside = moe.layer.facts.weights_inside
        x = observed.inputs[None]
        if gated and inside:
            x = x * observed.gates.T[:, :, None].astype(x.dtype)
        neurons = bank.activations(x)
        outputs = mean_outputs(bank, neurons, observed.gates if gated and not inside else None)
        mx.eval(neurons, outputs)
        alike = similarity(np.array(outputs), observed.logits)
        groups = pseudo_prune(
            alike,
            saliency,
            [live.index(e) for e in centroids],
            options.max_group_size,
            router_groups(moe.layer, len(live)),
        )
        matches = self._match(bank, neurons, groups)
        if options.auto and watch is not None:
            groups = self._worthwhile(watch, saliency, groups, matches)
        shares = {e: w for g in groups for e, w in zip(g, group_weights(saliency, g), strict=True)}
        return MergedLayer(
            {live[g[0]]: tuple(live[e] for e in g) for g in groups},
            {live[e]: float(w) for e, w in shares.items()},
            self._delta(moe, bank, _Recipe(groups, shares, matches)),
        )

    def _worthwhile(
        self,
        watch: _Watch,
        saliency: Array,
        groups: Groups,
        matches: Mapping[int, Array],
    ) -> Groups:
        """The groups without the members that are better dropped (mlxfun.techniques.merge.merge_or_drop)."""
        moe, whole = watch.moe, Bank.of(watch.moe, self._modules)
        kept = tuple(moe.live[group[0]] for group in groups)
        sliced = prune_layer(self._resident, moe.layer, moe.live, kept)
        with self._resident.trial(Delta((sliced,))):
            alone = Bank.of(moe, self._modules)
            routed = watch.routed()
            rest = watch.wanted - output(alone, routed)
            ordered = [
                (group[0], *sorted(group[1:], key=lambda e: (-saliency[e], e))) for group in groups
            ]
            found = merge_or_drop.choose(
                alone, routed, rest, ordered, lambda g: self._mixed(whole, saliency, g, matches)
            )
        return tuple(found.groups)

    def _mixed(
        self, bank: Bank, saliency: Array, group: tuple[int, ...], matches: Mapping[int, Array]
    ) -> dict[str, mx.array]:
        """One merged expert, see mlxfun.techniques.merge.merge_or_drop.Mixed."""
        shares = dict(zip(group, group_weights(saliency, group), strict=True))
        recipe = _Recipe((group,), shares, matches)
        found = {}
        for name in bank.names:
            found[name] = combine(partial(bank.weights, name), recipe)[0]
            bias = bank.bias(name)
            if bias is not None:
                rows = partial(_taken, bias.astype(mx.float32))
                found[f"{name}.bias"] = combine(rows, recipe, permuted=name in bank.inward)[0]
        return found

    def _match(self, bank: Bank, neurons: mx.array, groups: Groups) -> dict[int, Array]:
        """For each member its neurons in the order of its centroid's, int [H]."""
        pairs = [(group[0], member) for group in groups for member in group[1:]]
        match = MATCHES[self._options.alignment]
        if not pairs or self._options.alignment == "none":
            return {member: np.arange(neurons.shape[-1]) for _, member in pairs}
        tokens = spread_of(neurons.shape[1], self._options.max_alignment_tokens)
        units = unit_activations(neurons[:, mx.array(tokens)])
        found = match_pairs(costs(units, weight_features(bank), pairs), match)
        return {member: order for (_, member), order in zip(pairs, found, strict=True)}

    # -- tensors ------------------------------------------------------------------------------

    def _delta(self, moe: LiveExperts, bank: Bank, recipe: _Recipe) -> LayerDelta:
        """The router sliced as by a prune, and stacks of the centroids."""
        live = moe.live
        centroids = tuple(live[group[0]] for group in recipe.groups)
        sliced = prune_layer(self._resident, moe.layer, live, centroids)
        if not recipe.merged:
            return sliced  # nobody goes
        arrays: dict[str, Any] = dict(sliced.arrays)
        rows = dict(sliced.rows)
        made = set(sliced.made)
        for name in bank.names:
            for leaf, new in self._new_rows(bank, name, recipe).items():
                path = f"{bank.path}.{name}.{leaf}"
                arrays[path], rows[path] = self._stack(path, bank, recipe, new)
                made.add(path)
                mx.eval(arrays[path])
        return replace(sliced, resident=centroids, arrays=arrays, rows=rows, made=frozenset(made))

    def _new_rows(self, bank: Bank, name: str, recipe: _Recipe) -> dict[str, mx.array]:
        """The arrays of one projection for the groups of more than one, by leaf name."""
        module = bank.projection(name)

        def stored(leaf: str) -> mx.Dtype:
            return self._workspace.stored(f"{bank.path}.{name}.{leaf}")

        weight = combine(lambda part: bank.weights(name, part), recipe)
        if name not in bank.inward:
            weight = weight.swapaxes(-1, -2)
        new = requantised(module, weight, stored)
        bias = bank.bias(name)
        if bias is not None:
            wide = bias.astype(mx.float32)
            mixed = combine(lambda part: wide[mx.array(part)], recipe, permuted=name in bank.inward)
            new["bias"] = rounded(mixed, stored("bias"), bias.dtype)
        return new

    def _stack(
        self, path: str, bank: Bank, recipe: _Recipe, new: mx.array
    ) -> tuple[mx.array, Rows | None]:
        """All centroids' rows of one array, and their identities."""
        held = self._resident.tree.get(path)
        stack = take_rows(held, [bank.rows[group[0]] for group in recipe.groups])
        where = recipe.merged
        base = stack[mx.array(where)]
        same = np.array(mx.all((new == base).reshape(len(where), -1), axis=1))
        ledger = self._resident.ledger.get(path)
        before = ledger.ids if ledger is not None else tuple(range(len(bank.rows)))
        ids = [before[group[0]] for group in recipe.groups]
        changed = [i for i in range(len(where)) if not same[i]]
        if changed:
            digests = row_digests(new[mx.array(changed)], self._workspace.stored(path))
            for i, digest in zip(changed, digests, strict=True):
                ids[where[i]] = digest
            stack = mx.array(stack)
            stack[mx.array(where)] = new
        whole = ids == list(range(held.shape[0]))
        return stack, None if whole else Rows.of(ids)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one layer is merged; experts are positions among the live ones.

    shares: {expert: share of its group}; matches: {member: neurons in its centroid's order}.
    """

    groups: Groups
    shares: Mapping[int, float]
    matches: Mapping[int, Array]

    @property
    def merged(self) -> list[int]:
        """Positions of the groups of more than one."""
        return [i for i, group in enumerate(self.groups) if len(group) > 1]


def combine(
    rows_of: Callable[[list[int]], mx.array], recipe: _Recipe, permuted: bool = True
) -> mx.array:
    """Weighted means of the groups of more than one, float32 [G, H, ...].

    rows_of: experts -> their rows [n, H, ...], neurons first. permuted: reorder each member's
    neurons as its centroid's. One place of all groups at a time: few rows are on the device.
    """
    big = [recipe.groups[i] for i in recipe.merged]
    total = mx.array(0.0)
    for place in range(max((len(group) for group in big), default=0)):
        part = [(i, group[place]) for i, group in enumerate(big) if len(group) > place]
        experts = [expert for _, expert in part]
        rows = rows_of(experts)
        if place and permuted:
            order = mx.array(np.stack([recipe.matches[e] for e in experts]).astype(np.uint32))
            shape = (*order.shape, *(1,) * (rows.ndim - 2))
            rows = mx.take_along_axis(rows, order.reshape(shape), axis=1)
        shares = mx.array(np.array([recipe.shares[e] for e in experts], np.float32))
        rows = rows * shares.reshape(-1, *(1,) * (rows.ndim - 1))
        total = total.at[mx.array([i for i, _ in part])].add(rows) if place else rows
        mx.eval(total)
    return total


def _taken(array: mx.array, rows: list[int]) -> mx.array:
    return array[mx.array(rows)]


def router_groups(layer: MoELayer, live: int) -> list[int]:
    """The router's group of each live expert: consecutive runs of the same length."""
    size = live // layer.n_group
    return [position // size for position in range(live)]
