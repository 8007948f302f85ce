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

from mlxfun.calibration.collect import batch_shape
from mlxfun.calibration.options import METRICS
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import batches
from mlxfun.editing.plans import PrunePlan
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.evaluator import EvalSet, Evaluator
from mlxfun.model.delta import Delta
from mlxfun.session.workspace import Workshop
from mlxfun.techniques.prune import allocation, selection
from mlxfun.techniques.prune import plan as planning
from mlxfun.techniques.prune.delta import prune_layer, validate
from mlxfun.techniques.prune.options import BUDGETS, PRUNE_METRICS, PruneOptions
from mlxfun.techniques.prune.selection import Constraints
from mlxfun.techniques.refit.layerwise import (
    Candidates,
    Observed,
    Recalibration,
    by_output_error,
    fit_notes,
    keep_by_output_error,
)
from mlxfun.techniques.router_bias.delta import Edit

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.hooks.routing import LayerTap
    from mlxfun.techniques.prune.plan import PruneRequest


def wanted(options: PruneOptions) -> bool:
    """Whether these options need forwards. Raises UsageError for values that do not exist."""
    for flag, value, valid in (
        ("--metric", options.metric, PRUNE_METRICS),
        ("--budget", options.budget, BUDGETS),
    ):
        if value not in valid:
            raise UsageError(f"{flag} {value}: choose one of {', '.join(valid)}")
    measures = options.metric not in METRICS or options.budget != "equal"
    return measures or options.sequential or options.refit_experts


def stage_prune(
    request: PruneRequest, shop: Workshop, command: str, ctx: Context = SILENT
) -> tuple[PlanReport, Array]:
    """Plan, measure where the options ask for it, and stage.

    Returns the report, and who was protected, bool [L, E]. A cancel or failure leaves the model,
    and a plan that was staged before, as they were.
    """
    command = command or planning.command_line(request.options)
    if not wanted(request.options):
        plan, protected = planning.plan_prune(request)
        return planning.stage_prune(request, plan, command, shop.export), protected
    editor = request.editor
    if request.options.budget == "global":
        allocation.require_options(request.options)
        allocation.require_paddable(request.anatomy)
    _require_text(shop, request.options)
    if request.options.budget == "global":
        return _stage_budget(request, shop, command, ctx)
    with editor.live("current"), editor.unsteered():
        decision = _Decision.of(request, shop)
        decision.require_possible()
        pass_ = Recalibration(
            shop.model,
            editor.resident,
            shop.stored,
            follow=request.options.sequential or request.options.metric == "auto",
            refit_experts=request.options.refit_experts,
        )
        require_memory(request, shop)
        given = batches(list(shop.calibration), *batch_shape(None, None))
        outcome = pass_.run(given, decision.chooser(pass_, ctx), ctx)
        before = shop.export().total_bytes()
        plan = PrunePlan(
            outcome.keep,
            request.options.metric if request.options.expert_list is None else None,
            decision.strategy,
            (*decision.notes, *decision.warnings(outcome.keep), *fit_notes(outcome.fits)),
        )
        validate(plan, editor.resident)
    if not outcome.delta.layers:
        raise PlanError("the plan removes nothing: every expert it names is kept")
    lost = planning.mass_lost(request, plan)
    proposal = planning.Proposal(plan, outcome.delta, command, before, lost)
    report = planning.stage(editor, request.anatomy, proposal, shop.export)
    return report, decision.constraints.protect


def _require_text(shop: Workshop, options: PruneOptions) -> None:
    if not shop.calibration:
        raise StateError(
            "this prune measures on the text of the last collect, and there is none (a file of "
            "statistics does not hold it); run `collect --dataset ...` first"
        )
    judging = options.metric == "auto" or options.budget == "global"
    if judging and shop.held_out is None:
        name = "--metric auto" if options.metric == "auto" else "--budget global"
        raise StateError(
            f"{name} judges on samples that collect held out, and it held none out; collect from "
            "a set with more samples than --max-samples"
        )


