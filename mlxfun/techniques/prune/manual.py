"""Manual pruning: a selection of single experts, changed step by step and staged after each
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.expert_notation import spell
from mlxfun.editing.plans import Provenance
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.model.anatomy.masks import mask_of, sets_mask
from mlxfun.model.model_map import ModelMap
from mlxfun.techniques.prune import choose, manual_mask
from mlxfun.techniques.prune.delta import prune_delta
from mlxfun.techniques.prune.options import SelectOptions
from mlxfun.techniques.prune.plan import PrunePlan
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array


class Select:
    """See mlxfun.techniques.technique.Technique.

    A selection with different numbers per layer is staged all the same, so that it can be measured
    and talked to; apply refuses it.
    """

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a dense model."""
        found.require_experts("select")

    def plan(
        self, workspace: Workspace, options: SelectOptions, command: str = "",
        ctx: Context = SILENT,
    ) -> Proposal:  # fmt: skip
        """Change the selection of the staged plan, or begin one. `command` is not used: history and
        recipe tell the selection as it stands, not the steps that made it.

        Raises UsageError or PlanError for what the model could not run.
        """
        field = _field(workspace, options)
        pruned = manual_mask.picked(field, selected(workspace), options)
        if not pruned.any():
            raise UsageError("select: no expert is picked; name some with --drop L:E,...")
        broken = field.unrunnable(pruned)
        if broken:
            raise PlanError(f"{broken}; keep more of them, or `select --even` evens it out")
        return _proposal(workspace, field, pruned, options)

    def empties(self, workspace: Workspace, options: SelectOptions) -> bool:
        """Whether the change leaves no expert selected although a plan is staged."""
        if workspace.editor.staged is None:
            return False
        field = _field(workspace, options)
        return not manual_mask.picked(field, selected(workspace), options).any()


def selected(workspace: Workspace) -> Array:
    """The experts that the staged plan prunes, bool [L, E]. Raises StateError for another plan."""
    staged = workspace.editor.staged
    if staged is None:
        return workspace.protected_or_none(None)
    if staged.plan.technique != "prune":
        raise StateError(
            f"{staged.plan.technique} is staged ({staged.command}), which is not made of "
            "single experts: apply or discard it before you select"
        )
    return sets_mask(workspace.anatomy, staged.report.pruned)


def _field(workspace: Workspace, options: SelectOptions) -> manual_mask.Field:
    stats, layers, editor = workspace.stats, workspace.anatomy.layers, workspace.editor
    ranking = options.even or options.below is not None or options.n_prune is not None
    stale = stats is not None and stats.state != editor.state
    if stats is not None and ranking and stale and not options.allow_stale:
        raise StateError(
            f"the statistics were made on state {stats.state}, the model is at "
            f"{editor.state}; collect again, or use them knowingly with --allow-stale"
        )
    if stats is not None and ranking:
        choose.require_tokens(stats)
    return manual_mask.Field(
        layers=workspace.anatomy.indices,
        alive=mask_of(workspace.anatomy, editor.committed),
        # --clear starts from nothing: the staged plan's own protection goes with it.
        protected=workspace.protected_or_none(
            editor.history.protected if options.clear else editor.protected
        ),
        scores=stats.score(options.metric) if stats is not None else None,
        top_k=tuple(layer.top_k for layer in layers),
        groups=tuple(layer.n_group for layer in layers),
        open_groups=tuple(layer.topk_group for layer in layers),
    )


def _proposal(
    workspace: Workspace, field: manual_mask.Field, pruned: Array, options: SelectOptions
) -> Proposal:
    editor, stats = workspace.editor, workspace.stats
    keep = dict(zip(field.layers, _kept(field.alive & ~pruned), strict=True))
    metric = options.metric if field.scores is not None else None
    plan = PrunePlan(keep, metric, "hand", _warnings(field, pruned))
    source_commands: tuple[str, ...] = ()
    made_on = ""
    if stats is not None and metric:
        source_commands, made_on = workspace.source_commands, stats.state
    staged = editor.staged
    if staged is not None and not options.clear and staged.provenance.source_commands:
        source_commands = staged.provenance.source_commands
        made_on = staged.provenance.made_on
    with editor.live("base"):
        delta = prune_delta(plan, workspace.resident)
    losses, mass_lost = manual_mask.lost(field, pruned), None
    if losses is not None:
        mass_lost = {ly: float(x) for ly, x in zip(field.layers, losses, strict=True)}
    command = manual_mask.change_line(field.layers, np.zeros_like(pruned), pruned)
    provenance = Provenance(command, source_commands, made_on, protected=field.protected)
    return Proposal(plan, delta, provenance, mass_lost)


def _kept(mask: Array) -> list[tuple[int, ...]]:
    return [tuple(int(e) for e in np.flatnonzero(row)) for row in mask]


def _warnings(field: manual_mask.Field, pruned: Array) -> tuple[str, ...]:
    out = []
    uneven = manual_mask.unevenness(field.layers, manual_mask.counts(pruned))
    if uneven:
        out.append(f"uneven, so it cannot be applied yet: {uneven}; `select --even` evens it out")
    protected = manual_mask.sets_of(field.layers, pruned & field.protected)
    if protected:
        out.append(f"protected experts are pruned: {spell(protected)}")
    return tuple(out)
