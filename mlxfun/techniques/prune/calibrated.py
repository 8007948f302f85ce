"""Prunes decided, or repaired, with calibration forwards.

    --sequential            each layer's statistics are taken on what the pruned layers put out
    --metric output_error   backward elimination by the error of the layer's output
    --metric auto           per layer, the ranking whose prune moves held-out text least
    --budget global         counts per layer by measured KL (needs a router that can hold them)
    --refit-experts         least squares for the experts that stay

All but the budget run in one pass over the layers (mlxfun.techniques.refit.layerwise), on the text of the last
collect. Nothing here looks at an evaluation set: `auto` and `global` judge on the samples that
collect held out.

Tried on a trained model of 32 experts and left out: refitting the router's rows to the output of
the whole layer (gradient descent on the same error) lowered the error of most layers by 2 to 7 %,
and held-out perplexity by less than half a percent, at twice the time of the whole pass. Weighing
tokens by the loss's gradients (sampled Fisher) moved the perplexity of a prune of 8 by 1 %, and
needs a backward pass that packed and Metal-only models do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.calibration.options import METRICS, Metric
from mlxfun.context import SILENT, Context
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.evaluator import EvalSet, Evaluator
from mlxfun.hooks.replay import tell_reading
from mlxfun.model.delta import Delta
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.device.memory import Need
from mlxfun.model.experts import Bank
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.prune import allocation, choose, selection
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.delta import validate
from mlxfun.techniques.prune.options import BUDGETS, PRUNE_METRICS, PruneOptions
from mlxfun.techniques.prune.plan import PrunePlan
from mlxfun.techniques.prune.super_experts import Spared
from mlxfun.techniques.refit.layerwise import (
    Candidates,
    Observed,
    Recalibration,
    by_output_error,
    fit_notes,
    keep_by_output_error,
)
from mlxfun.techniques.refit.sizes import Sizes
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.model.live_experts import LiveExperts


def needs_forward(options: PruneOptions) -> bool:
    """Whether these options need forwards. Raises UsageError for values that do not exist."""
    for flag, value, valid in (
        ("--metric", options.metric, PRUNE_METRICS),
        ("--budget", options.budget, BUDGETS),
    ):
        if value not in valid:
            raise UsageError(f"{flag} {value}: choose one of {', '.join(valid)}")
    measures = options.metric not in METRICS or options.budget != "equal"
    return measures or options.sequential or options.refit_experts


def plan_with_forwards(
    workspace: Workspace,
    options: PruneOptions,
    ctx: Context = SILENT,
    spared: Spared | None = None,
) -> Decided:
    """Plan and measure in one pass over the layers, or price counts for a global budget."""
    if options.budget == "global":
        allocation.require_options(options)
        allocation.require_paddable(workspace.anatomy)
    _require_text(workspace, options)
    if options.metric == "auto" or options.budget == "global":
        tries = len(METRICS) * len(workspace.anatomy.layers)
        tell_reading(workspace.model, ctx, tries)
    if options.budget == "global":
        return _with_budget(workspace, options, spared, ctx)
    with workspace.editor.live("base"), workspace.editor.unsteered():
        decision = _Decision.of(workspace, options, spared)
        decision.require_possible()
        pass_ = Recalibration(
            workspace,
            follow=options.sequential or options.metric == "auto",
            refit_experts=options.refit_experts,
            whole=options.metric == "auto",
        )
        require_memory(workspace, options)
        outcome = pass_.run(_batches(workspace), decision.chooser(pass_, ctx), ctx)
        plan = PrunePlan(
            outcome.keep,
            options.metric if options.expert_list is None else None,
            decision.strategy,
            (*decision.notes, *decision.warnings(outcome.keep), *fit_notes(outcome.fits)),
        )
        validate(plan, workspace.resident)
    return Decided(plan, outcome.delta, decision.constraints.protect)


@dataclass(frozen=True, slots=True)
class Decided:
    """A plan with its delta. protected: bool [L, E], the experts that it was told to spare."""

    plan: PrunePlan
    delta: Delta
    protected: Array


def _require_text(workspace: Workspace, options: PruneOptions) -> None:
    if not workspace.calibration:
        raise StateError(
            "this prune measures on the text of the last collect, and there is none (a file of "
            "statistics does not hold it); run `collect --dataset ...` first"
        )
    judging = options.metric == "auto" or options.budget == "global"
    if judging and workspace.held_out is None:
        name = "--metric auto" if options.metric == "auto" else "--budget global"
        raise StateError(
            f"{name} judges on samples that collect held out, and it held none out; collect from "
            "a set with more samples than --max-samples"
        )


def _with_budget(
    workspace: Workspace, options: PruneOptions, spared: Spared | None, ctx: Context
) -> Decided:
    """Counts per layer by measured KL, in the padded form that stock loading holds."""
    resident = workspace.resident
    scores = choose.scores_of(workspace, options)
    constraints, notes = choose.constraints_for(workspace, options, spared)
    with workspace.editor.live("base"), workspace.editor.unsteered():
        priced = allocation.Budget(resident, scores, constraints, options, HeldOut.of(workspace))
        found = priced.plan(ctx)
        delta = allocation.padded_delta(resident, workspace.stored, found)
        plan = PrunePlan(
            found.live,
            options.metric,
            "global budget",
            (*notes, _padding_note(found)),
            {layer: experts for layer, experts in found.dead.items() if experts},
        )
        validate(plan, resident)
    return Decided(plan, delta, constraints.protect)


def _padding_note(found: allocation.Budgeted) -> str:
    held = len(next(iter(found.live.values())))
    surplus = sum(map(len, found.dead.values()))
    if not surplus:
        return f"every layer does best with {held} experts: nothing is padded"
    return (
        f"layers lose {', '.join(map(str, found.counts))} experts; stock loading holds one number "
        f"for all, so the file keeps {held} per layer, {surplus} of which are never chosen and save "
        "no bytes"
    )


# -- deciding ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Decision:
    """Which experts stay in each layer, under the constraints of any prune.

    fixed: {decoder layer: experts that stay} where no layer has to be looked at.
    """

    workspace: Workspace
    options: PruneOptions
    constraints: Constraints
    notes: tuple[str, ...]
    spared: Spared | None = None
    fixed: dict[int, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, workspace: Workspace, options: PruneOptions, spared: Spared | None) -> _Decision:
        constraints, notes = choose.constraints_for(workspace, options, spared)
        return cls(workspace, options, constraints, notes, spared)

    @property
    def strategy(self) -> str:
        parts: list[str] = [self.options.strategy if self.options.expert_list is None else "list"]
        parts += ["model-wide"] if self.options.model_wide else []
        parts += ["sequential"] if self.options.sequential else []
        parts += ["refitted"] if self.options.refit_experts else []
        return ", ".join(parts)

    def require_possible(self) -> None:
        """Raise now what would be raised in some layer after minutes."""
        options = self.options
        if options.expert_list is None and options.n_prune is None:
            raise UsageError(
                "say how many experts to prune with --n-prune, or give --expert-list FILE"
            )
        if options.expert_list is not None and options.sequential:
            raise UsageError(
                "--expert-list already says which experts to prune; leave out --sequential"
            )
        looks = options.metric not in METRICS and options.expert_list is None
        if looks and (options.model_wide or options.strategy != "bottom"):
            raise UsageError(
                f"--metric {options.metric} decides layer by layer which experts to prune; leave out "
                "--model-wide and --strategy"
            )
        if options.sequential and options.model_wide:
            raise UsageError(
                "--model-wide needs every layer's scores before the first is pruned; leave out "
                "--sequential"
            )
        if options.expert_list is not None or not (looks or options.sequential):
            plan, _ = choose.choose(self.workspace, self.options, self.spared)
            self.fixed = dict(plan.keep)
            self.notes = plan.warnings
            return
        selection.select(np.zeros(self.constraints.shape), self.constraints, self._plain())

    def _plain(self) -> PruneOptions:
        """The options with a metric that selection knows."""
        known = self.options.metric in METRICS
        return self.options if known else replace(self.options, metric="reap_sum")

    def warnings(self, keep: dict[int, tuple[int, ...]]) -> tuple[str, ...]:
        """What selection warns of, once for the whole plan."""
        if self.fixed is not None:
            return ()
        kept = tuple(keep[layer] for layer in self.constraints.layers)
        return selection.warnings_of(self.constraints, kept, self._plain())

    def chooser(
        self, pass_: Recalibration, ctx: Context
    ) -> Callable[[LiveExperts, Observed], tuple[int, ...]]:
        """What chooses, layer by layer."""
        if self.fixed is not None:
            fixed = self.fixed
            return lambda moe, _: fixed[moe.layer.index]
        metric = self.options.metric
        if metric == "output_error":
            return lambda moe, observed: self.by_error(pass_, moe, observed, ctx)
        if metric == "auto":
            return _Auto(self, pass_, HeldOut.of(self.workspace), ctx)
        return lambda moe, observed: self.by_metric(moe, observed, metric)

    def by_metric(self, moe: LiveExperts, observed: Observed, metric: Metric) -> tuple[int, ...]:
        """The experts that stay by a metric of the layer's own statistics."""
        position = moe.layer.position
        one = self.constraints.of_layer(position, observed.stats.sums["freq"])
        scores = observed.stats.score(metric)
        return selection.select(scores, one, replace(self.options, metric=metric)).keep[0]

    def by_error(
        self, pass_: Recalibration, moe: LiveExperts, observed: Observed, ctx: Context
    ) -> tuple[int, ...]:
        candidates = candidates_of(self.constraints, self._plain(), moe)
        problem = by_output_error(pass_, self.workspace.resident, moe, observed, ctx)
        count = self.options.n_prune or 0
        return keep_by_output_error(problem, moe.live, count, candidates, ctx)


