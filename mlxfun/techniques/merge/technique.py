"""Merging as a technique: chooses centroids, checks memory, proposes merged layers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration.collect import collect
from mlxfun.calibration.options import METRICS
from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import read_sequences
from mlxfun.data.expert_lists import Masks, read_expert_list, read_maps
from mlxfun.data.options import DatasetOptions, dataset_words
from mlxfun.editing.editor import Live
from mlxfun.editing.plans import Provenance
from mlxfun.errors import PlanError, UsageError
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.delta import Resident
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.device.memory import Need
from mlxfun.model.model_map import ModelMap
from mlxfun.techniques.merge.alignment import (
    OVERSAMPLING,
    PAIR_BYTES,
    RANK,
    UNPACKED_BYTES,
)
from mlxfun.techniques.merge.delta import Merger
from mlxfun.techniques.merge.options import ALIGNMENTS, SIMILARITY_MODES, MergeOptions
from mlxfun.techniques.prune import selection
from mlxfun.techniques.prune.calibrated import HeldOut, candidates_of
from mlxfun.techniques.prune.choose import constraints_of, stale_maps
from mlxfun.techniques.prune.constraints import Constraints
from mlxfun.techniques.prune.delta import validate
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.plan import PrunePlan
from mlxfun.techniques.refit.layerwise import (
    Observed,
    Recalibration,
    by_output_error,
    keep_by_output_error,
)
from mlxfun.techniques.refit.sizes import WIDE, Sizes
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace, collected_text
from mlxfun.text import option_words

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch, Tokens
    from mlxfun.model.live_experts import LiveExperts


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What a merge is planned from. batches: of the calibration set. saliency: see MergeOptions."""

    workspace: Workspace
    options: MergeOptions
    batches: Sequence[Batch]
    saliency: RoutingStats | None = None

    @classmethod
    def of(cls, workspace: Workspace, options: MergeOptions, ctx: Context = SILENT) -> MergeRequest:
        """The request, its data set read. Raises DatasetError, StateError."""
        sequences = _sequences(workspace, options.data, ctx)
        size = batch_size(workspace.model, workspace.anatomy)
        given = options.saliency
        saliency = None
        if given is not None:
            saliency = workspace.read_statistics(given, options.allow_stale)
            saliency.ranking_score(options.metric)  # before the work, if it cannot be chosen by
        return cls(workspace, options, size.split(sequences), saliency)

    @property
    def anatomy(self) -> MoEMap:
        """Of the resident model."""
        return self.workspace.anatomy

    @property
    def resident(self) -> Resident:
        """Its parameters."""
        return self.workspace.resident

    @property
    def committed(self) -> Live:
        """The live experts of the committed side."""
        return self.workspace.editor.committed

    def constraints(self, maps: Masks, traffic: Array | None = None) -> Constraints:
        """What the choice of centroids must respect."""
        return constraints_of(self.anatomy, self.committed, maps, traffic)


def _sequences(workspace: Workspace, data: DatasetOptions | None, ctx: Context) -> Sequence[Tokens]:
    """The text that experts are compared on, without what judges the merge afterwards."""
    if data is None:
        return collected_text(workspace, "merge compares experts on")
    vocabulary = workspace.anatomy.vocabulary
    read = read_sequences(data, workspace.tokenizer, vocabulary, ctx.reading())
    held = workspace.held_out.sequences if workspace.held_out is not None else ()
    known = {sequence.tobytes() for sequence in held}
    return [sequence for sequence in read if sequence.tobytes() not in known] or read


