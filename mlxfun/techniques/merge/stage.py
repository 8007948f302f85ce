"""Stages a merge: chooses the centroids, checks memory, runs the layers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.calibration.collect import batch_shape, collect
from mlxfun.calibration.options import METRICS
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import batches, read_lines, tokenize
from mlxfun.data.expert_lists import Masks, read_expert_list, read_maps
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.editor import Editor
from mlxfun.editing.plans import PrunePlan
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError, UsageError
from mlxfun.model.anatomy import Anatomy
from mlxfun.session.workspace import Workshop
from mlxfun.techniques.merge.delta import Merger
from mlxfun.techniques.merge.options import ALIGNMENTS, SIMILARITY_MODES, MergeOptions
from mlxfun.techniques.prune import plan as planning
from mlxfun.techniques.prune import selection
from mlxfun.techniques.prune.delta import validate
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.text import option_words

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

PAIRS_AT_ONCE = 256 << 20
"""See mlxfun.techniques.merge.alignment: the bound on cost matrices."""


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What a merge is planned from. batches: of the calibration set."""

    shop: Workshop
    options: MergeOptions
    batches: Sequence[Batch]

    @classmethod
    def of(cls, shop: Workshop, options: MergeOptions) -> MergeRequest:
        """The request, its data set read. Raises DatasetError."""
        vocabulary = shop.anatomy.vocabulary
        lines = read_lines(options.data)
        sequences = tokenize(lines, shop.tokenizer, options.data.max_tokens, vocabulary)
        return cls(shop, options, batches(sequences, *batch_shape(None, None)))

    @property
    def anatomy(self) -> Anatomy:
        """Of the resident model."""
        return self.shop.anatomy

    @property
    def editor(self) -> Editor:
        """Where the model stands."""
        return self.shop.editor


