"""Merged expert weights (REAM, B. Knyazev; router-weighted expert activation merging).

Layer by layer, on the inputs that the already merged layers produce:

1. saliency of every expert from the tokens routed to it; the most salient ones are centroids;
2. pseudo-pruning (mlxfun.model.expert_similarity): centroids claim what is like them;
3. the neurons of each member are matched with its centroid's (mlxfun.techniques.merge.alignment);
4. every projection of a group becomes the mean of its members', weighted by saliency
   (mlxfun.techniques.merge.weights).

A mean of weights is a mean of functions only for experts whose neurons correspond. Where they do
not (experts trained from scratch rather than grown from one another), the mean cancels: on such a
model merged experts put out a tenth of what their centroids did, and pruning to the same centroids
was better (tests/bench/merge_quality.py prints the table). Preview, and compare with a prune. Two
options look at what the layer puts out: `refit_experts` fits the output projections that are left to
the output of the unmerged layer (mlxfun.techniques.refit.least_squares), which makes up for most of
what the mean has lost; `auto` tries per layer, after the refit where there is one, and takes what
moves the model least on text that calibration kept back (without any: what leaves the least error in
the layer's output):

- the centroids that the saliency names, and those that backward elimination by the output's error
  leaves (mlxfun.techniques.refit.output_error), where the router has a formula;
- with either, the members that are worth their place, each with the share that serves best
  (mlxfun.techniques.merge.merge_or_drop), and all members dropped, which is a prune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.data.sampling import spread, spread_of
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.expert_similarity import (
    Groups,
    mean_outputs,
    pseudo_prune,
    similarity,
)
from mlxfun.model.experts import Bank
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.merge import merge_or_drop
from mlxfun.techniques.merge.alignment import (
    MATCHES,
    costs,
    match_pairs,
    unit_activations,
    weight_features,
)
from mlxfun.techniques.merge.observe import Observed, observe
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.merge.plan import MergePlan
from mlxfun.techniques.merge.weights import (
    Compared,
    MergedWeights,
    Recipe,
    combine,
    recipe_of,
    router_groups,
    taken,
)
from mlxfun.techniques.refit import layerwise
from mlxfun.techniques.refit.follow import Follow
from mlxfun.techniques.refit.layerwise import Recalibration
from mlxfun.techniques.refit.least_squares import Routed, energy, output
from mlxfun.techniques.workspace import ResidentModel

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.model.live_experts import LiveExperts

Choose = Callable[[int, RoutingStats], tuple[int, ...]]
"""(position of a layer, its statistics [1, E]) -> its centroids, ascending, checkpoint numbers."""

ByError = Callable[
    [Recalibration, "LiveExperts", layerwise.Observed, Context], Sequence[int] | None
]
"""Centroids by the error of the layer's output, None where that cannot be said."""


def _layer(stats: RoutingStats, position: int) -> RoutingStats:
    """The statistics [1, E] of one layer of [L, E]."""
    sums = {name: sums[position : position + 1] for name, sums in stats.sums.items()}
    return replace(stats, sums=sums, layer_indices=stats.layer_indices[position : position + 1])


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """groups: {centroid: members, itself first}; weights: {expert: its share of its group}.

    by_error: whether its centroids are those of the output's error. fit: of the refit, if any.
    """

    groups: dict[int, tuple[int, ...]]
    weights: dict[int, float]
    delta: LayerDelta
    by_error: bool = False
    fit: layerwise.Fit | None = None


@dataclass(frozen=True, slots=True)
class _Watch:
    """A layer that is judged by what it puts out. seen: what it was given, unmerged, for `auto`;
    wanted: float32 [T, D], what it put out then, over all tokens.
    """

    carrier: Carrier
    moe: LiveExperts
    seen: layerwise.Observed | None
    wanted: mx.array
    ctx: Context

    def routed(self) -> Routed:
        """What its experts are given as the layer stands now."""
        return layerwise.observe(self.carrier, self.moe, self.ctx).routed


