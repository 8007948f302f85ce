"""Measurements of the session's model: current weights, candidate, states of the history.

What a person asks to see is measured as it runs, steering included, and says so. What is kept or
decided about weights leaves steering out, since steering is no part of them: a state's scores, the
comparison of two states, and the guardrails of apply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlxfun.context import SILENT, Again, Context
from mlxfun.editing.editor import Staged
from mlxfun.editing.options import ApplyOptions
from mlxfun.editing.plans import Subject
from mlxfun.errors import StateError, UsageError
from mlxfun.evaluation import measure
from mlxfun.evaluation.answer_health import AnswerHealth
from mlxfun.evaluation.compare_states import NodeComparer
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, ProbeReport
from mlxfun.evaluation.samples import answer_health, answer_samples
from mlxfun.events import Notice, Side
from mlxfun.generation.decoder import Decoder
from mlxfun.model.anatomy.context_length import beyond_context
from mlxfun.scans import expert_profile
from mlxfun.scans.reports import DossierReport, Finding
from mlxfun.session import views
from mlxfun.session.workspace import SessionWorkspace

JUDGED = 32
"""Answers that a guardrail on loops judges where no preview has judged any."""


@dataclass(frozen=True, slots=True)
class _Preview:
    """The newest measurement of a staged plan, and the options that asked for it."""

    staged: Staged
    report: EvaluateReport
    options: EvaluateOptions


class Measurements:
    """A session makes one. decoder: answers sample prompts."""

    def __init__(self, workspace: SessionWorkspace, decoder: Decoder) -> None:
        self._workspace, self._decoder = workspace, decoder
        self._editor = workspace.editor
        self._preview: _Preview | None = None

    def evaluate(self, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        """Measure the committed weights; the figures become the state's scores if nothing steers."""
        report = self._measure("base", options, ctx)
        self._editor.history.current.scores.update(measure.scores(report))
        return report

    def preview(self, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        """Measure the staged plan, and keep that for as long as it is staged."""
        staged = self._editor.require_staged("preview")
        self._preview = _Preview(staged, self._measure("candidate", options, ctx), options)
        return self._preview.report

    @property
    def previewed(self) -> EvaluateReport | None:
        """The newest preview of the plan that is staged, None without one."""
        known = self._known(self._editor.staged)
        return known.report if known is not None else None

    def _known(self, staged: Staged | None) -> _Preview | None:
        found = self._preview
        return found if found is not None and found.staged is staged else None

    def compare(
        self, first: int, second: int, options: EvaluateOptions, ctx: Context
    ) -> CompareReport:
        """Measure two states of the history without steering."""
        contexts = iter((ctx, Again(ctx)))  # the second reads the same text
        comparer = NodeComparer(
            self._workspace.anatomy,
            self._editor,
            self._workspace.stats,
            lambda: self._measure("base", options, next(contexts)),
            lambda: self._workspace.export().total_bytes(),
        )
        return comparer.compare(first, second)

    def guard(self, staged: Staged, options: ApplyOptions, ctx: Context) -> None:
        """Raise StateError with the figures if a guardrail of apply is broken.

        A preview that was made while steering, or without the KL that a limit is on, does not
        decide: it is made again.
        """
        if (options.max_kl, options.max_perplexity_ratio, options.max_loops) == (None,) * 3:
            return
        if not self._editor.steering_of("candidate").empty:
            text = "the guardrails measure without steering, which is not part of what is applied"
            ctx.emit(Notice("info", text))
        known, needs_kl = self._known(staged), options.max_kl is not None
        needs_answers = options.max_loops is not None
        lacking = known is None or (
            (needs_kl and known.report.kl_mean is None)
            or (needs_answers and known.report.answers is None)
        )
        if known is None or lacking or known.report.steered:
            asked = known.options if known is not None else EvaluateOptions()
            answers = asked.answers or (JUDGED if needs_answers else 0)
            with self._editor.unsteered():
                asked = replace(asked, samples=0, kl=asked.kl or needs_kl, answers=answers)
                report = self.preview(asked, ctx)
        else:
            report = known.report
        measure.require_within(report, options)

    def probe(self, options: ProbeOptions, ctx: Context = SILENT) -> ProbeReport:
        """A quick measurement of the staged plan on few tokens. Changes nothing, not the preview."""
        staged = self._editor.require_staged("probe")
        data = _first(self._probe_set(options, ctx), options.tokens)
        request = measure.Request("candidate", [data])
        found = measure.measure(self._editor, self._workspace.evaluator, request, ctx)
        if found.kl_mean is None or found.top1_agreement is None:
            raise RuntimeError("a probe measures KL")
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

    def profile(
        self, layer: int, expert: int, options: ProbeOptions, ctx: Context = SILENT
    ) -> DossierReport:
        """The top tokens and the nearest neighbour of one expert, on the committed weights without
        steering. Raises UsageError for an expert that does not exist, StateError for a pruned one.
        """
        workspace, editor = self._workspace, self._editor
        with editor.live("base"), editor.unsteered():
            why = views.why(workspace.anatomy, editor, workspace.stats, layer, expert)
            position = workspace.anatomy.position_of(layer)
            assert position is not None
            moe = workspace.resident.layers[position]
            if expert not in moe.live:
                raise StateError(f"L{layer}:E{expert} is pruned: undo brings it back")
            data = _first(self._probe_set(options, ctx), options.tokens)
            seen = expert_profile.watch(
                workspace.model, workspace.taps, position, data.sequences, ctx
            )
            modules = workspace.resident.tree.modules
            partner = expert_profile.partner(moe, modules, seen, expert)
        text = (data.sequences, workspace.tokenizer)
        return expert_profile.report(why, data.name, seen, expert, partner, text)

    def topics(
        self, options: ProbeOptions, ctx: Context = SILENT
    ) -> tuple[list[list[Finding]], str]:
        """(for each MoE layer the topic of each expert, the name of the text), on the committed
        weights without steering, in one pass."""
        workspace, editor = self._workspace, self._editor
        with editor.live("base"), editor.unsteered():
            data = _first(self._probe_set(options, ctx), options.tokens)
            chosen = expert_profile.watch_choices(
                workspace.model, workspace.taps, data.sequences, ctx
            )
        experts = workspace.anatomy.num_experts
        found = expert_profile.topics_of(data.sequences, chosen, experts, workspace.tokenizer)
        return found, data.name

    def _measure(self, subject: Side, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        sets = self._sets(options, ctx)
        longest = max((len(s) for one in sets for s in one.sequences), default=0)
        if warning := beyond_context(self._workspace.config, longest):
            ctx.emit(Notice("warning", warning))
        request = measure.Request(
            subject,
            sets,
            lambda: answer_samples(self._decoder, self._editor, options, sets, ctx),
            options.kl,
        )
        report = measure.measure(self._editor, self._workspace.evaluator, request, ctx)
        if options.answers <= 0:
            return report
        return replace(
            report,
            answers=self._health(subject, options, sets, ctx),
            answers_before=self._health("checkpoint", options, sets, ctx),
        )

    def _health(
        self, side: Subject, options: EvaluateOptions, sets: list[EvalSet], ctx: Context
    ) -> AnswerHealth:
        workspace = self._workspace
        with self._editor.live(side):
            return answer_health(workspace.model, workspace.tokenizer, options, sets, ctx)

    def _sets(self, options: EvaluateOptions, ctx: Context) -> list[EvalSet]:
        workspace = self._workspace
        if workspace.map.moe is None and not options.datasets:
            # Nothing is ever collected, and held out, of a dense model.
            raise UsageError("no data set named; give --dataset, for instance demo:eval")
        return measure.eval_sets(
            options, workspace.tokenizer, workspace.anatomy.vocabulary, workspace.held_out, ctx
        )

    def _probe_set(self, options: ProbeOptions, ctx: Context = SILENT) -> EvalSet:
        workspace = self._workspace
        if options.data is not None:
            vocabulary = workspace.anatomy.vocabulary
            return measure.read_set(options.data, workspace.tokenizer, vocabulary, ctx)
        if workspace.held_out is None:
            raise UsageError(
                "no held-out samples to probe on: collect from a set with more samples than "
                "--max-samples, or name a set with --dataset"
            )
        return workspace.held_out


def _first(data: EvalSet, tokens: int) -> EvalSet:
    """The beginning of a set, about `tokens` long, from as many sequences as it takes."""
    taken, left = [], tokens
    for sequence in data.sequences:
        if left < 2:
            break
        taken.append(sequence[:left])
        left -= len(taken[-1])
    return EvalSet(f"beginning of {data.name}", tuple(taken))
