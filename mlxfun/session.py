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

import threading
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxfun import (
    boosting,
    handpick,
    measure,
    measured,
    merging,
    planning,
    saving,
    scanning,
    smoke,
    views,
)
from mlxfun import steering as steer
from mlxfun import steering_files as wishes
from mlxfun.ablating import Ablations, Tools
from mlxfun.ablation_options import AblateOptions, RefusalOptions
from mlxfun.ablation_reports import AblationReport, RefusalReport
from mlxfun.anatomy import discover
from mlxfun.checkpoint.identity import full_digest
from mlxfun.checkpoint.load import Loaded, load, memory_limit
from mlxfun.comparison_reports import ScanReport
from mlxfun.context import SILENT, Context
from mlxfun.conversation import Conversation
from mlxfun.deltas import Reader, Resident
from mlxfun.editor import Editor
from mlxfun.errors import StateError, UsageError
from mlxfun.evaluate import Evaluator
from mlxfun.events import Notice
from mlxfun.export import ExportView
from mlxfun.generate import Decoded, Decoder
from mlxfun.handwork import HandWork
from mlxfun.head import HeadTap
from mlxfun.observations import Observations
from mlxfun.options import (
    AmplifyOptions,
    ApplyOptions,
    BakeOptions,
    CollectOptions,
    EvaluateOptions,
    GenerateOptions,
    MergeOptions,
    PruneOptions,
    SaveOptions,
    ScanOptions,
    SteerOptions,
)
from mlxfun.reports import (
    ChatReport,
    CollectReport,
    EvaluateReport,
    HistoryReport,
    InfoReport,
    LayersReport,
    PlanReport,
    SaveReport,
    SessionView,
    SmokeReport,
    StatsReport,
    SteerReport,
    StepReport,
    WhyReport,
)
from mlxfun.scan_reports import Identity
from mlxfun.steering import Steering
from mlxfun.taps import Taps
from mlxfun.workshop import Workshop