def command_line(options: MergeOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = ["merge", "--dataset", options.data.source]
    words += option_words(options.data, DatasetOptions(options.data.source))
    words += option_words(options, MergeOptions(options.data))
    return shlex.join(words)


def stage_merge(
    request: MergeRequest, command: str = "", ctx: Context = SILENT
) -> tuple[PlanReport, Array]:
    """Merge on the committed side and stage the result, in place of a staged plan.

    Returns the report, and which experts were protected, bool [L, E]. A cancel or failure leaves
    the model, and a plan that was staged before, as they were. Raises UsageError, PlanError and
    BudgetError ahead of the work where they can be foreseen.
    """
    options, editor, shop = request.options, request.editor, request.shop
    _check(options)
    with editor.live("current"), editor.unsteered():
        merger = Merger(shop.model, editor.resident, options, shop.stored)
        merger.require_mergeable()
        maps = read_maps(_prune_options(options), request.anatomy.indices, _experts(request))
        stale = planning.stale_maps(editor, options)
        rehearse(request, maps)
        require_memory(request)
        before = shop.export().total_bytes()
        chosen = _Chooser(request, maps, _fixed(request, maps, ctx))
        plan, delta = merger.run(request.batches, chosen.choose, ctx)
    notes = (*maps.warnings, *stale, *dict.fromkeys(chosen.warnings), *plan.warnings)
    plan = replace(plan, warnings=notes)
    proposal = planning.Proposal(plan, delta, command or command_line(options), before)
    report = planning.stage(editor, request.anatomy, proposal, shop.export)
    return report, maps.protect


def _experts(request: MergeRequest) -> int:
    return request.anatomy.num_experts


def _check(options: MergeOptions) -> None:
    for flag, value, valid in (
        ("--similarity-mode", options.similarity_mode, SIMILARITY_MODES),
        ("--alignment", options.alignment, ALIGNMENTS),
        ("--metric", options.metric, METRICS),
    ):
        if value not in valid:
            raise UsageError(f"{flag} {value}: choose one of {', '.join(valid)}")
    for flag, number, least in (
        ("--max-group-size", options.max_group_size, 2),
        ("--max-similarity-tokens", options.max_similarity_tokens, 2),
        ("--max-alignment-tokens", options.max_alignment_tokens, 1),
    ):
        if number < least:
            raise UsageError(f"{flag} {number} must be at least {least}")
    if options.expert_list is not None and options.n_prune is not None:
        raise UsageError("--expert-list already names the centroids; leave out --n-prune")
    if options.expert_list is None and options.n_prune is None:
        raise UsageError(
            "say how many experts are merged away with --n-prune, or name the centroids with "
            "--expert-list FILE"
        )


def _prune_options(options: MergeOptions) -> PruneOptions:
    """The part of the options that chooses experts."""
    return PruneOptions(
        n_prune=options.n_prune,
        metric=options.metric,
        model_wide=options.model_wide,
        ignore_experts=options.ignore_experts,
        safety_map=options.safety_map,
        safety_mode=options.safety_mode,
        domain_map=options.domain_map,
        domain_mode=options.domain_mode,
        allow_stale=options.allow_stale,
    )


# -- centroids --------------------------------------------------------------------------------


class _Chooser:
    """Picks the centroids of one layer after the other. fixed: {decoder layer: centroids}."""

    def __init__(
        self, request: MergeRequest, maps: Masks, fixed: dict[int, tuple[int, ...]] | None
    ) -> None:
        self._request, self._maps, self._fixed = request, maps, fixed
        self._options = _prune_options(request.options)
        # Taken now: while merging, what is live in the layers done is not what is committed.
        self._whole = planning.constraints_of(request.anatomy, request.editor, maps, None)
        self.warnings: list[str] = []

    def choose(self, position: int, stats: RoutingStats) -> tuple[int, ...]:
        """See mlxfun.techniques.merge.delta.Choose."""
        if self._fixed is not None:
            return self._fixed[self._request.anatomy.indices[position]]
        constraints = self._whole.of_layer(position, stats.sums["freq"])
        chosen = selection.select(stats.score(self._options.metric), constraints, self._options)
        self.warnings += chosen.warnings
        return chosen.keep[0]


def rehearse(request: MergeRequest, maps: Masks) -> None:
    """Raise now what the options would raise in some layer after minutes."""
    options = request.options
    if options.expert_list is None:
        constraints = planning.constraints_of(request.anatomy, request.editor, maps, None)
        chosen = selection.select(np.zeros(constraints.shape), constraints, _prune_options(options))
        kept = len(chosen.keep[0])
    else:
        kept = len(next(iter(_listed(request, maps).values())))
    live = len(request.editor.committed[0])
    if (live - kept) > kept * (options.max_group_size - 1):
        raise PlanError(
            f"{kept} centroids with --max-group-size {options.max_group_size} take at most "
            f"{kept * (options.max_group_size - 1)} of the {live - kept} experts that go; raise "
            "it, or merge fewer"
        )


def _fixed(request: MergeRequest, maps: Masks, ctx: Context) -> dict[int, tuple[int, ...]] | None:
    """Centroids that are known before the first layer is merged, None if each layer decides."""
    options = request.options
    if options.expert_list is not None:
        return _listed(request, maps)
    if not options.model_wide:
        return None
    # One set of indices for all layers needs every layer's saliency first, so that of the
    # unmerged model has to do.
    empty = RoutingStats.empty(request.anatomy.indices, _experts(request))
    stats, cancelled = collect(
        request.shop.model, request.editor.resident.taps, request.batches, empty, ctx
    )
    if cancelled:
        ctx.check()
    constraints = planning.constraints_of(request.anatomy, request.editor, maps, stats.sums["freq"])
    chosen = selection.select(stats.score(options.metric), constraints, _prune_options(options))
    return dict(zip(request.anatomy.indices, chosen.keep, strict=True))


def _listed(request: MergeRequest, maps: Masks) -> dict[int, tuple[int, ...]]:
    options, anatomy, editor = request.options, request.anatomy, request.editor
    if options.expert_list is None:
        raise RuntimeError("no list was given")
    keep = read_expert_list(options.expert_list, anatomy.indices, anatomy.num_experts)
    validate(PrunePlan(keep), editor.resident)
    if all(keep[i] == live for i, live in zip(anatomy.indices, editor.committed, strict=True)):
        raise PlanError(f"{options.expert_list} names every expert as a centroid: nothing to merge")
    constraints = planning.constraints_of(anatomy, editor, maps, None)
    selection.adopt(keep, constraints, _prune_options(options))
    return keep


# -- memory -----------------------------------------------------------------------------------


def estimate_bytes(request: MergeRequest) -> int:
    """Bytes that merging needs on top of the resident model: an upper estimate.

    The new stacks of every layer (both sides stay in memory while the plan is staged), the widest
    layer's working set, and the hidden states of the calibration set.
    """
    options, resident = request.options, request.editor.resident
    live = len(request.editor.committed[0])
    kept = live - options.n_prune if options.n_prune is not None else live
    stacks, widest = 0, 0
    for tap in resident.taps.layers:
        arrays = [resident.tree.get(p.path) for p in tap.layer.expert_parameters()]
        rows = len(resident.stack[tap.layer.position])
        stacks += sum(a.nbytes for a in arrays) * kept // rows
        # A projection in float32: as it is, scaled, and its rows that are being combined.
        packed = [a.size * (8 if a.dtype == mx.uint32 else 1) for a in arrays]
        widest = max(widest, 3 * 4 * max(packed, default=0))
    real = sum(int(batch.mask.sum()) for batch in request.batches)
    tokens = min(options.max_similarity_tokens, real)
    hidden, neurons = _widths(request)
    work = widest + tokens * live * neurons * 4 * 4 + PAIRS_AT_ONCE
    # Hidden states as they come in, go out, and what is remembered of attention and norms.
    states = sum(batch.tokens.size for batch in request.batches) * hidden * 4 * 5
    return stacks + work + states


def _widths(request: MergeRequest) -> tuple[int, int]:
    """(D, H) of the widest experts, from their output projections' sizes."""
    sizes = [(1, 1)]
    for tap in request.editor.resident.taps.layers:
        shapes = [
            request.editor.resident.tree.get(p.path).shape
            for p in tap.layer.expert_parameters()
            if p.path.endswith(".weight")
        ]
        sizes += [(max(s[1] for s in shapes), min(s[1] for s in shapes))]
    return max(d for d, _ in sizes), max(h for _, h in sizes)


def require_memory(request: MergeRequest) -> None:
    """Raise BudgetError with the figures if merging would not fit."""
    request.shop.require_room(
        estimate_bytes(request),
        "merging",
        "use fewer samples, fewer --max-similarity-tokens, or a quantised version of the model",
    )
