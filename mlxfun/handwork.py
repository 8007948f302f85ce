"""What a person at a screen does between commands: pick experts by hand and probe the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxfun import dossier, handpick, measure, planning, sides, views
from mlxfun.anatomy import Anatomy
from mlxfun.context import SILENT, Context
from mlxfun.conversation import Conversation
from mlxfun.datasets import read_lines, tokenize
from mlxfun.editor import Editor
from mlxfun.edits.prune import prune_delta
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluate import EvalSet, Evaluator
from mlxfun.export import ExportView
from mlxfun.generate import Decoder
from mlxfun.hand_options import ProbeOptions, SelectOptions
from mlxfun.hand_reports import ABReport, DossierReport, ProbeReport
from mlxfun.node_reports import CompareReport
from mlxfun.nodes import NodeComparer
from mlxfun.observations import Observations
from mlxfun.options import EvaluateOptions, GenerateOptions
from mlxfun.plans import PrunePlan
from mlxfun.reports import EvaluateReport, HistoryReport, PlanReport, StepReport
from mlxfun.taps import Taps

if TYPE_CHECKING:
    from mlxfun.events import Array


class HandWork:
    """The part of a `Session` that serves the hand; see there for the attributes."""

    command: str
    model: Any
    anatomy: Anatomy
    editor: Editor
    tokenizer: Any
    _observations: Observations
    _evaluator: Evaluator
    _decoder: Decoder
    _conversation: Conversation
    _protected: Array
    taps: Taps
    _own: Callable[[], None]
    _measure: Callable[[str, EvaluateOptions, Context], EvaluateReport]
    _export_view: Callable[[], ExportView]

    def select(self, options: SelectOptions) -> PlanReport | StepReport:
        """Change by hand which experts go, beginning with those of the staged plan, and stage that.

        A selection that is not even is staged all the same, so that it can be measured and talked
        to; apply refuses it. Without any expert left in it the staged plan is dropped. Raises
        UsageError or PlanError for what the model could not run; nothing changes then.
        """
        self._own()
        field = self._field(options)
        start = self._selected()
        gone = handpick.picked(field, start, options)
        if not gone.any():
            if self.editor.staged is None:
                raise UsageError("select: no expert is picked; name some with --drop L:E,...")
            return self.editor.discard()
        broken = field.unrunnable(gone)
        if broken:
            raise PlanError(f"{broken}; keep more of them, or `select --even` evens it out")
        return self._stage_by_hand(field, gone, options)

    def probe(self, options: ProbeOptions, ctx: Context = SILENT) -> ProbeReport:
        """A quick measurement of the staged plan on few tokens. Changes nothing, not the preview."""
        self._own()
        staged = self.editor.require_staged("probe")
        data = _first(self._probe_set(options), options.tokens)
        found = measure.measure(self.editor, self._evaluator, "staged", [data], tuple, ctx)
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
        )

    def take_back(self, count: int) -> str:
        """Forget the last `count` questions with their answers; the text of the first of them."""
        self._own()
        return self._conversation.take_back(count)

    def give_back(self) -> None:
        """Undo the last `take_back`."""
        self._own()
        self._conversation.give_back()

    def ab(self, text: str, options: GenerateOptions, ctx: Context = SILENT) -> ABReport:
        """Ask both sides the same, outside the conversation; `options.side` is not looked at.

        Raises StateError when there are no two sides: see mlxfun.sides.
        """
        self._own()
        return sides.compare(self.model, self._decoder, self.editor, (text, options), ctx)

    def name_node(self, node: int, label: str) -> HistoryReport:
        """Give a state of the history a name, or take it away with ""."""
        self._own()
        self.editor.history.name(node, label)
        return self.editor.history.report()

    def compare_nodes(
        self, first: int, second: int, options: EvaluateOptions, ctx: Context = SILENT
    ) -> CompareReport:
        """Measure two states of the history on the same tokens; the model stays where it is."""
        self._own()
        comparer = NodeComparer(
            self.anatomy,
            self.editor,
            self._observations.stats,
            lambda: self._measure("current", options, ctx),
            lambda: self._export_view().total_bytes(),
        )
        return comparer.compare(first, second)

    def dossier(
        self, layer: int, expert: int, options: ProbeOptions, ctx: Context = SILENT
    ) -> DossierReport:
        """One expert at close quarters, on the committed weights without steering.

        Raises UsageError for an expert that does not exist, StateError for a pruned one.
        """
        self._own()
        with self.editor.live("current"), self.editor.unsteered():
            why = views.why(self.anatomy, self.editor, self._observations.stats, layer, expert)
            position = self.anatomy.position_of(layer)
            assert position is not None
            tap = self.taps.layers[position]
            if expert not in tap.live:
                raise StateError(f"L{layer}:E{expert} is pruned: undo brings it back")
            data = _first(self._probe_set(options), options.tokens)
            seen = dossier.watch(self.model, self.taps, position, data.sequences, ctx)
            modules = dict(self.model.named_modules())
            partner, alike, note = dossier.partner(tap, modules, seen, expert)
        here = seen.experts == expert
        rows = dossier.top_tokens(seen.tokens, here.any(axis=1))
        return DossierReport(
            why=why,
            dataset=data.name,
            tokens=len(seen.tokens),
            served=int(here.any(axis=1).sum()),
            mean_weight=float(seen.weights[here].mean()) if here.any() else 0.0,
            top_tokens=dossier.named(rows, self.tokenizer),
            partner=partner,
            alike=alike,
            note=note,
        )

    def _field(self, options: SelectOptions) -> handpick.Field:
        stats, layers = self._observations.stats, self.anatomy.layers
        ranking = options.even or options.below is not None or options.n_prune is not None
        stale = stats is not None and stats.state != self.editor.state
        if stats is not None and ranking and stale and not options.allow_stale:
            raise StateError(
                f"the statistics were made on state {stats.state}, the model is at "
                f"{self.editor.state}; collect again, or use them knowingly with --allow-stale"
            )
        return handpick.Field(
            layers=self.anatomy.indices,
            alive=views.mask_of(self.anatomy, self.editor.committed),
            protected=self._protected,
            scores=stats.score(options.metric) if stats is not None else None,
            top_k=tuple(layer.top_k for layer in layers),
            groups=tuple(layer.n_group for layer in layers),
            open_groups=tuple(layer.topk_group for layer in layers),
        )

    def _selected(self) -> Array:
        """The experts that go with the staged plan, bool [L, E]."""
        staged = self.editor.staged
        if staged is None:
            return np.zeros_like(self._protected)
        if staged.plan.technique != "prune":
            raise StateError(
                f"{staged.plan.technique} is staged ({staged.command}), which is not made of "
                "single experts: apply or discard it before you select"
            )
        return views.sets_mask(self.anatomy, staged.report.pruned)

    def _stage_by_hand(
        self, field: handpick.Field, gone: Array, options: SelectOptions
    ) -> PlanReport:
        editor, staged = self.editor, self.editor.staged
        keep = dict(zip(field.layers, _kept(field.alive & ~gone), strict=True))
        named = options.metric if field.scores is not None else None
        plan = PrunePlan(keep, named, "hand", _warnings(field, gone))
        evidence = self._observations.evidence if named else ()
        command = self.command or "select"
        if staged is not None and not options.clear:
            # A selection is made in steps, and a recipe needs all of them.
            evidence = (*staged.evidence, staged.command)
        with editor.live("current"):
            delta = prune_delta(plan, editor.resident)
            before = self._export_view().total_bytes()
        losses = handpick.lost(field, gone)
        proposal = planning.Proposal(
            plan,
            delta,
            command,
            before,
            None
            if losses is None
            else {ly: float(x) for ly, x in zip(field.layers, losses, strict=True)},
        )
        planning.stage(editor, self.anatomy, proposal, self._export_view)
        made = editor.require_staged("select")
        made.evidence = evidence
        made.report = replace(made.report, experts_after=min(map(len, keep.values())))
        return made.report

    def _probe_set(self, options: ProbeOptions) -> EvalSet:
        if options.data is not None:
            data = options.data
            tokens = tokenize(
                read_lines(data), self.tokenizer, data.max_tokens, self.anatomy.vocabulary
            )
            return EvalSet(data.source, tuple(tokens))
        held = self._observations.held_out
        if held is None:
            raise UsageError(
                "no held-out samples to probe on: collect from a set with more samples than "
                "--max-samples, or name a set with --dataset"
            )
        return held


def _kept(mask: Array) -> list[tuple[int, ...]]:
    return [tuple(int(e) for e in np.flatnonzero(row)) for row in mask]


def _warnings(field: handpick.Field, gone: Array) -> tuple[str, ...]:
    out = []
    uneven = handpick.unevenness(field.layers, handpick.counts(gone))
    if uneven:
        out.append(f"uneven, so it cannot be applied yet: {uneven}; `select --even` evens it out")
    protected = handpick.sets_of(field.layers, gone & field.protected)
    if protected:
        out.append(f"protected experts go: {handpick.spell(protected)}")
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
