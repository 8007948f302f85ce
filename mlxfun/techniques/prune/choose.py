"""Choice of the experts to keep, by statistics or by an expert list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlxfun.calibration.options import METRICS
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import Context
from mlxfun.data.expert_lists import (
    Maker,
    MapOptions,
    Masks,
    list_warning,
    read_document,
    read_expert_list,
    read_maps,
)
from mlxfun.data.scan_reports import identity_of, require_current
from mlxfun.editing.earlier import present
from mlxfun.editing.editor import Editor, Live
from mlxfun.errors import StateError, UsageError
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.anatomy.masks import mask_of
from mlxfun.techniques.prune import selection
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.plan import PrunePlan
from mlxfun.techniques.prune.super_experts import Spared, find
from mlxfun.techniques.technique import removed_by
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array

STEERED = (
    "some of the statistics were counted while steering was in force, which is not part of the "
    "weights; collect to judge the weights alone"
)


def choose(
    workspace: Workspace, options: PruneOptions, spared: Spared | None = None
) -> tuple[PrunePlan, Array]:
    """The plan, and which experts were protected, bool [L, E]. Changes nothing."""
    anatomy = workspace.anatomy
    if options.expert_list is not None:
        constraints, notes = constraints_for(workspace, options, spared)
        keep = read_expert_list(options.expert_list, anatomy.indices, anatomy.num_experts)
        chosen = selection.adopt(keep, constraints, options)
        listed = PrunePlan(keep, strategy="list", warnings=(*notes, *chosen.warnings))
        return listed, constraints.protect
    scores = scores_of(workspace, options)
    constraints, notes = constraints_for(workspace, options, spared)
    chosen = selection.select(scores, constraints, options)
    strategy = "model-wide" if options.model_wide else options.strategy
    keep = dict(zip(anatomy.indices, chosen.keep, strict=True))
    steered = workspace.stats is not None and workspace.stats.steered
    warnings = (*notes, *chosen.warnings, *((STEERED,) if steered else ()))
    return PrunePlan(keep, options.metric, strategy, warnings), constraints.protect


def scores_of(workspace: Workspace, options: PruneOptions) -> Array:
    """Scores [L, E] of the statistics in hand. Raises StateError without any of this state."""
    stats = workspace.stats
    if stats is None:
        raise StateError(
            "prune needs statistics or a list: run `collect --dataset ...` or `stats load FILE` "
            "first, or give --expert-list FILE"
        )
    if options.n_prune is None:
        raise UsageError("say how many experts to prune with --n-prune, or give --expert-list FILE")
    if stats.state != workspace.editor.state and not options.allow_stale:
        raise StateError(
            f"the statistics were made on state {stats.state}, the model is at "
            f"{workspace.editor.state}; collect again, or use them knowingly with --allow-stale"
        )
    require_tokens(stats)
    if options.metric == "output_error" or options.metric == "auto":
        raise UsageError(f"--metric {options.metric} is measured while pruning: no file holds it")
    return stats.ranking_score(options.metric)


def require_tokens(stats: RoutingStats) -> None:
    """Raise StateError for statistics that no token has gone into: all experts would be alike."""
    if not any(values.any() for values in stats.sums.values()):
        raise StateError("the statistics hold no token at all: collect first, or load others")


def super_experts(workspace: Workspace, options: PruneOptions, ctx: Context) -> Spared | None:
    """Those that the options spare, None where they spare none. Runs the text of the last collect
    once, after looking whether the prune is possible at all.
    """
    if options.spares_super_experts and options.expert_list is None and options.n_prune:
        constraints, _ = constraints_for(workspace, options)
        selection.select(np.zeros(constraints.shape), constraints, options)
    return find(workspace, options, ctx)


def constraints_for(
    workspace: Workspace, options: PruneOptions, spared: Spared | None = None
) -> tuple[Constraints, tuple[str, ...]]:
    """What a prune must respect, and sentences for the user."""
    anatomy, stats = workspace.anatomy, workspace.stats
    maps = read_maps(options, anatomy.indices, anatomy.num_experts)
    warnings = (*maps.warnings, *stale_maps(workspace.editor, options))
    traffic = stats.sums["freq"] if stats is not None else None
    found = constraints_of(anatomy, workspace.editor.committed, maps, traffic)
    if spared is None:
        return found, warnings
    return replace(found, protect=found.protect | spared.mask), (*warnings, spared.note)


def constraints_of(
    anatomy: MoEMap, committed: Live, maps: Masks, traffic: Array | None
) -> Constraints:
    """What a selection on the committed side must respect. traffic: [L, E]."""
    return Constraints(
        layers=anatomy.indices,
        alive=mask_of(anatomy, committed),
        protect=maps.protect,
        target=maps.target,
        top_k=tuple(layer.top_k for layer in anatomy.layers),
        n_group=tuple(layer.n_group for layer in anatomy.layers),
        topk_group=tuple(layer.topk_group for layer in anatomy.layers),
        traffic=traffic,
    )


class Choice(MapOptions, Protocol):
    """Options that choose experts by files that may have been made on other weights."""

    @property
    def expert_list(self) -> Path | None: ...
    @property
    def allow_stale(self) -> bool: ...


def stale_maps(editor: Editor, options: Choice) -> list[str]:
    """Warnings about maps made on other weights, StateError unless --allow-stale; and about a list
    made on another model.
    """
    now = present(editor)
    root = editor.root_state
    found = [
        require_current(path, identity_of(read_document(path)), now, root, options.allow_stale)
        for path in (options.safety_map, options.domain_map)
        if path is not None
    ]
    if options.expert_list is not None:
        maker = Maker(now.model, now.model_name)
        found.append(list_warning(options.expert_list, maker, editor.earlier.recognises))
    return [warning for warning in found if warning]


def mass_lost(
    workspace: Workspace, options: PruneOptions, plan: PrunePlan
) -> dict[int, float] | None:
    """Share of each layer's summed metric that goes."""
    metric = options.metric
    if workspace.stats is None or metric not in METRICS:
        return None
    pruned = removed_by(workspace.anatomy, workspace.editor.committed, plan)
    scores = workspace.stats.score(metric)
    out = {}
    for row, (index, live) in enumerate(
        zip(workspace.anatomy.indices, workspace.editor.committed, strict=True)
    ):
        total = float(scores[row, list(live)].sum())
        gone = float(scores[row, list(pruned[index])].sum())
        out[index] = gone / total if total > 0 else 0.0
    return out