class Merge:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a dense model."""
        found.require_experts("merge")

    def plan(
        self, workspace: Workspace, options: MergeOptions, command: str = "", ctx: Context = SILENT
    ) -> Proposal:
        """Merge layer by layer. Raises UsageError, PlanError and BudgetError ahead of the work
        where they can be foreseen."""
        request = MergeRequest.of(workspace, options, ctx)
        editor = workspace.editor
        _check(options)
        with editor.live("base"), editor.unsteered():
            kept_back = options.auto and workspace.held_out is not None
            moved = HeldOut.of(workspace) if kept_back else None
            merger = Merger(workspace, options, request.saliency, moved)
            merger.require_mergeable()
            maps = read_maps(options, request.anatomy.indices, request.anatomy.num_experts)
            stale = stale_maps(editor, options)
            require_memory(request, rehearse(request, maps))
            chosen = _Chooser(request, maps, _fixed(request, maps, ctx))
            plan, delta = merger.run(request.batches, chosen.choose, ctx, chosen.by_error)
        notes = (*maps.warnings, *stale, *dict.fromkeys(chosen.warnings), *plan.warnings)
        return Proposal(
            replace(plan, warnings=notes),
            delta,
            Provenance(
                command or command_line(options),
                workspace.source_commands if options.data is None else (),
                made_on=workspace.editor.state if options.data is None else "",
                protected=maps.protect,
            ),
        )


def command_line(options: MergeOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = ["merge", *(dataset_words(options.data) if options.data is not None else ())]
    return shlex.join(words + option_words(options, MergeOptions(options.data)))


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
        self._whole = request.constraints(maps)
        self.warnings: list[str] = []

    def choose(self, position: int, stats: RoutingStats) -> tuple[int, ...]:
        """See mlxfun.techniques.merge.delta.Choose."""
        if self._fixed is not None:
            return self._fixed[self._request.anatomy.indices[position]]
        constraints = self._whole.of_layer(position, stats.sums["freq"])
        scores = stats.score(self._request.options.metric)
        chosen = selection.select(scores, constraints, self._options)
        self.warnings += chosen.warnings
        return chosen.keep[0]

    def by_error(
        self, again: Recalibration, moe: LiveExperts, observed: Observed, ctx: Context
    ) -> tuple[int, ...] | None:
        """See mlxfun.techniques.merge.delta.ByError: None where the centroids are given, and for a
        router without a formula."""
        if self._fixed is not None:
            return None
        try:
            problem = by_output_error(again, self._request.resident, moe, observed, ctx)
        except PlanError:
            return None
        candidates = candidates_of(self._whole, self._options, moe)
        count = self._options.n_prune or 0
        return keep_by_output_error(problem, moe.live, count, candidates, ctx)


def rehearse(request: MergeRequest, maps: Masks) -> int:
    """How many centroids each layer keeps. Raises what the options would raise in some layer after
    minutes."""
    options = request.options
    if options.expert_list is None:
        constraints = request.constraints(maps)
        chosen = selection.select(np.zeros(constraints.shape), constraints, _prune_options(options))
        kept = len(chosen.keep[0])
    else:
        kept = len(next(iter(_listed(request, maps).values())))
    live = len(request.committed[0])
    if (live - kept) > kept * (options.max_group_size - 1):
        raise PlanError(
            f"{kept} centroids with --max-group-size {options.max_group_size} take at most "
            f"{kept * (options.max_group_size - 1)} of the {live - kept} experts to merge; raise "
            "it, or merge fewer"
        )
    return kept


def _fixed(request: MergeRequest, maps: Masks, ctx: Context) -> dict[int, tuple[int, ...]] | None:
    """Centroids that are known before the first layer is merged, None if each layer decides."""
    options = request.options
    if options.expert_list is not None:
        return _listed(request, maps)
    if not options.model_wide:
        return None
    # One set of indices for all layers needs every layer's saliency first, so that of the
    # unmerged model has to do.
    stats = request.saliency
    if stats is None:
        empty = RoutingStats.empty(request.anatomy.indices, request.anatomy.num_experts)
        stats, cancelled = collect(
            request.workspace.model, request.workspace.taps, request.batches, empty, ctx
        )
        if cancelled:
            ctx.check()
    constraints = request.constraints(maps, stats.sums["freq"])
    chosen = selection.select(stats.score(options.metric), constraints, _prune_options(options))
    return dict(zip(request.anatomy.indices, chosen.keep, strict=True))


def _listed(request: MergeRequest, maps: Masks) -> dict[int, tuple[int, ...]]:
    options, anatomy = request.options, request.anatomy
    if options.expert_list is None:
        raise RuntimeError("no list was given")
    keep = read_expert_list(options.expert_list, anatomy.indices, anatomy.num_experts)
    validate(PrunePlan(keep), request.resident)
    if all(keep[i] == live for i, live in zip(anatomy.indices, request.committed, strict=True)):
        raise PlanError(f"{options.expert_list} names every expert as a centroid: nothing to merge")
    constraints = request.constraints(maps)
    selection.adopt(keep, constraints, _prune_options(options))
    return keep


# -- memory -----------------------------------------------------------------------------------


def estimate(request: MergeRequest, kept: int) -> Need:
    """What merging to `kept` experts a layer needs on top of the resident model.

    Held throughout: what the pass carries (mlxfun.techniques.refit.sizes), and the neurons of all
    experts for the tokens that they are compared on, [E, t, N]. What `auto` judges on held-out text
    sizes its batches by what is free, and is not counted.
    """
    options, resident = request.options, request.resident
    size = Sizes.of(request.workspace, request.batches)
    gone = max(size.experts - kept, 0)
    stacks = []
    for moe in resident.layers:
        arrays = [resident.tree.get(p.path) for p in moe.layer.expert_parameters()]
        rows = len(resident.stack[moe.layer.position])
        stacks.append(sum(a.nbytes for a in arrays) * kept // rows)
    judged = options.auto or options.refit_experts
    compared = min(options.max_similarity_tokens, size.tokens)
    neurons = size.experts * compared * size.width * size.state
    held = size.states + compared * size.hidden * size.state + (size.outputs if judged else 0)
    looking = max(size.forward, 3 * neurons, neurons + _matching(options, size, compared, gone))
    # Beside the rows that are combined, a stack of those that stay is copied.
    combining = neurons + size.mixed(min(kept, gone)) + max(stacks, default=0) // 3
    making = combining
    if options.auto:
        # The best so far is held while the next is made; before that, backward elimination.
        looking = max(looking, neurons + size.inputs + size.elimination())
        combining += max(stacks, default=0)
        making = combining
    if options.refit_experts:
        fitted = max(size.refit(kept), size.refitted(kept))
        beside = max(stacks, default=0) + neurons if options.auto else 0
        making = max(combining, size.inputs + size.outputs + fitted + beside)
    return Need(tuple(stacks), held + looking, held + making)


def _matching(options: MergeOptions, size: Sizes, compared: int, pairs: int) -> int:
    """The rows of all projections reduced, or unit activations with the cost matrices of pairs."""
    if options.alignment == "none":
        return 0
    tokens = min(options.max_alignment_tokens, compared)
    at_once = min(pairs, max(1, PAIR_BYTES // (16 * size.width**2)))
    units = 4 * size.experts * tokens * size.width * WIDE
    costs = at_once * (2 * tokens * size.width * WIDE + 16 * size.width**2)
    # What the rows are reduced to, twice.
    reduced = 2 * size.experts * size.width * (RANK + OVERSAMPLING) * WIDE
    return max(size.reduced(UNPACKED_BYTES) + reduced, units + costs)


def require_memory(request: MergeRequest, kept: int) -> None:
    """Raise BudgetError with the figures if merging would not fit."""
    request.workspace.require_room(
        estimate(request, kept),
        "merging",
        "use fewer samples, fewer --max-similarity-tokens, or a quantised version of the model",
    )
