"""The protocol of a technique, and the one way in which its plan is staged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.editing.editor import Live
from mlxfun.editing.plans import Plan, Provenance
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.delta import Delta
from mlxfun.model.model_map import ModelMap
from mlxfun.techniques.workspace import Workspace

Options = TypeVar("Options", contravariant=True)
Describe = Callable[[PlanReport], PlanReport]


def _as_it_is(report: PlanReport) -> PlanReport:
    return report


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan, the delta that carries it out, and where it comes from: nothing of it is live yet.

    mass_lost: {decoder layer: share of the summed metric that goes with the pruned experts}, None
    without statistics. describe: adds the technique's own figures to the common report.
    """

    plan: Plan
    delta: Delta
    provenance: Provenance
    mass_lost: Mapping[int, float] | None = None
    describe: Describe = _as_it_is


class Technique(Protocol[Options]):
    """A way of changing weights. Each one is a folder of `mlxfun.techniques`."""

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a model that the technique cannot work on, e.g. a dense one."""

    def plan(
        self, workspace: Workspace, options: Options, command: str = "", ctx: Context = SILENT
    ) -> Proposal:
        """Decide on the committed weights without steering, and make the delta.

        command: the line that asked for it, "" where the options have to tell it. A cancel or
        failure leaves the model, and a plan that is staged, as they were. What can be seen to be
        impossible is raised ahead of the work.
        """


def stage(workspace: Workspace, proposal: Proposal) -> PlanReport:
    """Swap a proposal in, in place of a staged plan, and report it. The candidate is live after it.

    Raises PlanError for a delta that changes nothing; a plan that was staged before stays then.
    """
    editor, plan = workspace.editor, proposal.plan
    require_change(proposal)
    with editor.live("base"):
        bytes_before = workspace.export().total_bytes()
    if editor.staged is not None:
        editor.discard()
    base = editor.committed

    def report(state: str) -> PlanReport:
        return described(workspace, proposal, base, bytes_before, state)

    return editor.stage(plan, proposal.delta, proposal.provenance, report).report


def require_change(proposal: Proposal) -> None:
    """Raise PlanError for a delta that changes nothing."""
    if not proposal.delta.layers:
        raise PlanError(f"the plan changes nothing: {_unchanged(proposal.plan)}")


def described(
    workspace: Workspace, proposal: Proposal, base: Live, bytes_before: int, state: str
) -> PlanReport:
    """The report of a proposal, which must be live. base: the experts before it; state: with it."""
    plan = proposal.plan
    return proposal.describe(
        PlanReport(
            technique=plan.technique,
            metric=plan.metric,
            strategy=plan.strategy,
            experts_before=len(base[0]) if base else 0,
            experts_after=min(map(len, plan.keep.values()), default=0),
            kept=plan.working,
            pruned=removed_by(workspace.anatomy, base, plan),
            bytes_before=bytes_before,
            bytes_after=workspace.export().total_bytes(),
            delta_bytes=proposal.delta.bytes,
            mass_lost=None if proposal.mass_lost is None else dict(proposal.mass_lost),
            state_after=state,
            warnings=plan.warnings,
            peak_bytes=int(mx.get_peak_memory()),
        )
    )


def _unchanged(plan: Plan) -> str:
    if plan.technique in ("prune", "merge"):
        return "every expert is kept"
    return "what it changes is below the precision of the weights"


def removed_by(anatomy: MoEMap, base: Live, plan: Plan) -> dict[int, tuple[int, ...]]:
    """{decoder layer: experts of `base` that the router cannot choose any more}."""
    kept = plan.working
    return {
        index: tuple(e for e in live if e not in set(kept[index]))
        for index, live in zip(anatomy.indices, base, strict=True)
    }
