"""One resident model with its statistics, staged plan, steering, history and conversation.

    session = Session.open("demo")
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=32)))
    session.prune(PruneOptions(n_prune=4))
    print(session.preview(EvaluateOptions((DatasetOptions("demo:eval"),))).summary())
    session.apply(ApplyOptions())

A session is synchronous and belongs to the thread that opened it: MLX streams are per thread, and
an array left lazy in one cannot be evaluated in another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxfun.checkpoint.bits_plan import BitsPlan
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.context import SILENT, Context
from mlxfun.data.options import ScanKind
from mlxfun.editing.earlier import present
from mlxfun.editing.options import ApplyOptions
from mlxfun.editing.reports import HistoryReport, PlanReport, StepReport, WrittenReport
from mlxfun.errors import StateError, UsageError
from mlxfun.evaluation import measure
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions, RefusalOptions
from mlxfun.evaluation.refusals import count_refusals
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, ProbeReport, RefusalReport
from mlxfun.events import Notice, Side
from mlxfun.generation import ab as sides
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.reports import ABReport, ChatReport, TokensReport
from mlxfun.hooks.replay import tell_reading
from mlxfun.scans import scan
from mlxfun.scans.options import ScanOptions
from mlxfun.scans.reports import ScanReport
from mlxfun.session.straight import STRAIGHT, WHOLE, ToDisk, write_edit
from mlxfun.session.studying import Studying
from mlxfun.steering import sources as wishes
from mlxfun.steering.command_line import line_of
from mlxfun.steering.options import SteerOptions
from mlxfun.steering.reports import SteerReport
from mlxfun.steering.rules import Steering
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.ablate.reports import AblationReport
from mlxfun.techniques.bits.choose import choose_bits
from mlxfun.techniques.bits.options import BitsOptions
from mlxfun.techniques.bits.reports import BitsReport
from mlxfun.techniques.distil.options import DistilOptions
from mlxfun.techniques.distil.technique import Distil
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.merge.technique import Merge
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.narrow.technique import Narrow
from mlxfun.techniques.prune import manual_mask
from mlxfun.techniques.prune.calibrated import needs_forward
from mlxfun.techniques.prune.manual import Select
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from mlxfun.techniques.prune.technique import Prune
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from mlxfun.techniques.router_bias.technique import Amplify, Bake
from mlxfun.techniques.technique import Technique, stage
from mlxfun.techniques.vector_bias.technique import BakeVectors
from mlxfun.tracing.interventions import intervention
from mlxfun.tracing.standing import Placed, require_standing


class Session(Studying):
    """The engine's entry point. See the module's text; every method runs on the opening thread."""

    # -- comparing two sets -------------------------------------------------------------------

    def safety_scan(self, options: ScanOptions, ctx: Context = SILENT) -> ScanReport:
        """Find the experts that work more on harmful (first) or on benign (second) text.

        Runs on the committed weights without steering and writes a safety report. Raises
        Cancelled, and writes nothing, when cancelled.
        """
        self._own()
        self.map.require_experts("scan")
        return self._scan("safety", options, ctx)

    def domain_scan(self, options: ScanOptions, ctx: Context = SILENT) -> ScanReport:
        """The same for a domain (first) and general text (second); writes a domain report."""
        self._own()
        self.map.require_experts("scan")
        if not options.domain_name.strip():
            raise UsageError("a domain scan needs a name for the domain: give --domain-name")
        return self._scan("domain", options, ctx)

    def _scan(self, kind: ScanKind, options: ScanOptions, ctx: Context) -> ScanReport:
        request = scan.ScanRequest(self._loaded, self.anatomy, self.taps, self.editor, options)
        return self._topics.note_scan(scan.run(kind, request, ctx))

    # -- plans --------------------------------------------------------------------------------

    def _stage(self, technique: Technique[Any], options: Any, ctx: Context) -> PlanReport:
        """Plan, and stage in place of a staged plan. A cancel or failure leaves all as it was."""
        self._own()
        technique.require(self.map)
        self._require_held(options)
        mx.reset_peak_memory()  # what a plan says of its peak is that of the call which staged it
        return stage(self._workspace, technique.plan(self._workspace, options, self.command, ctx))

    def _require_held(self, options: Any) -> None:
        """Raise StateError for an edit that makes tensors of experts, of which some are on disk."""
        if isinstance(options, PruneOptions) and needs_forward(options):
            self._require_whole("a prune that measures experts' outputs or refits them")
        if type(options) in WHOLE:
            self._require_whole(WHOLE[type(options)])

    def write_edit(
        self,
        options: ToDisk,
        to: SaveOptions,
        ctx: Context = SILENT,
    ) -> WrittenReport:
        """Edit straight to a new model directory, layer after layer, for models of which both sides
        do not fit in memory: what staging, applying and saving would write. The session stays as it
        is, whatever happens. Raises what those do.
        """
        self._own()
        technique: Technique[Any] = (
            self._abliterate if isinstance(options, AblateOptions) else STRAIGHT[type(options)]()
        )
        technique.require(self.map)
        self._require_held(options)
        mx.reset_peak_memory()
        if not isinstance(options, PruneOptions) or options.saliency is None:
            return write_edit(self._workspace, technique, options, to, self.command, ctx)
        plain = replace(options, saliency=None)
        with self._observations.taken_from(options.saliency, self.command):
            return write_edit(self._workspace, technique, plain, to, self.command, ctx)

    def prune(self, options: PruneOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage a prune, replacing a staged plan. The candidate is live afterwards.

        What mlxfun.techniques.prune.calibrated lists is measured on the text of the last collect.
        With options.saliency the statistics of that file are those in hand from then on.
        """
        if options.saliency is None:
            return self._stage(Prune(), options, ctx)
        self._own()
        Prune().require(self.map)
        with self._observations.taken_from(options.saliency, self.command):
            return self._stage(Prune(), replace(options, saliency=None), ctx)

    def merge(self, options: MergeOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage a merge of the committed weights, replacing a staged plan.

        Both sides stay in memory until it is applied or discarded. Raises BudgetError with the
        figures if that would not fit. A cancel leaves everything as it was.
        """
        return self._stage(Merge(), options, ctx)

    def narrow(self, options: NarrowOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage experts with fewer neurons, fitted to what each layer put out, replacing a staged
        plan. Measures on the text of the last `collect`. A cancel leaves everything as it was."""
        return self._stage(Narrow(), options, ctx)

    def distil(self, options: DistilOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage routers (or routers, norms and experts) trained to predict what the checkpoint does,
        replacing a staged plan. A cancel stages the best so far, if that is better than before."""
        return self._stage(Distil(), options, ctx)

    def bits(self, options: BitsOptions, ctx: Context = SILENT) -> tuple[BitsPlan, BitsReport]:
        """How many bits each module is best saved with within a size; `SaveOptions.bits` takes it.
        Nothing in memory changes."""
        self._own()
        self._require_whole("bits")
        return choose_bits(self._workspace, options, ctx)

    def select(self, options: SelectOptions) -> PlanReport | StepReport:
        """Change by hand which experts are pruned, beginning with those of the staged plan, and
        stage that. A change that leaves none selected drops the staged plan."""
        self._own()
        self.map.require_experts("select")
        select = Select()
        if select.empties(self._workspace, options):
            return self.editor.discard()
        return self._stage(select, options, SILENT)

    def abliterate(self, options: AblateOptions, ctx: Context = SILENT) -> AblationReport:
        """Stage the removal of a direction from the committed weights."""
        report = self._stage(self._abliterate, options, ctx)
        assert isinstance(report, AblationReport)
        return report

    def amplify(self, options: AmplifyOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage boosts for the experts of a domain report."""
        return self._stage(Amplify(), options, ctx)

    def bake(self, options: BakeOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage the steering in force as a permanent edit; applying it clears the steering.

        Steered experts go into routers, vectors that are added to values into biases.
        """
        self._own()
        vectors = bool(self.editor.steering_of("base").interventions)
        return self._stage(BakeVectors() if vectors else Bake(), options, ctx)

    def steer(self, options: SteerOptions | SteerReport) -> SteerReport:
        """Add to, or clear, the steering; the next token follows it. A report puts back its own.

        Raises PlanError for a file or a set that cannot be carried out, StateError for a report
        of another state without allow_stale; the steering in force stays then.
        """
        self._own()
        if isinstance(options, SteerOptions):
            self.map.require_experts("steer")
        checked, notices = wishes.changed(options, self.editor, present(self.editor))
        self.editor.steer(checked, self.command or line_of(checked.report()))
        return checked.report(notices)

    def intervene(self, name: str, change: Any, source: str = "") -> SteerReport:
        """Put an intervention in force in every forward, as a step of the history; one at the same
        name takes the place of what stands there.

        name, change: as in a trace, without positions. source: where a vector is from. Raises
        UsageError for what cannot stand.
        """
        self._own()
        self.editor.require_steerable()
        placed = Placed(name, intervention(change), source)
        require_standing(self._workspace.parts, placed)
        now = self.editor.steering
        others = tuple(one for one in now.interventions if one.name != name)
        return self._intervening(replace(now, interventions=(*others, placed)))

    def clear_interventions(self, name: str | None = None) -> SteerReport:
        """Take the intervention at `name` away, or all. Raises UsageError where none stands."""
        self._own()
        self.editor.require_steerable()
        now = self.editor.steering
        left = tuple(one for one in now.interventions if name is not None and one.name != name)
        if name is not None and len(left) == len(now.interventions):
            standing = ", ".join(one.name for one in now.interventions) or "nowhere"
            raise UsageError(f"no intervention stands at {name}; they stand at {standing}")
        return self._intervening(replace(now, interventions=left))

    def _intervening(self, steering: Steering) -> SteerReport:
        self.editor.steer(steering, self.command or f"intervene ({steering.brief or 'clear'})")
        return steering.report()

    # -- measuring ----------------------------------------------------------------------------

    def evaluate(self, options: EvaluateOptions, ctx: Context = SILENT) -> EvaluateReport:
        """Measure the committed weights, steering included.

        The history keeps the figures as the state's scores, but none that steering had a part in.
        """
        self._own()
        return self._measurements.evaluate(options, ctx)

    def preview(self, options: EvaluateOptions, ctx: Context = SILENT) -> EvaluateReport:
        """Measure the staged weights; the same figures as `evaluate` after `apply`."""
        self._own()
        return self._measurements.preview(options, ctx)

    def probe(self, options: ProbeOptions, ctx: Context = SILENT) -> ProbeReport:
        """A quick measurement of the staged plan on few tokens. Changes nothing, not the preview."""
        self._own()
        return self._measurements.probe(options, ctx)

    def compare_nodes(
        self, first: int, second: int, options: EvaluateOptions, ctx: Context = SILENT
    ) -> CompareReport:
        """Measure two states of the history on the same tokens, without steering: a state is
        weights. The model stays where it is."""
        self._own()
        return self._measurements.compare(first, second, options, ctx)

    def refusals(self, options: RefusalOptions, ctx: Context = SILENT) -> RefusalReport:
        """Count refusals of the staged plan, or of the committed weights; see mlxfun.evaluation.refusal_rule."""
        self._own()
        return count_refusals(self.editor, self._workspace.evaluator, self.tokenizer, options, ctx)

    def chat(self, text: str, options: GenerateOptions, ctx: Context = SILENT) -> ChatReport:
        """Answer `text` in the running conversation, emitting a Token for each token."""
        self._own()
        ctx = self._watched(ctx)
        tell_reading(self.model, ctx, options.max_tokens)
        counter = self._observations.chat_counter(ctx)
        if counter is not None and self._conversation.elsewhere is not None:
            counter.begin()
        report = self._conversation.answer(text, options, counter, ctx)
        if counter is not None:
            counter.end()
        return report

    def count_tokens(self, text: str, options: GenerateOptions) -> TokensReport:
        """How many tokens `text` has, alone and as the next question."""
        self._own()
        return self._conversation.count(text, options)

    def reset_chat(self) -> None:
        """Start a new conversation."""
        self._own()
        self._conversation.reset()

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

        Raises StateError when there are no two sides: see mlxfun.generation.ab.
        """
        self._own()
        return sides.compare(
            self.model, self._decoder, self.editor, (text, options), self._watched(ctx)
        )

    # -- history ------------------------------------------------------------------------------

    def apply(self, options: ApplyOptions, ctx: Context = SILENT) -> StepReport:
        """Commit the staged plan; with guardrails set, preview first and refuse with the figures.

        Guardrails judge what would be committed, and steering is no part of it: a preview that was
        measured while steering does not decide, it is made again without.
        """
        self._own()
        staged = self.editor.require_staged("apply")
        manual_mask.require_even(staged.report)
        self._measurements.guard(staged, options, ctx)
        previewed = self._measurements.previewed
        step = self.editor.apply(measure.scores(previewed) if previewed else {}, ctx)
        self._workspace.drop_pruned()
        return step

    def discard(self) -> StepReport:
        """Drop the staged plan."""
        self._own()
        return self.editor.discard()

    def flip(self, side: Side | None = None) -> StepReport:
        """Choose which of "base" and "candidate" is live while a plan is staged."""
        self._own()
        return self.editor.flip(side)

    def compact(self, ctx: Context = SILENT) -> StepReport:
        """Free the memory of pruned experts; undo reads them back from the checkpoint."""
        self._own()
        self.map.require_experts("compact")
        if self._workspace.slots is not None:
            raise StateError(
                "there is nothing to compact: of this model only some experts are in memory, and "
                "pruned ones have left their slots; save writes the model without them"
            )
        if self._workspace.resident.store is not None:
            raise StateError(
                "compact frees the memory of pruned experts, and this model's are on disk: nothing "
                "to free (save leaves them out all the same)"
            )
        return self.editor.compact(self.command or "compact", ctx)

    def undo(self, ctx: Context = SILENT) -> StepReport:
        """Take the last step back, bit for bit."""
        self._own()
        return self.editor.undo(ctx)

    def redo(self, ctx: Context = SILENT) -> StepReport:
        """Take the step last undone again."""
        self._own()
        return self.editor.redo(ctx)

    def goto(self, node: int, ctx: Context = SILENT) -> StepReport:
        """Go to any node of the history."""
        self._own()
        return self.editor.goto(node, ctx)

    def name_node(self, node: int, label: str) -> HistoryReport:
        """Give a state of the history a name, or take it away with ""."""
        self._own()
        self.editor.history.name(node, label)
        return self.editor.history.report()

    # -- saving -------------------------------------------------------------------------------

    def save(self, options: SaveOptions, ctx: Context = SILENT) -> SaveReport:
        """Write the committed model, atomically, and check that stock mlx_lm opens it."""
        self._own()
        if self.editor.staged is not None:
            ctx.emit(
                Notice("warning", "the staged plan is not part of what is saved; apply it first")
            )
        with self.editor.live("base"):
            return self._workspace.save(self._workspace.export(), options, ctx)
