"""Read-only views of a session: reports from anatomy, statistics and the editor, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxfun.calibration.options import Metric
from mlxfun.calibration.reports import ExpertStatus, StatsAction, StatsReport, WhyReport
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.checkpoint.load import Loaded
from mlxfun.editing.editor import Editor
from mlxfun.errors import UsageError
from mlxfun.memory.reports import ResidencyReport, skipping
from mlxfun.model.anatomy import MoELayer, MoEMap
from mlxfun.model.anatomy.masks import mask_of, sets_mask
from mlxfun.model.anatomy.types import DecoderLayer
from mlxfun.model.device.hints import blas_hint
from mlxfun.model.device.memory import memory_limit
from mlxfun.model.export import ExportView
from mlxfun.model.model_map import ModelMap
from mlxfun.model.slicing import compact_delta
from mlxfun.session.reports import (
    DecoderRow,
    FeedForward,
    HeatView,
    InfoReport,
    LayerRow,
    LayersReport,
)

if TYPE_CHECKING:
    from mlxfun.arrays import Array

EXTREMES = 5
"""How many least and most important experts a statistics report names."""


def describe_router(layer: MoELayer) -> str:
    """One line on how a layer routes: "softmax", "sigmoid + bias, 4 of 8 groups"..."""
    text: str = layer.facts.score
    if layer.bias_name is not None:
        text += " + selection bias"
    if layer.grouped:
        text += f", {layer.topk_group} of {layer.n_group} groups"
    return text


def info(
    loaded: Loaded,
    found: ModelMap,
    editor: Editor,
    view: ExportView,
    digest: str | None,
    held: ResidencyReport | None = None,
) -> InfoReport:
    """The resident model. held: what is held of its experts, None for all."""
    anatomy = found.experts
    first = anatomy.layers[0] if anatomy.layers else None
    resident = sum(array.nbytes for array in view.resident_arrays())
    if held is not None:
        resident += held.slot_bytes
    return InfoReport(
        source=str(loaded.path),
        model_id=loaded.model_id,
        model_type=anatomy.model_type,
        decoder_layers=len(found.layers),
        moe_layers=len(anatomy.layers),
        experts=anatomy.num_experts,
        experts_kept=len(editor.committed[0]) if first else 0,
        top_k=anatomy.top_k,
        router=describe_router(first) if first else "",
        groups=first.n_group if first else 1,
        shared_experts=len(first.shared) if first else 0,
        parameters=view.parameter_count(),
        bytes=resident,
        checkpoint_bytes=view.total_bytes(),
        dtype=_main_dtype(view),
        quantization=quantization_text(loaded.config),
        device=str(mx.default_device().type).rpartition(".")[2],
        memory_active=int(mx.get_active_memory()),
        memory_limit=memory_limit(),
        notes=(*loaded.notes, *_held_note(held), *filter(None, [blas_hint()])),
        digest=digest,
        expert_bytes=view.expert_bytes(),
        open_groups=first.topk_group if first else 1,
        chat_template=loaded.chat_template,
        compactable=held is None
        and editor.resident.store is None
        and bool(compact_delta(editor.resident).layers),
    )


def _held_note(held: ResidencyReport | None) -> list[str]:
    """How many experts are in memory, where not all are."""
    if held is None:
        return []
    return [
        f"{held.held} are in memory, the others are read when they are wanted{skipping(held.miss)}"
    ]


def _main_dtype(view: ExportView) -> str:
    """The dtype that holds most of the unpacked values as saved."""
    count: Counter[str] = Counter()
    for name in view.names:
        dtype = view.dtype(name)
        if mx.issubdtype(dtype, mx.floating):
            count[str(dtype).rpartition(".")[2]] += view.nbytes(name)
    return count.most_common(1)[0][0] if count else "unknown"


def quantization_text(config: dict[str, Any]) -> str | None:
    """config.json's quantisation in words, None for an unquantised model."""
    q = config.get("quantization")
    if not isinstance(q, dict):
        return None
    return f"{q.get('mode', 'affine')} {q.get('bits')}-bit, group {q.get('group_size')}"


def layers(found: ModelMap, editor: Editor, view: ExportView) -> LayersReport:
    """The decoder layers, and those of them that have experts, as tables."""
    anatomy = found.experts
    rows = tuple(
        LayerRow(
            layer=layer.index,
            position=layer.position,
            router=describe_router(layer),
            score=layer.facts.score,
            experts=layer.num_experts,
            kept=len(live),
            top_k=layer.top_k,
            groups=layer.n_group,
            groups_kept=layer.topk_group,
            shared_experts=len(layer.shared),
            selection_bias=layer.bias_name is not None,
            path=layer.experts,
        )
        for layer, live in zip(anatomy.layers, editor.committed, strict=True)
    )
    return LayersReport(".".join(anatomy.count_key), rows, _decoder_rows(found, view))


def _decoder_rows(found: ModelMap, view: ExportView) -> tuple[DecoderRow, ...]:
    held: Counter[str] = Counter()
    for name in view.names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        held[".".join(parts[: number + 1])] += view.nbytes(name)
    return tuple(
        DecoderRow(
            layer=layer.index,
            mixer=" + ".join(mixer.kind for mixer in layer.mixers),
            feed_forward=_feed_forward(layer),
            bytes=held[layer.path],
            path=layer.path,
        )
        for layer in found.layers
    )