def _stage_budget(
    request: PruneRequest, shop: Workshop, command: str, ctx: Context
) -> tuple[PlanReport, Array]:
    """Counts per layer by measured KL, in the padded form that stock loading holds."""
    editor, options = request.editor, request.options
    scores = planning.scores_of(request)
    constraints, notes = planning.constraints_for(request)
    with editor.live("current"), editor.unsteered():
        priced = allocation.Budget(editor.resident, scores, constraints, options, HeldOut.of(shop))
        found = priced.plan(ctx)
        delta = allocation.padded_delta(Edit(editor.resident, shop.modules(), shop.stored), found)
        before = shop.export().total_bytes()
        plan = PrunePlan(
            found.live,
            options.metric,
            "global budget",
            (*notes, _padding_note(found)),
            {layer: experts for layer, experts in found.dead.items() if experts},
        )
        validate(plan, editor.resident)
    if not delta.layers:
        raise PlanError("the plan removes nothing: every expert is kept")
    lost = planning.mass_lost(request, plan)
    proposal = planning.Proposal(plan, delta, command, before, lost)
    return planning.stage(editor, request.anatomy, proposal, shop.export), constraints.protect


def _padding_note(found: allocation.Budgeted) -> str:
    held = len(next(iter(found.live.values())))
    surplus = sum(map(len, found.dead.values()))
    if not surplus:
        return f"every layer was found to do best with {held} experts: nothing is padded"
    return (
        f"layers lose {', '.join(map(str, found.counts))} experts; stock loading holds one number "
        f"for all, so the file keeps {held} a layer, {surplus} of which are never chosen and save "
        "no bytes"
    )


# -- deciding ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Decision:
    """Who goes from each layer, under the constraints of any prune.

    fixed: {decoder layer: experts that stay} where no layer has to be looked at.
    """

    request: PruneRequest
    shop: Workshop
    constraints: Constraints
    notes: tuple[str, ...]
    fixed: dict[int, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, request: PruneRequest, shop: Workshop) -> _Decision:
        constraints, notes = planning.constraints_for(request)
        return cls(request, shop, constraints, notes)

    @property
    def options(self) -> PruneOptions:
        return self.request.options

    @property
    def strategy(self) -> str:
        parts = [self.options.strategy if self.options.expert_list is None else "list"]
        parts += ["model-wide"] if self.options.model_wide else []
        parts += ["sequential"] if self.options.sequential else []
        parts += ["refitted"] if self.options.refit_experts else []
        return ", ".join(parts)

    def require_possible(self) -> None:
        """Raise now what would be raised in some layer after minutes."""
        options = self.options
        if options.expert_list is None and options.n_prune is None:
            raise UsageError("say how many experts go with --n-prune, or give --expert-list FILE")
        if options.expert_list is not None and options.sequential:
            raise UsageError("--expert-list has chosen who goes; leave out --sequential")
        looks = options.metric not in METRICS and options.expert_list is None
        if looks and (options.model_wide or options.strategy != "bottom"):
            raise UsageError(
                f"--metric {options.metric} decides layer by layer who goes; leave out "
                "--model-wide and --strategy"
            )
        if options.sequential and options.model_wide:
            raise UsageError(
                "--model-wide needs every layer's scores before the first is pruned; leave out "
                "--sequential"
            )
        if options.expert_list is not None or not (looks or options.sequential):
            plan, _ = planning.plan_prune(self.request)
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
    ) -> Callable[[LayerTap, Observed], tuple[int, ...]]:
        """What chooses, layer by layer."""
        if self.fixed is not None:
            fixed = self.fixed
            return lambda tap, _: fixed[tap.layer.index]
        if self.options.metric == "output_error":
            return lambda tap, observed: self.by_error(pass_, tap, observed)
        if self.options.metric == "auto":
            return _Auto(self, pass_, HeldOut.of(self.shop), ctx)
        return lambda tap, observed: self.by_metric(tap, observed, self.options.metric)

    def by_metric(self, tap: LayerTap, observed: Observed, metric: str) -> tuple[int, ...]:
        """The experts that stay by a metric of the layer's own statistics."""
        position = tap.layer.position
        one = self.constraints.of_layer(position, observed.stats.sums["freq"])
        scores = observed.stats.score(metric)
        return selection.select(scores, one, replace(self.options, metric=metric)).keep[0]

    def by_error(self, pass_: Recalibration, tap: LayerTap, observed: Observed) -> tuple[int, ...]:
        i = tap.layer.position
        protect = selection.protected(self.constraints, self._plain())[i]
        candidates = Candidates(
            self.constraints.alive[i] & ~protect,
            self.constraints.target[i] & ~protect,
            tap.layer.n_group,
        )
        problem = by_output_error(pass_, self.request.editor.resident, tap, observed)
        return keep_by_output_error(problem, tap.live, self.options.n_prune or 0, candidates)