def candidates_of(constraints: Constraints, options: PruneOptions, moe: LiveExperts) -> Candidates:
    """Which experts of a layer backward elimination may take, and which it takes first."""
    i = moe.layer.position
    protect = selection.protected(constraints, options)[i]
    return Candidates(
        constraints.alive[i] & ~protect, constraints.target[i] & ~protect, moe.layer.n_group
    )


# -- measuring on what was held out -----------------------------------------------------------


class HeldOut:
    """How far the model, as it is live, has moved from where it was, on held-out samples."""

    def __init__(self, evaluator: Evaluator, key: tuple[str, str], data: EvalSet) -> None:
        """The live weights are the ones to compare with; `key` names their state."""
        self._evaluator, self._data = evaluator, data
        self._reference = evaluator.reference(key, data)

    @classmethod
    def of(cls, workspace: Workspace) -> HeldOut:
        """Against the committed state, which must be live."""
        assert workspace.held_out is not None
        return cls(workspace.evaluator, workspace.editor.key(), workspace.held_out)

    def __call__(self) -> float:
        """Mean KL in nats; of models whose logits cannot be made again, the mean loss."""
        cached = self._reference.hidden is not None
        references = [self._reference] if cached else []
        likelihood, compared = self._evaluator.compare(
            self._data, references, [_unneeded] * len(references)
        )
        return float(compared[0].kl.mean() if cached else likelihood.nll.mean())