def _feed_forward(layer: DecoderLayer) -> FeedForward:
    dense = [path for path in layer.mlps if layer.moe is None or path != layer.moe.block]
    if layer.moe is None:
        return "dense" if dense else ""
    return "experts + dense" if dense else "experts"


def levelled(anatomy: MoEMap, editor: Editor, sign: int) -> Array:
    """bool [L, E]: experts whose level has this sign."""
    levels = editor.steering.levels.items()
    return sets_mask(
        anatomy, {ly: [e for e, x in some.items() if x * sign > 0] for ly, some in levels}
    )


def heat(
    anatomy: MoEMap,
    editor: Editor,
    stats: RoutingStats | None,
    protected: Array,
    about: tuple[Array | None, Mapping[tuple[int, int], str]],
) -> HeatView | None:
    """Everything that a heatmap draws, None for a model without experts.

    about: where experts are, see HeatView.held, and their topics.
    """
    if not anatomy.layers:
        return None
    alive = mask_of(anatomy, editor.committed)
    condemned = np.zeros_like(alive)
    if editor.staged is not None:
        condemned = sets_mask(anatomy, editor.staged.report.pruned)
    return HeatView(
        layers=anatomy.indices,
        experts=anatomy.num_experts,
        metrics={} if stats is None else {name: stats.score(name) for name in stats.metrics},
        alive=alive,
        condemned=condemned,
        activated=sets_mask(anatomy, editor.steering.activate) | levelled(anatomy, editor, 1),
        deactivated=sets_mask(anatomy, editor.steering.deactivate) | levelled(anatomy, editor, -1),
        protected=protected,
        samples=stats.samples if stats is not None else 0,
        tokens=stats.tokens if stats is not None else 0,
        stale=stats is not None and stats.state != editor.state,
        held=about[0],
        topics=about[1],
    )


def stats_report(
    stats: RoutingStats,
    alive: Array,
    action: StatsAction,
    counting: bool,
    state: str,
    path: Path | None,
) -> StatsReport:
    """The statistics in hand. stale: made on other weights than the committed `state`."""
    score = stats.score("reap_sum")
    rows, experts = np.nonzero(alive)
    order = np.argsort(score[rows, experts], kind="stable")
    named = [
        (stats.layer_indices[rows[i]], int(experts[i]), float(score[rows[i], experts[i]]))
        for i in order
    ]
    return StatsReport(
        action=action,
        layers=stats.layer_indices,
        experts=stats.shape[1],
        samples=stats.samples,
        tokens=stats.tokens,
        coverage=stats.coverage(alive),
        counting=counting,
        state=stats.state,
        stale=stats.state != state,
        path=str(path) if path is not None else None,
        least=tuple(named[:EXTREMES]),
        most=tuple(reversed(named[-EXTREMES:])),
        combined=stats.combined,
        sources=stats.sources,
        steered=stats.steered,
    )


def why(
    anatomy: MoEMap, editor: Editor, stats: RoutingStats | None, layer: int, expert: int
) -> WhyReport:
    """The numbers that condemned or spared one expert."""
    position = anatomy.position_of(layer)
    if position is None:
        raise UsageError(
            f"decoder layer {layer} is not an MoE layer; they are "
            f"{anatomy.indices[0]}..{anatomy.indices[-1]}"
        )
    if not 0 <= expert < anatomy.layers[position].num_experts:
        raise UsageError(
            f"layer {layer} has no expert {expert}; they are "
            f"0..{anatomy.layers[position].num_experts - 1}"
        )
    live = editor.committed[position]
    status = _status(editor, layer, expert, expert in live)
    if stats is None:
        return WhyReport(
            layer, expert, status, {}, {}, len(live), "no statistics yet; run collect first"
        )
    scores = {metric: float(stats.score(metric)[position, expert]) for metric in stats.metrics}
    # A pruned expert is ranked among those that are left and itself.
    others = [e for e in live if e != expert]
    ranks = {
        metric: 1 + int((stats.score(metric)[position, others] > scores[metric]).sum())
        for metric in stats.metrics
    }
    of = len(others) + 1
    verdict = _verdict(editor, scores, ranks, of, stats.combined != "rank")
    return WhyReport(layer, expert, status, scores, ranks, of, verdict)


def _status(editor: Editor, layer: int, expert: int, alive: bool) -> ExpertStatus:
    if not alive:
        return "pruned"
    if editor.staged is not None and expert in editor.staged.report.pruned.get(layer, ()):
        return "to be pruned"
    if expert in editor.steering.activate.get(layer, ()):
        return "forced on"
    return "forced off" if expert in editor.steering.deactivate.get(layer, ()) else "kept"


def _verdict(
    editor: Editor, scores: dict[Metric, float], ranks: dict[Metric, int], of: int, counted: bool
) -> str:
    decided = editor.staged.report.metric if editor.staged is not None else None
    metric: Metric = next((known for known in scores if known == decided), "reap_sum")
    if scores["freq"] == 0:
        return "never selected by any calibration token"
    text = f"{metric} {scores[metric]:.4g} ranks {ranks[metric]} of {of}, "
    if counted:
        text += f"selected by {scores['freq']:.0f} tokens"
    else:
        text += "in statistics merged by rank"
    if editor.staged is not None:
        report = editor.staged.report
        text += f"; {report.technique} ({report.strategy}) keeps {report.left} per layer"
    return text