# -- measuring on what was held out -----------------------------------------------------------


class HeldOut:
    """How far the model, as it is live, has moved from where it was, on held-out samples."""

    def __init__(self, evaluator: Evaluator, key: str, data: EvalSet) -> None:
        """The live weights are the ones to compare with; `key` names their state."""
        self._evaluator, self._data = evaluator, data
        self._reference = evaluator.reference(key, data)

    @classmethod
    def of(cls, shop: Workshop) -> HeldOut:
        """Against the committed state, which must be live."""
        assert shop.held_out is not None
        return cls(shop.evaluator, f"{shop.editor.state}|", shop.held_out)

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

    def __call__(self, tap: LayerTap, observed: Observed) -> tuple[int, ...]:
        decision = self._decision
        choices: dict[tuple[int, ...], str] = {}
        for metric in METRICS:
            choices.setdefault(decision.by_metric(tap, observed, metric), metric)
        with suppress(PlanError):  # a router without a formula: the metrics remain
            choices.setdefault(decision.by_error(self._pass, tap, observed), "output_error")
        if len(choices) == 1:
            return next(iter(choices))
        return min(choices, key=lambda keep: self._measured(tap, keep))

    def _measured(self, tap: LayerTap, keep: tuple[int, ...]) -> float:
        self._ctx.check()
        resident = self._decision.request.editor.resident
        inverse = resident.swap(Delta((prune_layer(resident, tap.layer, tap.live, keep),)))
        try:
            return self._held_out()
        finally:
            resident.swap(inverse)


# -- memory -----------------------------------------------------------------------------------


def estimate_bytes(request: PruneRequest, shop: Workshop) -> int:
    """Bytes that the pass needs on top of the resident model: an upper estimate."""
    resident = request.editor.resident
    tokens = sum(len(sequence) for sequence in shop.calibration)
    widest = stacks = width = 0
    for tap in resident.taps.layers:
        arrays = [resident.tree.get(p.path) for p in tap.layer.expert_parameters()]
        sizes = (a.size * (8 if a.dtype == mx.uint32 else 1) for a in arrays)
        widest = max(widest, *sizes, 0)
        for array in arrays:
            # Packed weights hold at least four values in 32 bits, at most eight.
            unpacked = array.shape[-1] * (8 if array.dtype == mx.uint32 else 1)
            width = max(width, unpacked, array.shape[-2] if array.ndim > 1 else 0)
        if request.options.refit_experts:
            # One projection of each layer, both versions, while the plan is staged.
            stacks += max((a.nbytes for a in arrays), default=0)
    return stacks + 3 * 4 * widest + tokens * width * 4 * (8 + request.anatomy.top_k) + (768 << 20)


def require_memory(request: PruneRequest, shop: Workshop) -> None:
    """Raise BudgetError with the figures if the pass would not fit."""
    shop.require_room(
        estimate_bytes(request, shop),
        "this prune",
        "collect fewer samples, or prune by a metric of the statistics alone",
    )
