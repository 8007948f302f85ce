"""Layer-by-layer pruning pass: each layer is decided on the outputs of the edited layers before it.

One pass over the layers with carried hidden states (mlxfun.hooks.layerwise). Per layer: observe it, choose
who stays, cut its router, refit the experts that stay (mlxfun.techniques.refit.least_squares), and
run the result for the layers behind it (mlxfun.techniques.refit.follow). The model is as before at
the end, after a cancel and after a failure: what remains is a plan and a delta, as of any other edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.calibration.collect import layer_sums
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.errors import PlanError
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta, LayerDelta, Resident
from mlxfun.model.experts import Bank
from mlxfun.model.identity import Rows
from mlxfun.model.parameters import dequantised, requantised, row_digests
from mlxfun.model.router_formula import Routing, Seen
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.refit.follow import Follow
from mlxfun.techniques.refit.least_squares import RIDGES, Routed, changed, energy, output, refit
from mlxfun.techniques.refit.output_error import Problem, eliminate, gram_of, most_tokens
from mlxfun.techniques.workspace import ResidentModel

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.hooks.routing import Record
from mlxfun.model.live_experts import LiveExperts


@dataclass(frozen=True, slots=True)
class Observed:
    """All real tokens of one layer. logits: float32 [T, E] of the live experts, rows beyond them
    left out; stats: [1, E] sums in checkpoint numbers; precision: relative, of the dtype that the
    logits were made in.
    """

    routed: Routed
    logits: mx.array
    stats: RoutingStats
    precision: float

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.routed.inputs.shape[0])


def fit_notes(fits: Sequence[Fit]) -> tuple[str, ...]:
    """What the refits did, in a sentence."""
    if not fits:
        return ()
    used = [fit for fit in fits if fit.kept]
    before, after = (float(np.mean([getattr(f, n) for f in fits])) for n in ("before", "after"))
    return (
        f"refitted {len(used)} of {len(fits)} layers: the error of their outputs was "
        f"{before:.1%} of their energy, and is {after:.1%}",
    )


Choose = Callable[["LiveExperts", Observed], tuple[int, ...]]
"""(a layer, what it saw) -> the experts that stay, ascending, checkpoint numbers."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a layer puts out what it did. before, after: squared error of the experts' summed
    output relative to its square, without and with the refit; kept: whether the refit is used.
    """

    layer: int
    before: float
    after: float
    ridge: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """keep: {decoder layer: experts}. fits: of the layers that were refitted."""

    keep: dict[int, tuple[int, ...]]
    delta: Delta
    fits: tuple[Fit, ...]


class Recalibration:
    """One pass over a resident model; the model is as before when `run` returns.

    follow: later layers see what was done to earlier ones (always with refit_experts). whole: what
    chooses runs the whole model. ridges: what a refit may choose among, ascending.
    """

    def __init__(
        self,
        workspace: ResidentModel,
        *,
        follow: bool,
        refit_experts: bool,
        whole: bool = False,
        ridges: Sequence[float] = RIDGES,
    ) -> None:
        self._workspace, self._resident = workspace, workspace.resident
        self._modules = workspace.resident.tree.modules
        self._follow = follow or refit_experts
        self._refit, self._whole = refit_experts, whole
        self._ridges = ridges
        if refit_experts:
            self.require_stacks()

    def require_stacks(self) -> None:
        """Raise PlanError for experts that are not computed as one stack, before any work."""
        for moe in self._resident.layers:
            self.bank(moe)

    def bank(self, moe: LiveExperts) -> Bank:
        """The live experts of a layer. Raises PlanError where they are no stack."""
        try:
            return Bank.of(moe, self._modules)
        except PlanError:
            raise PlanError(
                f"the experts of layer {moe.layer.index} ({moe.layer.family}) are no stack of known "
                "projections, so their outputs cannot be foreseen or refitted; prune by a metric "
                "of the statistics, e.g. --metric reap_sum"
            ) from None

    def run(self, batches: Sequence[Batch], choose: Choose, ctx: Context = SILENT) -> Outcome:
        """Decide and, where asked to, refit every layer."""
        carrier = Carrier(self._workspace.model, self._workspace.taps, batches, ctx)
        keep: dict[int, tuple[int, ...]] = {}
        deltas: list[LayerDelta] = []
        fits: list[Fit] = []
        layers = self._resident.layers
        follow = Follow(self._workspace, carrier, self._whole) if self._follow else None
        with follow or nullcontext():
            for number, moe in enumerate(layers):
                with carrier.at(moe.layer, ctx):
                    observed = observe(carrier, moe, ctx)
                    kept = choose(moe, observed)
                    keep[moe.layer.index] = kept
                    if kept != moe.live:
                        delta, fit = self._cut(carrier, moe, observed, kept, ctx)
                        fits += [fit] if fit is not None else []
                        held = (
                            self._workspace.hold(delta)
                            if follow is None
                            else follow.passed(moe, delta, ctx)
                        )
                        deltas.append(held)
                        del delta
                    del observed
                ctx.progress("pruning", number + 1, len(layers), "layers")
        return Outcome(keep, Delta(tuple(deltas)), tuple(fits))

    def _cut(
        self,
        carrier: Carrier,
        moe: LiveExperts,
        observed: Observed,
        kept: tuple[int, ...],
        ctx: Context,
    ) -> tuple[LayerDelta, Fit | None]:
        """The layer with fewer experts, the model unchanged."""
        sliced = prune_layer(self._resident, moe.layer, moe.live, kept)
        if not self._refit:
            return sliced, None
        wanted = output(self.bank(moe), observed.routed, ctx)
        with self._resident.trial(Delta((sliced,))):
            # Seen again, so that the choice and the weights are those of the model's own router.
            routed = observe(carrier, moe, ctx).routed
            return self.refitted(moe, sliced, routed, wanted, ctx)

    def refitted(
        self,
        moe: LiveExperts,
        sliced: LayerDelta,
        routed: Routed,
        wanted: mx.array,
        ctx: Context = SILENT,
    ) -> tuple[LayerDelta, Fit]:
        """`sliced` with refitted output projections, if they are better as they are stored.

        `sliced` must be swapped in. routed: what its experts are given. wanted: float32 [T, D].
        """
        bank = self.bank(moe)
        whole = max(energy(wanted), 1e-30)
        rest = wanted - output(bank, routed)
        before = energy(rest) / whole
        found, ridge = refit(bank, routed, rest, self._ridges, ctx)
        changes = {bank.rows[e]: change for e, change in found.items()}
        module, path = bank.projection(bank.outward), f"{bank.path}.{bank.outward}"
        arrays = requantised(
            module,
            changed(dequantised(module), changes),
            lambda leaf: self._workspace.stored(f"{path}.{leaf}"),
        )
        new = {f"{path}.{leaf}": _rows_of(module[leaf], array, changes)
               for leaf, array in arrays.items()}  # fmt: skip
        after = self._error_with(bank, routed, wanted, new) / whole
        kept = after < before
        fit = Fit(moe.layer.index, before, after, ridge, kept)
        return (self._with_rows(sliced, new) if kept else sliced), fit

    def _error_with(
        self, bank: Bank, routed: Routed, wanted: mx.array, new: dict[str, mx.array]
    ) -> float:
        """Squared error with the arrays `new` in place."""
        with self._resident.trial(Delta((LayerDelta(None, arrays=new),))):
            return energy(wanted - output(bank, routed))

    def _with_rows(self, sliced: LayerDelta, new: dict[str, mx.array]) -> LayerDelta:
        """A delta that also replaces whole stacks; rows that stayed as they were keep their id."""
        rows = dict(sliced.rows)
        for path, array in new.items():
            stack = sliced.resident
            live = [stack.index(expert) for expert in sliced.live]
            index = mx.array(np.array(live, dtype=np.uint32))
            held = self._resident.tree.get(path)[index]
            same = np.array(mx.all((array[index] == held).reshape(len(live), -1), axis=1))
            known = sliced.rows.get(path)
            ids: list[Any] = list(known.ids) if known is not None else list(range(len(live)))
            moved = [i for i in range(len(live)) if not same[i]]
            if moved:
                chosen = index[mx.array(np.array(moved, dtype=np.uint32))]
                digests = row_digests(array[chosen], self._workspace.stored(path))
                for i, digest in zip(moved, digests, strict=True):
                    ids[i] = digest
                rows[path] = Rows.of(ids)
        arrays = {**sliced.arrays, **new}
        return replace(sliced, arrays=arrays, rows=rows, made=sliced.made | frozenset(new))


def _rows_of(old: mx.array, new: mx.array, changes: dict[int, mx.array]) -> mx.array:
    """`old` with the rows that changed: packing the others again could move their last bit."""
    index = mx.array(sorted(changes), dtype=mx.uint32)
    whole = mx.array(old)
    whole[index] = new[index]
    mx.eval(whole)
    return whole


# -- observing --------------------------------------------------------------------------------


def observe(carrier: Carrier, moe: LiveExperts, ctx: Context = SILENT) -> Observed:
    """Run a layer on all batches and keep what every real token was given."""
    layer = moe.layer
    stats = RoutingStats.empty((layer.index,), layer.num_experts)
    parts: list[tuple[mx.array, mx.array, Array, Array]] = []
    precision = 0.0
    for batch, records in carrier.observe(layer.position, ctx):
        real = np.flatnonzero(batch.mask.reshape(-1)).astype(np.uint32)
        mask = mx.array(batch.mask.reshape(-1).astype(np.float32))
        sums = layer_sums(layer, records, mask)
        x, logits, chosen, weights = _tokens(moe, records[-1], mx.array(real))
        mx.eval(sums, x, logits, chosen, weights)
        parts.append((x, logits, np.array(chosen), np.array(weights)))
        update = np.array(sums).reshape(1, len(SUMS), -1)
        stats = stats.plus(update, len(batch.rows), len(real))
        precision = _precision(records[-1])
    routed = Routed(
        mx.concatenate([x for x, _, _, _ in parts]),
        _positions(moe, np.concatenate([c for _, _, c, _ in parts]), [w for *_, w in parts]),
        np.concatenate([w for *_, w in parts]),
    )
    return Observed(routed, mx.concatenate([z for _, z, _, _ in parts]), stats, precision)


def _precision(record: Record) -> float:
    """The relative precision of the dtype of the logits."""
    return 0.0 if record.logits is None else float(mx.finfo(record.logits.dtype).eps)


def _tokens(
    moe: LiveExperts, record: Record, pick: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Inputs [n, D], logits [n, E], chosen [n, K] and weights [n, K] of the picked tokens."""
    if record.inputs is None or record.logits is None or record.weights is None:
        raise RuntimeError(f"the forward did not show what decoder layer {moe.layer.index} routes")
    width = record.indices.shape[-1]
    weights = record.weights.reshape(-1, width)[pick].astype(mx.float32)
    if moe.layer.facts.weights_inside:
        weights = mx.ones_like(weights)  # the input holds the weight already
    logits = record.logits.reshape(-1, record.logits.shape[-1])[pick][:, : len(moe.live)]
    return (
        record.inputs.reshape(-1, record.inputs.shape[-1])[pick],
        logits.astype(mx.float32),
        record.indices.reshape(-1, width)[pick],
        weights,
    )