def _unneeded() -> Any:
    raise RuntimeError("a cached reference is not run again")


class _Auto:
    """Per layer, each ranking's prune is tried and the one that moves held-out text least stays."""

    def __init__(
        self, decision: _Decision, pass_: Recalibration, held_out: HeldOut, ctx: Context
    ) -> None:
        self._decision, self._pass = decision, pass_
        self._held_out, self._ctx = held_out, ctx

    def __call__(self, moe: LiveExperts, observed: Observed) -> tuple[int, ...]:
        decision = self._decision
        choices: dict[tuple[int, ...], str] = {}
        for metric in METRICS:
            choices.setdefault(decision.by_metric(moe, observed, metric), metric)
        with suppress(PlanError):  # a router without a formula: the metrics remain
            kept = decision.by_error(self._pass, moe, observed, self._ctx)
            choices.setdefault(kept, "output_error")
        if len(choices) == 1:
            return next(iter(choices))
        return min(choices, key=lambda keep: self._measured(moe, keep))

    def _measured(self, moe: LiveExperts, keep: tuple[int, ...]) -> float:
        self._ctx.check()
        resident = self._decision.workspace.resident
        with resident.trial(Delta((prune_layer(resident, moe.layer, moe.live, keep),))):
            return self._held_out()


# -- memory -----------------------------------------------------------------------------------


def estimate(workspace: Workspace, options: PruneOptions) -> Need:
    """What the pass needs on top of the resident model, see mlxfun.techniques.refit.sizes."""
    resident, given = workspace.resident, _batches(workspace)
    size = Sizes.of(workspace, given)
    kept = size.experts - (options.n_prune or 0)
    held = size.states + size.inputs
    looking = [size.forward]
    if options.metric in ("output_error", "auto"):
        looking.append(size.elimination())
    if not options.refit_experts:
        return Need((), held + max(looking), both=False)
    # One projection of each layer is new.
    stacks = []
    for moe in resident.layers:
        bank = Bank.of(moe, resident.tree.modules)
        module = bank.projection(bank.outward)
        stacks.append(sum(a.nbytes for a in module.values() if isinstance(a, mx.array)))
    # Its output as it was, and what is left over of that; the inputs are seen a second time.
    fitting = size.inputs + 2 * size.outputs
    looking += [fitting + size.refit(kept), fitting + size.output]
    making = held + fitting + size.refitted(kept)
    return Need(tuple(stacks), held + max(looking), making, both=options.metric == "auto")


def _batches(workspace: Workspace) -> list[Batch]:
    return batch_size(workspace.model, workspace.anatomy).split(workspace.calibration)


def require_memory(workspace: Workspace, options: PruneOptions) -> None:
    """Raise BudgetError with the figures if the pass would not fit."""
    workspace.require_room(
        estimate(workspace, options),
        "this prune",
        "collect fewer samples, or prune by a metric of the statistics alone",
    )
