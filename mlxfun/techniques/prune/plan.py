"""Prune plans from statistics, expert lists, scan reports and options."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration.options import METRICS
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.data.expert_lists import (
    Maker,
    Masks,
    list_warning,
    read_document,
    read_expert_list,
    read_maps,
)
from mlxfun.data.scan_reports import Identity, identity_of, require_current
from mlxfun.editing.editor import Editor, Live
from mlxfun.editing.plans import Plan, PrunePlan
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.model.anatomy import Anatomy
from mlxfun.model.anatomy.masks import mask_of
from mlxfun.model.delta import Delta
from mlxfun.model.export import ExportView
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune import selection
from mlxfun.techniques.prune.delta import prune_delta, validate
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.text import option_words

if TYPE_CHECKING:
    from mlxfun.arrays import Array

STEERED = (
    "some of the statistics were counted while steering was in force, which is no part of the "
    "weights; collect to judge the weights alone"
)


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What a prune is planned from."""

    anatomy: Anatomy
    editor: Editor
    stats: RoutingStats | None
    options: PruneOptions


def split_samples(
    n: int, wanted: int | None, seed: int, share: float, least: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(calibration, held-out) indices into `n` samples, disjoint, both ascending.

    The held-out ones come from the samples that calibration does not want; only when it wants all
    of them is a `share` (at least `least`, at most half) taken away from it.
    """
    order = np.random.default_rng(seed).permutation(n)
    if wanted is not None and wanted < 1:
        raise UsageError(f"--max-samples {wanted} must be at least 1")
    if wanted is not None and wanted < n:
        held = min(n - wanted, max(least, round(wanted * share)))
        kept = wanted
    else:
        held = min(n // 2, max(least, round(n * share)))
        kept = n - held
    chosen, out = np.sort(order[:kept]), np.sort(order[kept : kept + held])
    return tuple(int(i) for i in chosen), tuple(int(i) for i in out)


def command_line(options: PruneOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    return shlex.join(["prune", *option_words(options, PruneOptions())])


def plan_prune(request: PruneRequest) -> tuple[PrunePlan, Array]:
    """The plan, and which experts were protected, bool [L, E]. Changes nothing."""
    options, anatomy = request.options, request.anatomy
    if options.expert_list is not None:
        constraints, notes = constraints_for(request)
        keep = read_expert_list(options.expert_list, anatomy.indices, anatomy.num_experts)
        chosen = selection.adopt(keep, constraints, options)
        listed = PrunePlan(keep, strategy="list", warnings=(*notes, *chosen.warnings))
        return listed, constraints.protect
    scores = scores_of(request)
    constraints, notes = constraints_for(request)
    chosen = selection.select(scores, constraints, options)
    strategy = "model-wide" if options.model_wide else options.strategy
    keep = dict(zip(anatomy.indices, chosen.keep, strict=True))
    steered = request.stats is not None and request.stats.steered
    warnings = (*notes, *chosen.warnings, *((STEERED,) if steered else ()))
    return PrunePlan(keep, options.metric, strategy, warnings), constraints.protect


def scores_of(request: PruneRequest) -> Array:
    """Scores [L, E] of the statistics in hand. Raises StateError without any of this state."""
    stats, options = request.stats, request.options
    if stats is None:
        raise StateError(
            "prune needs statistics or a list: run `collect --dataset ...` or `stats load FILE` "
            "first, or give --expert-list FILE"
        )
    if options.n_prune is None:
        raise UsageError("say how many experts go with --n-prune, or give --expert-list FILE")
    if stats.state != request.editor.state and not options.allow_stale:
        raise StateError(
            f"the statistics were made on state {stats.state}, the model is at "
            f"{request.editor.state}; collect again, or use them knowingly with --allow-stale"
        )
    require_tokens(stats)
    return stats.score(options.metric)


def require_tokens(stats: RoutingStats) -> None:
    """Raise StateError for statistics that no token has gone into: all experts would be alike."""
    if not any(values.any() for values in stats.sums.values()):
        raise StateError("the statistics hold no token at all: collect first, or load others")


def constraints_for(request: PruneRequest) -> tuple[selection.Constraints, tuple[str, ...]]:
    """What a prune must respect, and sentences for the user."""
    anatomy, stats = request.anatomy, request.stats
    maps = read_maps(request.options, anatomy.indices, anatomy.num_experts)
    warnings = (*maps.warnings, *stale_maps(request.editor, request.options))
    traffic = stats.sums["freq"] if stats is not None else None
    return constraints_of(anatomy, request.editor, maps, traffic), warnings


def constraints_of(
    anatomy: Anatomy, editor: Editor, maps: Masks, traffic: Array | None
) -> selection.Constraints:
    """What a selection on the committed side must respect. traffic: [L, E]."""
    return selection.Constraints(
        layers=anatomy.indices,
        alive=mask_of(anatomy, editor.committed),
        protect=maps.protect,
        target=maps.target,
        top_k=tuple(layer.top_k for layer in anatomy.layers),
        n_group=tuple(layer.n_group for layer in anatomy.layers),
        topk_group=tuple(layer.topk_group for layer in anatomy.layers),
        traffic=traffic,
    )


def stale_maps(editor: Editor, options: PruneOptions | MergeOptions) -> list[str]:
    """Warnings about maps made on other weights, StateError unless --allow-stale; and about a list
    made on another model.
    """
    now = Identity(editor.checkpoint_id, editor.state, editor.model_name)
    root = editor.history.root.state
    found = [
        require_current(path, identity_of(read_document(path)), now, root, options.allow_stale)
        for path in (options.safety_map, options.domain_map)
        if path is not None
    ]
    if options.expert_list is not None:
        found.append(list_warning(options.expert_list, Maker(now.model, now.model_name)))
    return [warning for warning in found if warning]


def stage_prune(
    request: PruneRequest, plan: PrunePlan, command: str, export: Callable[[], ExportView]
) -> PlanReport:
    """Validate `plan` on the committed side and swap it in, in place of a staged plan.

    A failure leaves the model, and a plan that was staged before, as they were.
    """
    editor = request.editor
    with editor.live("current"):
        validate(plan, editor.resident)
        delta = prune_delta(plan, editor.resident)
        before = export().total_bytes()
    if not delta.layers:
        raise PlanError("the plan removes nothing: every expert it names is kept")
    proposal = Proposal(plan, delta, command, before, mass_lost(request, plan))
    return stage(editor, request.anatomy, proposal, export)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan ready to be staged. bytes_before: of the committed side, as saved."""

    plan: Plan
    delta: Delta
    command: str
    bytes_before: int
    mass_lost: dict[int, float] | None = None


def stage(
    editor: Editor, anatomy: Anatomy, proposal: Proposal, export: Callable[[], ExportView]
) -> PlanReport:
    """Swap a proposal in, in place of a staged plan, and report it."""
    plan = proposal.plan
    if editor.staged is not None:
        editor.discard()
    base = editor.committed
    report = PlanReport(
        technique=plan.technique,
        metric=plan.metric,
        strategy=plan.strategy,
        experts_before=len(base[0]),
        experts_after=len(next(iter(plan.keep.values()))),
        kept=working(plan),
        pruned=_gone(anatomy, base, plan),
        bytes_before=proposal.bytes_before,
        bytes_after=proposal.bytes_before,
        delta_bytes=proposal.delta.bytes,
        mass_lost=proposal.mass_lost,
        state_after="",
        warnings=plan.warnings,
    )
    staged = editor.stage(plan, proposal.delta, proposal.command, report)
    staged.report = replace(staged.report, bytes_after=export().total_bytes())
    return staged.report


def working(plan: Plan) -> dict[int, tuple[int, ...]]:
    """{decoder layer: experts that can be chosen}."""
    dead = plan.dead if isinstance(plan, PrunePlan) else {}
    return {
        layer: tuple(e for e in experts if e not in dead.get(layer, ()))
        for layer, experts in plan.keep.items()
    }


def _gone(anatomy: Anatomy, base: Live, plan: Plan) -> dict[int, tuple[int, ...]]:
    """{decoder layer: experts of the committed side that `plan` does not keep}."""
    kept = working(plan)
    return {
        index: tuple(e for e in live if e not in set(kept[index]))
        for index, live in zip(anatomy.indices, base, strict=True)
    }


def mass_lost(request: PruneRequest, plan: PrunePlan) -> dict[int, float] | None:
    """Share of each layer's summed metric that goes."""
    metric = request.options.metric
    if request.stats is None or metric not in METRICS:
        return None
    pruned = _gone(request.anatomy, request.editor.committed, plan)
    scores = request.stats.score(metric)
    out = {}
    for row, (index, live) in enumerate(
        zip(request.anatomy.indices, request.editor.committed, strict=True)
    ):
        total = float(scores[row, list(live)].sum())
        gone = float(scores[row, list(pruned[index])].sum())
        out[index] = gone / total if total > 0 else 0.0
    return out
