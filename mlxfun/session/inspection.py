"""What a session shows of the resident model and of its routing statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.reports import CollectReport, StatsAction, StatsReport, WhyReport
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.checkpoint.identity import full_digest
from mlxfun.context import SILENT, Context
from mlxfun.data.describe import describe
from mlxfun.data.options import DatasetOptions
from mlxfun.data.reports import DatasetReport
from mlxfun.editing.reports import HistoryReport
from mlxfun.errors import ModelError
from mlxfun.evaluation.options import ProbeOptions
from mlxfun.scans.reports import DossierReport, TopicsReport
from mlxfun.session import views
from mlxfun.session.chat_counts import TrafficCounter
from mlxfun.session.measuring import smoke
from mlxfun.session.reports import InfoReport, LayersReport, SessionView, SmokeReport
from mlxfun.session.residency import Residency
from mlxfun.tracing.prompts import Padding, Prompts
from mlxfun.tracing.trace import Trace
from mlxfun.tracing.tracer import Tracer


class Inspection(Residency):
    """Looking at the model, and keeping its routing statistics."""

    def view(self) -> SessionView:
        """The session at this moment, immutable, cheap."""
        self._own()
        staged = self.editor.staged
        return SessionView(
            state=self.state,
            live=self.editor.side,
            model=self._cheap_info(),
            heat=views.heat(
                self.anatomy,
                self.editor,
                self._observations.stats,
                self._workspace.protected,
                (self._held(), self._topics.words(self.state)),
            ),
            plan=staged.report if staged else None,
            scores=self._measurements.previewed,
            history=self.editor.history.report(),
            steering=self.editor.steering.report(),
            steered=self.editor.steering.key,
            counting=self._observations.counting,
            memory_active=int(mx.get_active_memory()),
            memory_limit=self._cheap_info().memory_limit,
        )

    def info(self, verify: bool = False, ctx: Context = SILENT) -> InfoReport:
        """The resident model; with `verify` a digest over every byte of the checkpoint.

        Raises ModelError if the files to verify are not those that were loaded.
        """
        self._own()
        if verify and (changed := self._loaded.changed):
            raise ModelError(f"{changed} since the model was loaded; load it again to verify it")
        held = None if self._workspace.slots is None else self._workspace.slots.report()
        digest = full_digest(self._loaded.path, ctx) if verify else None
        with self.editor.live("base"):
            return views.info(
                self._loaded, self.map, self.editor, self._workspace.export(), digest, held
            )

    def _cheap_info(self) -> InfoReport:
        key = (self.state, self.editor.history.current.id)
        if self._info is None or self._info[0] != key:
            self._info = (key, self.info())
        return self._info[1]

    @property
    def tracer(self) -> Tracer:
        """Looks into, and intervenes in, forwards of the live side; see mlxfun.tracing."""
        self._own()
        return self._tracer

    def trace(
        self,
        prompts: Prompts,
        *,
        padding: Padding = "right",
        dry_run: bool = False,
        max_tokens: int | None = None,
    ) -> Trace:
        """A forward of the live side, steering included, in which values are saved and changed.

        As `Model.trace`; names are attributes of what this returns.
        """
        self._own()
        return self._tracer.trace(prompts, padding=padding, dry_run=dry_run, max_tokens=max_tokens)

    def layers(self) -> LayersReport:
        """The decoder layers, and those of them that have experts, as tables."""
        self._own()
        with self.editor.live("base"):
            return views.layers(self.map, self.editor, self._workspace.export())

    def why(self, layer: int, expert: int) -> WhyReport:
        """The numbers that condemned or spared expert `expert` of decoder layer `layer`."""
        self._own()
        self.map.require_experts("rank")
        return views.why(self.anatomy, self.editor, self._observations.stats, layer, expert)

    def dossier(
        self, layer: int, expert: int, options: ProbeOptions, ctx: Context = SILENT
    ) -> DossierReport:
        """The top tokens and nearest neighbour of an expert, on the committed weights without steering.

        Raises UsageError for an expert that does not exist, StateError for a pruned one.
        """
        self._own()
        self.map.require_experts("look at")
        report = self._measurements.profile(layer, expert, options, ctx)
        return self._topics.note_dossier(report, self.state)

    def topics(self) -> TopicsReport:
        """What is known of what each expert serves, from scans and profiles."""
        self._own()
        self.map.require_experts("name topics of")
        return self._topics.report(self.state, sum(map(len, self.editor.committed)))

    def find_topics(self, options: ProbeOptions, ctx: Context = SILENT) -> TopicsReport:
        """Profile all experts in one pass, on the committed weights without steering."""
        self._own()
        self.map.require_experts("name topics of")
        found, name = self._measurements.topics(options, ctx)
        looked = 0
        for layer, live, findings in zip(
            self.anatomy.indices, self.editor.committed, found, strict=True
        ):
            looked += len(live)
            for expert in live:
                self._topics.note_profile(layer, expert, findings[expert], self.state)
        return replace(self.topics(), looked=looked, dataset=name)

    def dataset(self, options: DatasetOptions, ctx: Context = SILENT) -> DatasetReport:
        """What would be read of a data set, in this model's tokens. Nothing runs."""
        self._own()
        return describe(options, self.tokenizer, self.anatomy.vocabulary, ctx)

    def history(self) -> HistoryReport:
        """The tree of states."""
        self._own()
        return self.editor.history.report()

    def smoke_test(
        self, prompt: str | None = None, max_tokens: int | None = None, ctx: Context = SILENT
    ) -> SmokeReport:
        """A quick check that the live model computes, caches and generates.

        prompt: what to answer; max_tokens: how far. None: the defaults of mlxfun.session.measuring.smoke.
        """
        self._own()
        asked = smoke.PROMPT if prompt is None else prompt
        length = smoke.TOKENS if max_tokens is None else max_tokens
        report = smoke.smoke_test(self, asked, length, ctx)
        if report.passed:
            return report
        edited = self.editor.live_state != self.editor.root_state
        told = smoke.advice(
            self.model, edited, self._workspace.open_checkpoint, self._loaded.on_disk
        )
        return replace(report, advice=told)

    # -- statistics ---------------------------------------------------------------------------

    def collect(self, options: CollectOptions, ctx: Context = SILENT) -> CollectReport:
        """Calibrate on the committed weights without steering. A cancel keeps what was collected."""
        self._own()
        self.map.require_experts("collect statistics of")
        return self._observations.collect(options, self.command, self._watched(ctx))

    def stats(self, action: StatsAction = "show") -> StatsReport:
        """The statistics in hand. Raises StateError without any."""
        self._own()
        self.map.require_experts("keep statistics of")
        return self._observations.show(action)

    def save_stats(self, path: Path) -> StatsReport:
        """Write the statistics as `.npz`."""
        self._own()
        self.map.require_experts("keep statistics of")
        return self._observations.save(path)

    def load_stats(self, path: Path) -> StatsReport:
        """Read an `.npz` made on this model. Raises PlanError for another shape or model."""
        self._own()
        self.map.require_experts("load statistics of")
        return self._observations.load(path)

    def traffic_counter(self, ctx: Context = SILENT) -> TrafficCounter | None:
        """What counts the requests of a server; see Observations.traffic_counter."""
        self._own()
        return self._observations.traffic_counter(ctx)

    def before_statistics(self, pending: Callable[[], None]) -> None:
        """`pending` is called before statistics are read or replaced; see Observations."""
        self._own()
        self._observations.pending = pending

    def traffic_stats(self) -> RoutingStats:
        """The statistics in hand, those of no token without any."""
        self._own()
        return self._observations.stats_or_empty()

    def reset_stats(self) -> StatsReport:
        """Forget the statistics."""
        self._own()
        self.map.require_experts("keep statistics of")
        return self._observations.reset()

    def set_counting(self, on: bool, auto_save: Path | None = None) -> StatsReport:
        """Count chat traffic too; with `auto_save` write the statistics after every answer."""
        self._own()
        self.map.require_experts("count")
        return self._observations.set_counting(on, auto_save)
