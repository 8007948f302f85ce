"""Pruning as a technique: proposes a prune from statistics, or with calibration forwards."""

from __future__ import annotations

import shlex

from mlxfun.context import SILENT, Context
from mlxfun.editing.plans import Provenance
from mlxfun.model.model_map import ModelMap
from mlxfun.techniques.prune import choose
from mlxfun.techniques.prune.calibrated import Decided, needs_forward, plan_with_forwards
from mlxfun.techniques.prune.delta import prune_delta, validate
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.super_experts import Spared
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace
from mlxfun.text import option_words


class Prune:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a dense model."""
        found.require_experts("prune")

    def plan(
        self, workspace: Workspace, options: PruneOptions, command: str = "", ctx: Context = SILENT
    ) -> Proposal:
        """Which experts stay. What mlxfun.techniques.prune.calibrated lists is measured on the text
        of the last collect. Raises UsageError, StateError, PlanError or BudgetError.
        """
        measures = needs_forward(options)
        spared = choose.super_experts(workspace, options, ctx)
        if measures:
            decided = plan_with_forwards(workspace, options, ctx, spared)
        else:
            decided = _by_statistics(workspace, options, spared)
        stats, plan = workspace.stats, decided.plan
        uses_stats = stats is not None and (plan.metric or options.refit_experts)
        return Proposal(
            plan,
            decided.delta,
            Provenance(
                command or command_line(options),
                source_commands=workspace.source_commands if uses_stats else (),
                made_on=stats.state if stats is not None and uses_stats else "",
                protected=decided.protected,
            ),
            choose.mass_lost(workspace, options, plan),
        )


def _by_statistics(workspace: Workspace, options: PruneOptions, spared: Spared | None) -> Decided:
    plan, protected = choose.choose(workspace, options, spared)
    with workspace.editor.live("base"):
        validate(plan, workspace.resident)
        return Decided(plan, prune_delta(plan, workspace.resident), protected)


def command_line(options: PruneOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    return shlex.join(["prune", *option_words(options, PruneOptions())])
