"""Edits that go straight to disk: a new model directory is written, the resident model stays.

For models of which both sides of an edit do not fit in memory. Every layer's new tensors are set
aside on disk as soon as they are made (`ResidentModel.hold`), and read back one at a time while the
model is written. What is written is that of stage, apply and save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.context import SILENT, Context
from mlxfun.editing.reports import WrittenReport
from mlxfun.model.delta import Delta
from mlxfun.model.places import FromFile, Source
from mlxfun.session.workspace import SessionWorkspace
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.distil.options import DistilOptions
from mlxfun.techniques.distil.technique import Distil
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.merge.technique import Merge
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.narrow.technique import Narrow
from mlxfun.techniques.prune import manual_mask
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.technique import Prune
from mlxfun.techniques.technique import Proposal, Technique, described, require_change

UNCOMPARED = (
    "logits were not compared, since the edited model is not in memory; load what was saved to "
    "evaluate it"
)

ToDisk = PruneOptions | MergeOptions | NarrowOptions | DistilOptions | AblateOptions
"""Options of edits that can go straight to a new model directory."""

STRAIGHT: dict[type, Callable[[], Technique[Any]]] = {
    PruneOptions: Prune,
    MergeOptions: Merge,
    NarrowOptions: Narrow,
    DistilOptions: Distil,
}

WHOLE = {
    MergeOptions: "merge",
    NarrowOptions: "narrow",
    DistilOptions: "distil",
    AblateOptions: "abliterate",
}
"""What needs every expert in memory, by its options."""


def write_edit(
    workspace: SessionWorkspace,
    technique: Technique[Any],
    options: Any,
    to: SaveOptions,
    command: str = "",
    ctx: Context = SILENT,
) -> WrittenReport:
    """Plan, and write the result to `to`. Weights, steering, history and a staged plan are as
    before, whatever happens; what was at the destination too, unless this ends well.

    Raises what planning and saving do.
    """
    with workspace.straight_to(to):
        proposal = technique.plan(workspace, options, command, ctx)
        require_change(proposal)
        return _write(workspace, proposal, to, ctx)


def _write(
    workspace: SessionWorkspace, proposal: Proposal, to: SaveOptions, ctx: Context
) -> WrittenReport:
    editor = workspace.editor
    hollow, aside = _placeholders(proposal.delta)
    with editor.live("base"), editor.unsteered():
        base, size = editor.committed, workspace.export().total_bytes()
        # Shapes, expert counts and identities are those of the edited model now; no forward may run.
        with workspace.resident.trial(hollow):
            plan = described(workspace, proposal, base, size, editor.live_state)
            plan = replace(plan, straight=True)
            manual_mask.require_even(plan)
            node = editor.history.beyond(plan.state_after, proposal.provenance, proposal.plan)
            saved = workspace.save(workspace.export(aside), to, ctx, node)
    common = {field.name: getattr(saved, field.name) for field in fields(SaveReport)}
    common["notices"] = (*saved.notices, UNCOMPARED)
    return WrittenReport(**common, plan=plan)


def _placeholders(delta: Delta) -> tuple[Delta, dict[str, FromFile]]:
    """A delta with placeholders for the tensors that are on disk, and where each of them is."""
    layers, aside = [], {}
    for layer in delta.layers:
        arrays: dict[str, Source] = dict(layer.arrays)
        for path, source in layer.arrays.items():
            if isinstance(source, FromFile):
                arrays[path], aside[path] = source.placeholder(), source
        layers.append(replace(layer, arrays=arrays))
    return Delta(tuple(layers)), aside
