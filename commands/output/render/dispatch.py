"""The table from report classes to renderers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType

from commands.guides.report import GuideReport
from commands.output.guide_page import GuidePage
from commands.output.render import (
    answers,
    calibration,
    features,
    history,
    inside,
    measurements,
    model,
    plans,
    scans,
    serving,
)
from commands.output.render.base import text, with_inputs, with_notes
from mlxfun.calibration.reports import (
    CombineReport,
    DiffReport,
    PurgeReport,
    RankReport,
    StatsReport,
    WhyReport,
)
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.data.reports import DatasetReport
from mlxfun.distributed.reports import WorkersReport
from mlxfun.editing.reports import HistoryReport, PlanReport, WrittenReport
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, RefusalReport
from mlxfun.evaluation.task_options import TaskReport
from mlxfun.generation.reports import ABReport, ChatReport
from mlxfun.memory.plan.report import FitReport, ModelsReport
from mlxfun.memory.reports import ResidencyReport, SweepReport
from mlxfun.report import Report
from mlxfun.scans.reports import DossierReport, ScanReport, TopicsReport
from mlxfun.serving.snapshot import ServingReport
from mlxfun.session.measuring.variants import RecipeReport
from mlxfun.session.reports import InfoReport, LayersReport, SmokeReport
from mlxfun.steering.reports import SteerReport
from mlxfun.techniques.ablate.reports import AblationReport
from mlxfun.techniques.bits.reports import BitsReport
from mlxfun.techniques.distil.reports import DistilReport
from mlxfun.techniques.narrow.reports import NarrowReport
from mlxfun.techniques.router_bias.reports import BoostReport
from mlxfun.techniques.vector_bias.reports import VectorReport
from mlxfun.tracing import reports as seen


def guide(report: GuideReport) -> RenderableType:
    """A guide, laid out for the width at which it is drawn."""
    return GuidePage(report.name)


def written(report: WrittenReport) -> RenderableType:
    """What was done to the model, and where the result is."""
    return Group(render(report.plan), model.save(report))


RENDERERS: dict[type[Report], Callable[[Any], RenderableType]] = {
    GuideReport: guide,
    InfoReport: model.info,
    LayersReport: model.layers,
    FitReport: model.fit,
    ResidencyReport: model.residency,
    SweepReport: model.sweep,
    SaveReport: model.save,
    WrittenReport: written,
    SmokeReport: model.smoke,
    ModelsReport: model.models,
    WorkersReport: model.workers,
    ServingReport: serving.serving,
    StatsReport: calibration.stats,
    DiffReport: calibration.diff,
    RankReport: calibration.rank,
    CombineReport: calibration.sentence,
    PurgeReport: calibration.sentence,
    WhyReport: calibration.why,
    ScanReport: scans.scan,
    SteerReport: scans.steer,
    DossierReport: scans.dossier,
    TopicsReport: scans.topics,
    PlanReport: plans.plan,
    BoostReport: plans.boost,
    NarrowReport: plans.narrow,
    DistilReport: plans.distil,
    BitsReport: plans.bits,
    TaskReport: measurements.tasks,
    VectorReport: plans.vectors,
    AblationReport: plans.ablation,
    EvaluateReport: measurements.evaluate,
    CompareReport: measurements.compare,
    RefusalReport: measurements.refusals,
    ChatReport: answers.chat,
    ABReport: answers.ab,
    HistoryReport: history.history,
    RecipeReport: history.recipe,
    DatasetReport: model.dataset,
    seen.TraceReport: inside.trace,
    seen.DifferenceReport: inside.difference,
    seen.LensReport: inside.lens,
    seen.TunedLensReport: inside.tuned,
    seen.AttentionReport: inside.attention,
    seen.HeadMapsReport: inside.head_maps,
    seen.HeadsReport: inside.heads,
    seen.PatchReport: inside.patch,
    seen.AttributionReport: inside.attribution,
    seen.ActivationsReport: inside.activations,
    seen.VectorsReport: inside.vectors,
    seen.ProbesReport: inside.probes,
    seen.SaeReport: features.trained,
    seen.SaeFeaturesReport: features.features,
}


def render(report: Report) -> RenderableType:
    """Draw a report; one without a renderer as its one sentence."""
    found = RENDERERS.get(type(report))
    drawn = found(report) if found is not None else text(report.summary())
    drawn = with_notes(drawn, [report.caveat] if report.caveat else [])
    return with_inputs(drawn, report.inputs)