class Merger:
    """Merges a resident model layer by layer; the model is as before when `run` returns."""

    def __init__(
        self,
        workspace: ResidentModel,
        options: MergeOptions,
        saliency: RoutingStats | None = None,
        moved: Callable[[], float] | None = None,
    ) -> None:
        """saliency: statistics [L, E] to go by, instead of those of each layer's own tokens. moved:
        how far the live model has moved on text that was kept back, for `auto`.
        """
        self._moved = moved
        self._workspace, self._resident = workspace, workspace.resident
        self._modules = workspace.resident.tree.modules
        self._options = options
        self._saliency = saliency
        self._weights = MergedWeights(workspace)
        judged = options.refit_experts or options.auto
        self._again = (
            Recalibration(workspace, follow=True, refit_experts=options.refit_experts)
            if judged
            else None
        )

    def require_mergeable(self) -> None:
        """Raise PlanError for experts that cannot be merged, before any work."""
        for moe in self._resident.layers:
            Bank.of(moe, self._modules)

    def run(
        self,
        batches: Sequence[Batch],
        choose: Choose,
        ctx: Context = SILENT,
        by_error: ByError | None = None,
    ) -> tuple[MergePlan, Delta]:
        """The plan, and the delta that carries it out.

        by_error: names the other centroids that `auto` tries. Later layers see the merged ones; the
        model is as before at the end, after a cancel and after a failure.
        """
        carrier = Carrier(self._workspace.model, self._workspace.taps, batches, ctx)
        picks = spread(batches, self._options.max_similarity_tokens)
        merged: dict[int, MergedLayer] = {}
        layers = self._resident.layers
        with Follow(self._workspace, carrier, self._moved is not None) as follow:
            for position, moe in enumerate(layers):
                with carrier.at(moe.layer, ctx):
                    observed = observe(carrier, moe, picks, ctx)
                    if self._saliency is not None:
                        observed = replace(observed, stats=_layer(self._saliency, position))
                    watch = self._watch(carrier, moe, ctx)
                    sets = [(choose(position, observed.stats), False)]
                    if self._options.auto and by_error is not None:
                        sets += self._other(watch, by_error, sets[0][0], ctx)
                    layer = self._best(watch, moe, observed, sets, ctx)
                    held = follow.passed(moe, layer.delta, ctx)
                    merged[moe.layer.index] = replace(layer, delta=held)
                    del layer, watch, observed
                ctx.progress("merging", position + 1, len(layers), "layers")
        return self._plan(merged), Delta(tuple(layer.delta for layer in merged.values()))

    def _plan(self, merged: Mapping[int, MergedLayer]) -> MergePlan:
        return MergePlan(
            groups={index: layer.groups for index, layer in merged.items()},
            weights={index: layer.weights for index, layer in merged.items()},
            metric=self._options.metric,
            strategy=f"{self._options.similarity_mode}, {self._options.alignment}"
            + (", auto" if self._options.auto else "")
            + (", refitted" if self._options.refit_experts else ""),
            warnings=self._notes(merged),
        )

    def _notes(self, merged: Mapping[int, MergedLayer]) -> tuple[str, ...]:
        """How many experts were merged, where that was decided for each; what a refit did."""
        fits = layerwise.fit_notes([m.fit for m in merged.values() if m.fit is not None])
        if not self._options.auto:
            return fits
        taken = sum(len(g) - 1 for layer in merged.values() for g in layer.groups.values())
        others = sum(layer.by_error for layer in merged.values())
        auto = (
            f"{taken} experts are merged, the others dropped: that serves the layers better"
            if taken
            else "no expert is merged: dropping serves every layer better, so this is a prune"
        )
        if others:
            auto += (
                f"; in {others} of {len(merged)} layers the centroids are those of the smallest "
                f"output error and not of {self._options.metric}"
            )
        return (auto, *fits)

    # -- judging ------------------------------------------------------------------------------

    def _watch(self, carrier: Carrier, moe: LiveExperts, ctx: Context) -> _Watch | None:
        """The unmerged layer's output, if an option looks at it."""
        if self._again is None:
            return None
        seen = layerwise.observe(carrier, moe, ctx)
        wanted = output(Bank.of(moe, self._modules), seen.routed)
        return _Watch(carrier, moe, seen if self._options.auto else None, wanted, ctx)

    def _other(
        self, watch: _Watch | None, by_error: ByError, first: tuple[int, ...], ctx: Context
    ) -> list[tuple[tuple[int, ...], bool]]:
        """The centroids of the output's error, where they are others than `first`."""
        assert watch is not None
        assert watch.seen is not None
        assert self._again is not None
        found = by_error(self._again, watch.moe, watch.seen, ctx)
        return [] if found is None or tuple(found) == first else [(tuple(found), True)]

    def _best(
        self,
        watch: _Watch | None,
        moe: LiveExperts,
        observed: Observed,
        sets: Sequence[tuple[tuple[int, ...], bool]],
        ctx: Context,
    ) -> MergedLayer:
        """The layer, unchanged in the model, by the best of the sets of centroids (checkpoint
        numbers, ascending; whether by error).
        """
        if not self._options.auto:
            return self._plain(watch, moe, observed, sets[0][0], ctx)
        compared = self._compare(moe, observed)
        best: tuple[float, MergedLayer] | None = None
        for centroids, other in sets:
            for recipe in self._recipes(watch, moe, compared, centroids):
                layer = replace(self._merged(moe, compared.bank, recipe), by_error=other)
                if watch is None or layer.delta.live == moe.live:
                    return layer
                error, layer = self._judged(watch, layer, ctx)
                if best is None or error < best[0]:
                    best = error, layer
        assert best is not None
        return best[1]

    def _plain(
        self,
        watch: _Watch | None,
        moe: LiveExperts,
        observed: Observed,
        centroids: tuple[int, ...],
        ctx: Context,
    ) -> MergedLayer:
        """The layer merged as REAM does it."""
        compared = self._compare(moe, observed)
        (recipe,) = self._recipes(None, moe, compared, centroids)
        layer = self._merged(moe, compared.bank, recipe)
        del compared  # the neurons of all experts, ahead of a refit
        if watch is None or layer.delta.live == moe.live:
            return layer
        return self._judged(watch, layer, ctx)[1]

    def _judged(self, watch: _Watch, layer: MergedLayer, ctx: Context) -> tuple[float, MergedLayer]:
        """How bad the layer is (see `auto` in the module's text), and the layer, refitted if asked."""
        error, layer = self._with_error(watch, layer, ctx)
        if self._moved is None:
            return error, layer
        with self._resident.trial(Delta((layer.delta,))):
            return self._moved(), layer

    def _with_error(
        self, watch: _Watch, layer: MergedLayer, ctx: Context
    ) -> tuple[float, MergedLayer]:
        """The squared error of the layer's output, relative, and the layer, refitted if asked."""
        assert self._again is not None
        with self._resident.trial(Delta((layer.delta,))):
            routed = watch.routed()
            if self._options.refit_experts:
                delta, fit = self._again.refitted(watch.moe, layer.delta, routed, watch.wanted, ctx)
                error = fit.after if fit.kept else fit.before
                return error, replace(layer, delta=delta, fit=fit)
            rest = watch.wanted - output(Bank.of(watch.moe, self._modules), routed, ctx)
            return energy(rest) / max(energy(watch.wanted), 1e-30), layer

    # -- groups -------------------------------------------------------------------------------

    def _compare(self, moe: LiveExperts, observed: Observed) -> Compared:
        options = self._options
        bank = Bank.of(moe, self._modules)
        saliency = observed.stats.score(options.metric)[0][list(moe.live)]
        gated = options.similarity_mode == "gated"
        inside = moe.layer.facts.weights_inside
        x = observed.inputs[None]
        if gated and inside:
            x = x * observed.gates.T[:, :, None].astype(x.dtype)
        neurons = bank.activations(x)
        outputs = mean_outputs(bank, neurons, observed.gates if gated and not inside else None)
        mx.eval(neurons, outputs)
        return Compared(bank, saliency, similarity(np.array(outputs), observed.logits), neurons)

    def _recipes(
        self, watch: _Watch | None, moe: LiveExperts, compared: Compared, centroids: Sequence[int]
    ) -> Iterator[Recipe]:
        """How the layer may be merged into the centroids: as REAM does; with `auto` with the
        members that are worth their place, and with nobody.
        """
        saliency, options = compared.saliency, self._options
        groups = pseudo_prune(
            compared.alike,
            saliency,
            [moe.live.index(e) for e in centroids],
            options.max_group_size,
            router_groups(moe.layer, len(moe.live)),
        )
        matches = self._match(compared.bank, compared.neurons, groups)
        if options.auto and watch is not None:
            found = self._worthwhile(watch, saliency, groups, matches)
            recipe = recipe_of(saliency, found.groups, matches, found.fractions)
            if recipe.merged:
                yield recipe
            yield recipe_of(saliency, [group[:1] for group in groups], matches)
        else:
            yield recipe_of(saliency, groups, matches)

    def _merged(self, moe: LiveExperts, bank: Bank, recipe: Recipe) -> MergedLayer:
        live = moe.live
        return MergedLayer(
            {live[g[0]]: tuple(live[e] for e in g) for g in recipe.groups},
            {live[e]: share for e, share in recipe.shares.items()},
            self._weights.delta(moe, bank, recipe),
        )

    def _worthwhile(
        self, watch: _Watch, saliency: Array, groups: Groups, matches: Mapping[int, Array]
    ) -> merge_or_drop.Chosen:
        """The members that are better merged than dropped (mlxfun.techniques.merge.merge_or_drop)."""
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
            mixed = partial(self._mixed, whole, saliency, matches=matches)
            return merge_or_drop.choose(alone, routed, rest, ordered, mixed, watch.ctx)

    def _mixed(
        self,
        bank: Bank,
        saliency: Array,
        fractions: Mapping[int, float],
        matches: Mapping[int, Array],
    ) -> dict[str, mx.array]:
        """One merged expert, see mlxfun.techniques.merge.merge_or_drop.Mixed."""
        recipe = recipe_of(saliency, [tuple(fractions)], matches, fractions)
        found = {}
        for name in bank.names:
            found[name] = combine(partial(bank.weights, name), recipe)[0]
            bias = bank.bias(name)
            if bias is not None:
                rows = partial(taken, bias.astype(mx.float32))
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
