"""Manual selection of experts, quick probes of the result, and the profile of one expert."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.editing.plans import PrunePlan
from mlxfun.editing.reports import PlanReport, StepReport
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation import measure
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.options import ProbeOptions
from mlxfun.evaluation.reports import ProbeReport
from mlxfun.model.anatomy.masks import mask_of, sets_mask
from mlxfun.scans import expert_profile
from mlxfun.scans.reports import DossierReport
from mlxfun.session import views
from mlxfun.session.workspace import Workshop
from mlxfun.techniques.prune import manual_mask
from mlxfun.techniques.prune import plan as planning
from mlxfun.techniques.prune.delta import prune_delta
from mlxfun.techniques.prune.options import SelectOptions

if TYPE_CHECKING:
    from mlxfun.arrays import Array


class HandWork:
    """Selecting and looking closely, on one session's model."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop

    def select(self, options: SelectOptions) -> PlanReport | StepReport:
        """Change by hand which experts go, beginning with those of the staged plan, and stage that.

        A selection that is not even is staged all the same, so that it can be measured and talked
        to; apply refuses it. Without any expert left in it the staged plan is dropped. Raises
        UsageError or PlanError for what the model could not run; nothing changes then.
        """
        field = self._field(options)
        start = self._selected()
        gone = manual_mask.picked(field, start, options)
        if not gone.any():
            if self._shop.editor.staged is None:
                raise UsageError("select: no expert is picked; name some with --drop L:E,...")
            return self._shop.editor.discard()
        broken = field.unrunnable(gone)
        if broken:
            raise PlanError(f"{broken}; keep more of them, or `select --even` evens it out")
        return self._stage_by_hand(field, gone, options)

    def probe(self, options: ProbeOptions, ctx: Context = SILENT) -> ProbeReport:
        """A quick measurement of the staged plan on few tokens. Changes nothing, not the preview."""
        staged = self._shop.editor.require_staged("probe")
        data = _first(self._probe_set(options), options.tokens)
        found = measure.measure(
            self._shop.editor, self._shop.evaluator, "staged", [data], tuple, ctx
        )
        assert found.kl_mean is not None
        assert found.top1_agreement is not None
        return ProbeReport(
            measured_state=staged.state,
            dataset=data.name,
            tokens=found.tokens,
            perplexity=found.perplexity["all"],
            baseline=found.baseline["all"],
            kl_mean=found.kl_mean,
            top1_agreement=found.top1_agreement,
            steered=found.steered,
        )

    def dossier(
        self, layer: int, expert: int, options: ProbeOptions, ctx: Context = SILENT
    ) -> DossierReport:
        """One expert at close quarters, on the committed weights without steering.

        Raises UsageError for an expert that does not exist, StateError for a pruned one.
        """
        with self._shop.editor.live("current"), self._shop.editor.unsteered():
            why = views.why(
                self._shop.anatomy, self._shop.editor, self._shop.observations.stats, layer, expert
            )
            position = self._shop.anatomy.position_of(layer)
            assert position is not None
            tap = self._shop.editor.resident.taps.layers[position]
            if expert not in tap.live:
                raise StateError(f"L{layer}:E{expert} is pruned: undo brings it back")
            data = _first(self._probe_set(options), options.tokens)
            seen = expert_profile.watch(
                self._shop.model, self._shop.editor.resident.taps, position, data.sequences, ctx
            )
            modules = self._shop.modules()
            partner, alike, note = expert_profile.partner(tap, modules, seen, expert)
        here = seen.experts == expert
        rows = expert_profile.top_tokens(seen.tokens, here.any(axis=1))
        return DossierReport(
            why=why,
            dataset=data.name,
            tokens=len(seen.tokens),
            served=int(here.any(axis=1).sum()),
            mean_weight=float(seen.weights[here].mean()) if here.any() else 0.0,
            top_tokens=expert_profile.named(rows, self._shop.tokenizer),
            partner=partner,
            alike=alike,
            note=note,
        )

    def _field(self, options: SelectOptions) -> manual_mask.Field:
        stats, layers = self._shop.observations.stats, self._shop.anatomy.layers
        editor = self._shop.editor
        ranking = options.even or options.below is not None or options.n_prune is not None
        stale = stats is not None and stats.state != editor.state
        if stats is not None and ranking and stale and not options.allow_stale:
            raise StateError(
                f"the statistics were made on state {stats.state}, the model is at "
                f"{editor.state}; collect again, or use them knowingly with --allow-stale"
            )
        if stats is not None and ranking:
            planning.require_tokens(stats)
        return manual_mask.Field(
            layers=self._shop.anatomy.indices,
            alive=mask_of(self._shop.anatomy, editor.committed),
            # --clear starts from nothing: the staged plan's own protection goes with it.
            protected=self._shop.spared(
                editor.history.protected if options.clear else editor.protected
            ),
            scores=stats.score(options.metric) if stats is not None else None,
            top_k=tuple(layer.top_k for layer in layers),
            groups=tuple(layer.n_group for layer in layers),
            open_groups=tuple(layer.topk_group for layer in layers),
        )

    def _selected(self) -> Array:
        """The experts that go with the staged plan, bool [L, E]."""
        staged = self._shop.editor.staged
        if staged is None:
            return self._shop.spared(None)
        if staged.plan.technique != "prune":
            raise StateError(
                f"{staged.plan.technique} is staged ({staged.command}), which is not made of "
                "single experts: apply or discard it before you select"
            )
        return sets_mask(self._shop.anatomy, staged.report.pruned)

    def _stage_by_hand(
        self, field: manual_mask.Field, gone: Array, options: SelectOptions
    ) -> PlanReport:
        shop, editor, staged = self._shop, self._shop.editor, self._shop.editor.staged
        keep = dict(zip(field.layers, _kept(field.alive & ~gone), strict=True))
        named = options.metric if field.scores is not None else None
        plan = PrunePlan(keep, named, "hand", _warnings(field, gone))
        basis: tuple[tuple[str, ...], str] = ((), "")
        if shop.observations.stats is not None and named:
            basis = shop.observations.evidence, shop.observations.stats.state
        if staged is not None and not options.clear and staged.evidence:
            basis = staged.evidence, staged.made_on
        # Made in steps, but history and recipe tell the selection as it stands.
        command = manual_mask.change_line(field.layers, np.zeros_like(gone), gone)
        with editor.live("current"):
            delta = prune_delta(plan, editor.resident)
            before = shop.export().total_bytes()
        losses, named_losses = manual_mask.lost(field, gone), None
        if losses is not None:
            named_losses = {ly: float(x) for ly, x in zip(field.layers, losses, strict=True)}
        proposal = planning.Proposal(plan, delta, command, before, named_losses)
        planning.stage(editor, shop.anatomy, proposal, shop.export)
        made = editor.require_staged("select")
        (made.evidence, made.made_on), made.protected = basis, field.protected
        made.report = replace(made.report, experts_after=min(map(len, keep.values())))
        return made.report

    def _probe_set(self, options: ProbeOptions) -> EvalSet:
        if options.data is not None:
            shop = self._shop
            return measure.read_set(options.data, shop.tokenizer, shop.anatomy.vocabulary)
        held = self._shop.observations.held_out
        if held is None:
            raise UsageError(
                "no held-out samples to probe on: collect from a set with more samples than "
                "--max-samples, or name a set with --dataset"
            )
        return held


def _kept(mask: Array) -> list[tuple[int, ...]]:
    return [tuple(int(e) for e in np.flatnonzero(row)) for row in mask]


def _warnings(field: manual_mask.Field, gone: Array) -> tuple[str, ...]:
    out = []
    uneven = manual_mask.unevenness(field.layers, manual_mask.counts(gone))
    if uneven:
        out.append(f"uneven, so it cannot be applied yet: {uneven}; `select --even` evens it out")
    protected = manual_mask.sets_of(field.layers, gone & field.protected)
    if protected:
        out.append(f"protected experts go: {manual_mask.spell(protected)}")
    return tuple(out)


def _first(data: EvalSet, tokens: int) -> EvalSet:
    """The beginning of a set, about `tokens` long, from as many sequences as it takes."""
    taken, left = [], tokens
    for sequence in data.sequences:
        if left < 2:
            break
        taken.append(sequence[:left])
        left -= len(taken[-1])
    return EvalSet(f"beginning of {data.name}", tuple(taken))