def _positions(moe: LiveExperts, chosen: Array, weights: list[Array]) -> Array:
    """Checkpoint numbers as positions among the live experts, -1 where nothing was routed."""
    where = np.full(moe.layer.num_experts, -1, dtype=np.int64)
    where[list(moe.live)] = np.arange(len(moe.live))
    found = where[chosen.astype(np.int64)]
    if moe.layer.router_rows > moe.layer.num_experts:
        # longcat's zero experts appear as index 0 with weight 0.
        found = np.where(np.concatenate(weights) == 0, -1, found)
    return np.asarray(found)


# -- choosing by output error -----------------------------------------------------------------


def by_output_error(
    recalibration: Recalibration,
    resident: Resident,
    moe: LiveExperts,
    observed: Observed,
    ctx: Context = SILENT,
) -> Problem:
    """The layer as a problem of output error. Raises PlanError for a router without a formula."""
    experts = len(moe.live)
    count = min(observed.tokens, most_tokens(experts))
    pick = np.unique(np.linspace(0, observed.tokens - 1, count).round().astype(np.uint32))
    index = mx.array(pick)
    logits, routed = observed.logits[index], observed.routed
    chosen, weights = routed.chosen[pick], routed.weights[pick]
    inputs, gates, applied = routed.inputs[index], None, weights
    if moe.layer.facts.weights_inside:
        gates = mx.sigmoid(logits)
        applied = np.take_along_axis(np.array(gates), chosen, axis=1)
        inputs = inputs / mx.array(np.maximum(applied, 1e-6)).astype(inputs.dtype)
    routing = Routing.of(moe, resident, Seen(logits, chosen, applied, observed.precision))
    if gates is not None:
        routing = replace(routing, normalised=True)  # the input holds the weight: all are one
    wanted = mx.put_along_axis(mx.zeros(logits.shape), mx.array(chosen), mx.array(weights), axis=-1)
    gram = gram_of(recalibration.bank(moe), inputs, gates, ctx)
    return Problem(routing, logits, gram, wanted)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Who may go from a layer, bool [E] in checkpoint numbers, and in how many groups it routes.

    first: those that go before all others.
    """

    may_go: Array
    first: Array
    n_group: int = 1


def keep_by_output_error(
    problem: Problem,
    live: tuple[int, ...],
    count: int,
    candidates: Candidates,
    ctx: Context = SILENT,
) -> tuple[int, ...]:
    """The experts that stay when `count` go, the same number from each group."""
    here = np.array(live)
    groups = candidates.n_group
    group = np.arange(len(here)) // (len(here) // groups)
    may_go, first = candidates.may_go[here], candidates.first[here]

    def allowed(gone: list[int]) -> Array:
        taken = np.bincount(group[gone], minlength=groups) if gone else np.zeros(groups)
        open_now = may_go & (taken < count // groups)[group]
        open_now[gone] = False
        wished = open_now & first
        return np.asarray(wished if wished.any() else open_now)

    gone, _ = eliminate(problem, count, allowed, ctx)
    return tuple(int(e) for i, e in enumerate(here) if i not in set(gone))