class Session(HandWork):
    """The engine's front door. See the module's text; every method runs on the opening thread."""

    def __init__(self, loaded: Loaded, *, undo_budget: int | None = None, seed: int = 0) -> None:
        """Wrap an already loaded model. Raises ModelError for a dense one."""
        self._thread = threading.get_ident()
        self._loaded = loaded
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.config = loaded.config
        self.seed = seed
        self.command = ""
        self.anatomy = discover(self.model, self.config)
        self.taps = Taps(self.model, self.anatomy)
        self.taps.attach()
        self.editor = Editor(
            Resident(self.model, self.taps, self._open_checkpoint),
            loaded.checkpoint_id,
            f"load {loaded.model_id}",
            undo_budget,
        )
        head = HeadTap(self.model, self.anatomy.head) if self.anatomy.head else None
        self._evaluator = Evaluator(self.model, head, self.anatomy.vocabulary)
        self._decoder = Decoder(self.model, self.tokenizer, self.taps)
        self._conversation = Conversation(self.tokenizer, self._decoder, self.editor)
        self._observations = Observations(loaded, self.anatomy, self.taps, self.editor)
        kit = (self.tokenizer, self.editor, self._evaluator, self._stored_dtype, self._export_view)
        self._ablations = Ablations(Tools(*kit, memory_limit))
        self._protected = np.zeros((len(self.anatomy.layers), self.anatomy.num_experts), bool)
        self._info: tuple[tuple[str, int], InfoReport] | None = None

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        undo_budget: int | None = None,
        seed: int = 0,
        ctx: Context = SILENT,
    ) -> Session:
        """Load a local directory, a Hub id, or "demo" (the bundled model).

        undo_budget: bytes of edit-made tensors that the history may hold; None for no limit.
        Raises ModelError (missing, broken, dense, unsupported) or BudgetError (does not fit).
        """
        return cls(load(source, revision, ctx), undo_budget=undo_budget, seed=seed)

    # -- looking ------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """Identity of the committed weights; staging does not change it."""
        return self.editor.state

    @property
    def checkpoint_id(self) -> str:
        """Identity of the checkpoint that was loaded."""
        return self._loaded.checkpoint_id

    def view(self) -> SessionView:
        """The session at this moment, immutable, cheap."""
        staged = self.editor.staged
        return SessionView(
            state=self.state,
            live=self.editor.side,
            model=self._cheap_info(),
            heat=views.heat(self.anatomy, self.editor, self._observations.stats, self._protected),
            plan=staged.report if staged else None,
            scores=staged.preview if staged else None,
            history=self.editor.history.report(),
            steering=self._steer_report(()),
            counting=self._observations.counting,
            memory_active=int(mx.get_active_memory()),
            memory_limit=self._cheap_info().memory_limit,
        )

    def info(self, verify: bool = False, ctx: Context = SILENT) -> InfoReport:
        """The resident model; with `verify` a digest over every byte of the checkpoint."""
        self._own()
        digest = full_digest(self._loaded.path, ctx) if verify else None
        with self.editor.live("current"):
            return views.info(self._loaded, self.anatomy, self.editor, self._export_view(), digest)

    def _cheap_info(self) -> InfoReport:
        key = (self.state, self.editor.history.current.id)
        if self._info is None or self._info[0] != key:
            self._info = (key, self.info())
        return self._info[1]

    def layers(self) -> LayersReport:
        """Anatomy as a table."""
        return views.layers(self.anatomy, self.editor)

    def why(self, layer: int, expert: int) -> WhyReport:
        """The numbers that condemned or spared expert `expert` of decoder layer `layer`."""
        return views.why(self.anatomy, self.editor, self._observations.stats, layer, expert)

    def history(self) -> HistoryReport:
        """The tree of states."""
        return self.editor.history.report()

    def smoke_test(self, ctx: Context = SILENT) -> SmokeReport:
        """A quick check that the live model computes, caches and generates."""
        self._own()
        return smoke.smoke_test(self, ctx)

    # -- statistics ---------------------------------------------------------------------------

    def collect(self, options: CollectOptions, ctx: Context = SILENT) -> CollectReport:
        """Calibrate on the committed weights. A cancel keeps what was collected and says so."""
        self._own()
        return self._observations.collect(options, self.command, ctx)

    def stats(self, action: str = "show") -> StatsReport:
        """The statistics in hand. Raises StateError without any."""
        return self._observations.show(action)

    def save_stats(self, path: Path) -> StatsReport:
        """Write the statistics as `.npz`."""
        return self._observations.save(path)

    def load_stats(self, path: Path) -> StatsReport:
        """Read an `.npz` made on this model. Raises PlanError for another shape or model."""
        return self._observations.load(path)

    def reset_stats(self) -> StatsReport:
        """Forget the statistics."""
        return self._observations.reset()

    def set_counting(self, on: bool, auto_save: Path | None = None) -> StatsReport:
        """Count chat traffic too; with `auto_save` write the statistics after every answer."""
        return self._observations.set_counting(on, auto_save)

    # -- comparing two sets -------------------------------------------------------------------

    def safety_scan(self, options: ScanOptions, ctx: Context = SILENT) -> ScanReport:
        """Find the experts that work more on harmful (first) or on benign (second) text.

        Runs on the committed weights without steering and writes a safety report. Raises
        Cancelled, and writes nothing, when cancelled.
        """
        self._own()
        return self._scan("safety", options, ctx)

    def domain_scan(self, options: ScanOptions, ctx: Context = SILENT) -> ScanReport:
        """The same for a domain (first) and general text (second); writes a domain report."""
        self._own()
        if not options.domain_name.strip():
            raise UsageError("a domain scan needs a name for the domain: give --domain-name")
        return self._scan("domain", options, ctx)

    def _scan(self, kind: str, options: ScanOptions, ctx: Context) -> ScanReport:
        request = scanning.ScanRequest(self._loaded, self.anatomy, self.taps, self.editor, options)
        return scanning.run(kind, request, ctx)

    # -- plans --------------------------------------------------------------------------------

    def prune(self, options: PruneOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage a prune, replacing a staged plan. The candidate is live afterwards.

        What mlxfun.measured lists is measured on the text of the last collect.
        """
        self._own()
        stats = self._observations.stats
        request = planning.PruneRequest(self.anatomy, self.editor, stats, options)
        report, self._protected = measured.stage_prune(request, self._workshop(), self.command, ctx)
        staged = self.editor.require_staged("prune")
        staged.evidence = self._observations.evidence if report.metric else ()
        return report

    def _workshop(self) -> Workshop:
        seen, stored, export = self._observations, self._stored_dtype, self._export_view
        known = (self.model, self.anatomy, self.editor, self.tokenizer, self._evaluator)
        return Workshop(*known, seen.calibration, seen.held_out, stored, export, memory_limit())

    def merge(self, options: MergeOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage a merge of the committed weights, replacing a staged plan.

        Both sides stay in memory until it is applied or discarded. Raises BudgetError with the
        figures if that would not fit. A cancel leaves everything as it was.
        """
        self._own()
        request = merging.MergeRequest(
            model=self.model,
            anatomy=self.anatomy,
            editor=self.editor,
            options=options,
            batches=merging.read_batches(options, self.tokenizer, self.anatomy.vocabulary),
            stored=self._stored_dtype,
            memory_limit=memory_limit(),
        )
        report, self._protected = merging.stage_merge(
            request, self.command or merging.command_line(options), self._export_view, ctx
        )
        return report

    def abliterate(self, options: AblateOptions, ctx: Context = SILENT) -> AblationReport:
        """Stage the removal of a direction from the committed weights, see mlxfun.ablating."""
        self._own()
        return self._ablations.stage(options, self.command, ctx)

    def amplify(self, options: AmplifyOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage boosts for the experts of a domain report; see mlxfun.boosting."""
        self._own()
        return boosting.amplify(self._workshop(), options, self.command, ctx)

    def bake(self, options: BakeOptions, ctx: Context = SILENT) -> PlanReport:
        """Stage the steering in force as a permanent edit; applying it clears the steering."""
        self._own()
        return boosting.bake(self._workshop(), options, self.command, ctx)

    def _stored_dtype(self, path: str) -> mx.Dtype:
        known = self._loaded.stored_dtypes.get(path)
        return self.editor.resident.tree.get(path).dtype if known is None else known

    def steer(self, options: SteerOptions) -> SteerReport:
        """Add to, or clear, the steering; the next token follows it.

        Raises PlanError for a file or a set that cannot be carried out, StateError for a report
        of another state without allow_stale; the steering in force stays then.
        """
        self._own()
        now = Identity(self.checkpoint_id, self.state, self._loaded.model_id)
        wish = wishes.read(options, self.editor.resident, now, self.editor.history.root.state)
        self.editor.require_steerable()
        wanted = Steering() if options.clear else self.editor.steering
        wanted = replace(wanted.with_more(wish.activate, wish.deactivate), **wish.rule)
        wanted = wanted.with_levels(options.levels)
        checked, notices = steer.check(wanted, self.editor.resident)
        self.editor.set_steering(checked)
        unused = wishes.unused_values(wish, checked.rule)
        return self._steer_report((*wish.notices, *unused, *notices))

    def _steer_report(self, notices: tuple[str, ...]) -> SteerReport:
        steering = self.editor.steering
        return SteerReport(
            dict(steering.activate),
            dict(steering.deactivate),
            notices,
            steering.rule,
            steering.boost_value,
            steering.mask_value,
            {layer: dict(levels) for layer, levels in steering.levels.items()},
        )

    # -- measuring ----------------------------------------------------------------------------

    def evaluate(self, options: EvaluateOptions, ctx: Context = SILENT) -> EvaluateReport:
        """Measure the committed weights."""
        self._own()
        report = self._measure("current", options, ctx)
        self.editor.history.current.scores.update(measure.scores(report))
        return report

    def preview(self, options: EvaluateOptions, ctx: Context = SILENT) -> EvaluateReport:
        """Measure the staged weights; the same figures as `evaluate` after `apply`."""
        self._own()
        staged = self.editor.require_staged("preview")
        staged.preview = self._measure("staged", options, ctx)
        return staged.preview

    def _measure(self, subject: str, options: EvaluateOptions, ctx: Context) -> EvaluateReport:
        sets = measure.eval_sets(
            options, self.tokenizer, self.anatomy.vocabulary, self._observations.held_out
        )
        return measure.measure(
            self.editor,
            self._evaluator,
            subject,
            sets,
            lambda: self._conversation.samples(options, sets, ctx),
            ctx,
        )

    def refusals(self, options: RefusalOptions, ctx: Context = SILENT) -> RefusalReport:
        """Count refusals of the staged plan, or of the committed weights; see mlxfun.refusals."""
        self._own()
        return self._ablations.refusals(options, ctx)

    def chat(self, text: str, options: GenerateOptions, ctx: Context = SILENT) -> ChatReport:
        """Answer `text` in the running conversation, emitting a Token for each token."""
        self._own()
        return self._conversation.answer(text, options, self._observations.counter(), ctx)

    def greedy(self, prompt: list[int], options: GenerateOptions, ctx: Context = SILENT) -> Decoded:
        """Continue token ids with the live side, outside the conversation."""
        return self._decoder.run(prompt, options, self.editor.key, lambda *_: None, ctx=ctx)

    def reset_chat(self) -> None:
        """Start a new conversation."""
        self._conversation.reset()

    # -- history ------------------------------------------------------------------------------

    def apply(self, options: ApplyOptions, ctx: Context = SILENT) -> StepReport:
        """Commit the staged plan; with guardrails set, preview first and refuse with the figures."""
        self._own()
        staged = self.editor.require_staged("apply")
        handpick.require_even(staged.report)
        if (options.max_kl, options.max_perplexity_ratio) != (None, None):
            scores = staged.preview or self.preview(EvaluateOptions(), ctx)
            measure.require_within(scores, options)
        return self.editor.apply(measure.scores(staged.preview) if staged.preview else {})

    def discard(self) -> StepReport:
        """Drop the staged plan."""
        self._own()
        return self.editor.discard()

    def flip(self, side: str | None = None) -> StepReport:
        """Choose which of "base" and "candidate" is live while a plan is staged."""
        self._own()
        return self.editor.flip(side)

    def compact(self, ctx: Context = SILENT) -> StepReport:
        """Free the memory of pruned experts; undo reads them back from the checkpoint."""
        self._own()
        return self.editor.compact(self.command or "compact", ctx)

    def undo(self) -> StepReport:
        """Take the last step back, bit for bit."""
        self._own()
        return self.editor.undo()

    def redo(self) -> StepReport:
        """Take the step last undone again."""
        self._own()
        return self.editor.redo()

    def goto(self, node: int, ctx: Context = SILENT) -> StepReport:
        """Go to any node of the history."""
        self._own()
        return self.editor.goto(node, ctx)

    # -- saving -------------------------------------------------------------------------------

    def save(self, options: SaveOptions, ctx: Context = SILENT) -> SaveReport:
        """Write the committed model, atomically, and check that stock mlx_lm opens it."""
        self._own()
        if self.editor.staged is not None:
            ctx.emit(
                Notice("warning", "the staged plan is not part of what is saved; apply it first")
            )
        with self.editor.live("current"):
            return saving.save(
                self._loaded, self.editor, self.anatomy, self._export_view(), options, ctx
            )

    def close(self) -> None:
        """Detach the taps and let go of the model."""
        self.taps.detach()
        self._decoder.clear()
        mx.clear_cache()

    def _export_view(self) -> ExportView:
        return ExportView(
            self.model, self.editor.resident, self.anatomy, self._loaded.stored_dtypes
        )

    def _open_checkpoint(self) -> Reader:
        return saving.open_checkpoint(
            self._loaded, lambda path: self.editor.resident.tree.get(path).dtype
        )

    def _own(self) -> None:
        if threading.get_ident() != self._thread:
            raise StateError(
                "a Session belongs to the thread that opened it (MLX streams are per thread); "
                "use mlxfun.worker to drive one from another thread"
            )
