"""Amplify and bake as techniques: router edits from a domain report, or from the active steering.
amplify: the experts of a domain report are raised by

    boost = scale x max(0, composite score - threshold)

bake: what the steering does is written into the routers. A router with a selection bias holds
either rule exactly. One without holds what is constant: the additive rule, and SteerMoE's
deactivation as an addend that no token overcomes. SteerMoE's activation is no constant (it follows
the highest logit of every token), so such a router cannot hold it, and bake says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import read_sequences
from mlxfun.data.options import DatasetOptions, dataset_words
from mlxfun.data.scan_reports import read_report, require_current
from mlxfun.editing.earlier import present
from mlxfun.editing.plans import Provenance
from mlxfun.editing.reports import PlanReport, extended
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.model_map import ModelMap
from mlxfun.steering import rules as steer
from mlxfun.steering.checks import MOST
from mlxfun.steering.command_line import line_of
from mlxfun.steering.rules import Steering
from mlxfun.steering.sources import still_there
from mlxfun.techniques.router_bias.delta import LEAST_FACTOR, ROWS, Edit, Fold, folds, way_of
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from mlxfun.techniques.router_bias.plan import BoostPlan
from mlxfun.techniques.router_bias.reports import BoostReport, BoostRow, BoostWay
from mlxfun.techniques.router_bias.scale import scale_notes, usual_scale
from mlxfun.techniques.router_bias.share import Boosts, scale_for_share
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.model.live_experts import LiveExperts

NEVER = -100.0
"""An additive mask at or below this means "never", which a fold reaches with far less."""

Addends = dict[int, "Array"]
"""{position: what is added to each live expert, float64 [live]}."""


def _edit(workspace: Workspace) -> Edit:
    return Edit(workspace.resident, workspace.stored)


def _batches(
    workspace: Workspace, data: DatasetOptions | None, what: str, ctx: Context
) -> list[Batch]:
    """The calibration text. Raises UsageError where it is needed and not named."""
    if data is None:
        raise UsageError(
            f"{what} folds boosts into router rows on this model, which takes calibration text; "
            "give --dataset, e.g. --dataset demo:mixed"
        )
    vocabulary = workspace.anatomy.vocabulary
    sequences = read_sequences(data, workspace.tokenizer, vocabulary, ctx.reading())
    return batch_size(workspace.model, workspace.anatomy).split(sequences)


# -- amplify ----------------------------------------------------------------------------------


class Amplify:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a dense model."""
        found.require_experts("amplify")

    def plan(
        self,
        workspace: Workspace,
        options: AmplifyOptions,
        command: str = "",
        ctx: Context = SILENT,
    ) -> Proposal:
        """Raise the experts of a domain report. Raises UsageError, PlanError and StateError before
        any forward where they can be foreseen."""
        return _amplify(workspace, options, command, ctx)


def _amplify(workspace: Workspace, options: AmplifyOptions, command: str, ctx: Context) -> Proposal:
    scale = usual_scale(workspace) if options.scale is None else options.scale
    _check(options, scale)
    editor = workspace.editor
    with editor.live("base"), editor.unsteered():
        addends, name, notes = _amplification(workspace, options, scale)
        edit = _edit(workspace)
        fitted = _fitted(workspace, edit, addends, options.data, "amplify", ctx)
        layers = edit.resident.layers
        if options.share is not None:
            text = _batches(workspace, options.data, "amplify --share", ctx)
            boosts = Boosts(edit, addends, fitted, scale)
            found = scale_for_share(workspace, text, boosts, options.share, ctx)
            addends = {p: row * (found.scale / scale) for p, row in addends.items()}
            scale, notes = found.scale, (*notes, found.note)
        deltas = [edit.raised(layers[p], addends[p], fitted.get(p)) for p in addends]
        ways = {layers[p].layer.index: way_of(layers[p].layer, edit.modules) for p in addends}
        plan = BoostPlan(
            technique="amplify",
            keep=_live(workspace),
            boosts=_boosts(workspace, addends),
            ways=ways,
            about={"domain_name": name, "scale": scale, "threshold": options.threshold},
            warnings=(*notes, *scale_notes(workspace, scale), *_fold_notes(ways, fitted)),
        )
    provenance = Provenance(command or _line("amplify", options))
    return _proposal(workspace, plan, deltas, fitted, provenance)


def _check(options: AmplifyOptions, scale: float) -> None:
    if options.share is not None and options.scale is not None:
        raise UsageError(f"--scale {scale:g} and --share both say how much: give one")
    if options.share is not None and not 0 < options.share <= MOST:
        raise UsageError(f"--share {options.share:g} must be above 0, e.g. +10%")
    if options.share is not None and options.data is None:
        raise UsageError("--share is measured on text: give that of the domain as --dataset")
    if not 0 < scale <= MOST:  # at the most an expert is as good as forced
        raise UsageError(f"--scale {scale:g} must be above 0 and at most {MOST:g}")
    if not 0 <= options.threshold < 1:
        raise UsageError(f"--threshold {options.threshold:g} must be at least 0 and below 1")


def _amplification(
    workspace: Workspace, options: AmplifyOptions, scale: float
) -> tuple[Addends, str, tuple[str, ...]]:
    """Boosts of the report's domain experts, the domain's name, and notes."""
    anatomy, editor = workspace.anatomy, workspace.editor
    found = read_report(options.domain_map, "domain", anatomy.indices, anatomy.num_experts)
    stale = require_current(
        found.path, found.identity, present(editor), editor.root_state, options.allow_stale
    )
    boost = scale * np.maximum(0.0, found.composite - options.threshold) * found.more
    addends: Addends = {}
    gone = 0
    for moe in workspace.resident.layers:
        row = boost[moe.layer.position]
        live = row[list(moe.live)]
        gone += int((row > 0).sum() - (live > 0).sum())
        if (live > 0).any():
            addends[moe.layer.position] = live
    if not addends:
        raise PlanError(
            f"{found.path} leaves nothing to amplify: {int(found.more.sum())} domain experts, {gone} "
            f"of them pruned, the others not above --threshold {options.threshold:g}"
        )
    notes = [*([stale] if stale else []), *found.notices]
    notes += [f"{gone} of the domain's experts are pruned and left out"] if gone else []
    return addends, found.domain_name, tuple(notes)


# -- bake -------------------------------------------------------------------------------------


class Bake:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a dense model."""
        found.require_experts("bake steering into")

    def plan(
        self, workspace: Workspace, options: BakeOptions, command: str = "", ctx: Context = SILENT
    ) -> Proposal:
        """The steering in force as a permanent edit: off on the candidate's side, in force on the
        base's, and cleared when the plan is applied. Raises StateError without steering, PlanError
        for what a router cannot hold.
        """
        return _bake(workspace, options, command, ctx)


def _bake(workspace: Workspace, options: BakeOptions, command: str, ctx: Context) -> Proposal:
    editor = workspace.editor
    with editor.live("base"):
        # Of this side: while a bake is staged, its candidate runs without.
        steering = editor.steering
        if steering.empty:
            raise StateError("no experts are steered, so there is nothing to bake; run steer first")
        if steering.interventions:
            raise StateError(
                f"{steering.interventions[0].described} is in force, and bake writes the steering of "
                "experts only; take it away with intervene --clear first"
            )
        edit = _edit(workspace)
        wished = _wished(workspace, steering)
        require_bakeable(steering, [moe for moe, *_ in wished])
        with editor.unsteered():
            folded = {
                moe.layer.position: _constants(moe, steering, up, down)
                for moe, up, down in wished
                if moe.layer.bias_name is None
            }
            fitted = _fitted(workspace, edit, folded, options.data, "bake", ctx)
            deltas, addends = _baked(edit, steering, wished, fitted)
        ways = {moe.layer.index: way_of(moe.layer, edit.modules) for moe, *_ in wished}
        plan = BoostPlan(
            technique="bake",
            keep=_live(workspace),
            boosts=_boosts(workspace, addends),
            ways=ways,
            about={
                "rule": steering.rule,
                "activate": {str(k): list(v) for k, v in steering.activate.items()},
                "deactivate": {str(k): list(v) for k, v in steering.deactivate.items()},
                "levels": {
                    str(k): {str(e): x for e, x in v.items()} for k, v in steering.levels.items()
                },
            },
            warnings=(*_rounding_notes(edit, wished), *_fold_notes(ways, fitted)),
        )
    # Set as it stands, whatever steps led there: reports, biases, experts pruned since.
    living, _ = still_there(steering, editor)
    provenance = Provenance(
        command or _line("bake", options),
        source_commands=(line_of(living.report()),),
        steering=steering,
    )
    return _proposal(workspace, plan, deltas, fitted, provenance)


Wished = list[tuple["LiveExperts", "Array", "Array"]]
"""(layer, activated, deactivated), bool [router rows as sliced]."""


def _wished(workspace: Workspace, steering: Steering) -> Wished:
    found: Wished = []
    for moe in workspace.resident.layers:
        up, down = (
            steer.mask(moe, side.get(moe.layer.index, ()))
            for side in (steering.activate, steering.deactivate)
        )
        if up.any() or down.any() or steer.addends(steering, moe, up, down).any():
            found.append((moe, up, down))
    if not found:
        raise StateError("no expert that is steered is live, so there is nothing to bake")
    return found


def require_bakeable(steering: Steering, taps: Sequence[LiveExperts]) -> None:
    """Raise PlanError naming what a router cannot hold, and why."""
    if steering.rule == "additive":
        return
    for moe in taps:
        up = steering.activate.get(moe.layer.index, ())
        if up and moe.layer.bias_name is None:
            raise PlanError(
                f"layer {moe.layer.index}: activating {list(up)} by SteerMoE's rule lifts them "
                "above each token's highest logit, which no constant in a router without a "
                "selection bias can do; steer them with --rule additive, then bake"
            )


def _constants(moe: LiveExperts, steering: Steering, up: Array, down: Array) -> Array:
    """What bake adds to each live expert's logit; -inf stands for "never"."""
    count = len(moe.live)
    never = steering.rule != "additive" or steering.mask_value <= NEVER
    values = steer.addends(steering, moe, up, down)[:count]
    return np.where(down[:count], -np.inf, values) if never else values


def _baked(
    edit: Edit, steering: Steering, wished: Wished, fitted: dict[int, Fold]
) -> tuple[list[LayerDelta], Addends]:
    deltas, addends = [], {}
    for moe, up, down in wished:
        position, count = moe.layer.position, len(moe.live)
        if moe.layer.bias_name is not None:
            path = f"{moe.layer.bias_owner}.{moe.layer.bias_name}"
            own = edit.resident.tree.get(path)
            new = steer.baked_bias(steering, moe, own, up, down)
            deltas.append(edit.replaced(moe, path, new))
            addends[position] = np.array(new - own.astype(new.dtype), np.float64)[:count]
            continue
        values = _constants(moe, steering, up, down)
        fold = fitted.get(position)
        # Twice the widest span of any token's logits, through the smallest v.x there is.
        reach = 2e4 if fold is None else 2 * (fold.reach + 1) / max(fold.lowest, LEAST_FACTOR)
        addends[position] = np.where(np.isinf(values), -reach, values)
        deltas.append(edit.raised(moe, addends[position], fold))
    return deltas, addends


def _rounding_notes(edit: Edit, wished: Wished) -> tuple[str, ...]:
    """Where a selection bias is stored less precisely than steering worked."""
    coarse = [
        moe.layer.index
        for moe, *_ in wished
        if moe.layer.bias_name is not None
        and edit.stored(f"{moe.layer.bias_owner}.{moe.layer.bias_name}").size < 4
        and moe.layer.grouped
    ]
    if not coarse:
        return ()
    shown = ", ".join(map(str, coarse))
    return (f"layers {shown}: the selection bias is stored in 16 bits, so its shift is rounded",)


# -- both -------------------------------------------------------------------------------------


def _live(workspace: Workspace) -> dict[int, tuple[int, ...]]:
    return dict(zip(workspace.anatomy.indices, workspace.editor.committed, strict=True))


def _boosts(workspace: Workspace, addends: Addends) -> dict[int, dict[int, float]]:
    layers = workspace.resident.layers
    return {
        layers[p].layer.index: {
            expert: float(value)
            for expert, value in zip(layers[p].live, values, strict=True)
            if value != 0
        }
        for p, values in addends.items()
    }


def _fitted(
    workspace: Workspace,
    edit: Edit,
    addends: Addends,
    data: DatasetOptions | None,
    what: str,
    ctx: Context,
) -> dict[int, Fold]:
    """Folds of the layers that need one, in one pass over the calibration text."""
    layers = [workspace.resident.layers[p] for p in sorted(addends)]
    need = [moe for moe in layers if way_of(moe.layer, edit.modules) == ROWS]
    if not need:
        return {}
    carrier = Carrier(workspace.model, workspace.taps, _batches(workspace, data, what, ctx), ctx)
    return folds(carrier, need, ctx)


def _fold_notes(ways: dict[int, BoostWay], fitted: dict[int, Fold]) -> tuple[str, ...]:
    if not fitted:
        return (f"held exactly, in the {' and '.join(sorted(set(ways.values())))}",)
    worst = min(fitted.values(), key=lambda fold: fold.r2)
    return (
        f"folded into router rows of {len(fitted)} layers by least squares: R^2 at least "
        f"{worst.r2:.3f}, so a token gets {worst.mean:.2f} +- {worst.deviation:.2f} of a boost in "
        "the worst layer",
    )


def _proposal(
    workspace: Workspace,
    plan: BoostPlan,
    deltas: list[LayerDelta],
    fitted: dict[int, Fold],
    provenance: Provenance,
) -> Proposal:
    rows = tuple(_row(workspace, plan, layer, fitted) for layer in plan.boosts)
    subject = str(plan.about.get("domain_name", ""))

    def describe(report: PlanReport) -> PlanReport:
        return extended(BoostReport, report, rows=rows, subject=subject)

    return Proposal(plan, Delta(tuple(deltas)), provenance, describe=describe)


def _row(workspace: Workspace, plan: BoostPlan, layer: int, fitted: dict[int, Fold]) -> BoostRow:
    position = workspace.anatomy.position_of(layer)
    fold = fitted.get(position) if position is not None else None
    return BoostRow(
        layer=layer,
        way=plan.ways[layer],
        boosts=plan.boosts[layer],
        r2=1.0 if fold is None else fold.r2,
        realised=1.0 if fold is None else fold.mean,
        deviation=0.0 if fold is None else fold.deviation,
    )


def _line(name: str, options: AmplifyOptions | BakeOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = [name, *(dataset_words(options.data) if options.data is not None else ())]
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name != "data" and value != f.default:
            flag = "--" + f.name.replace("_", "-")
            shown = f"+{100 * value:.10g}%" if f.name == "share" else str(value)
            words += [flag] if value is True else [flag, shown]
    return shlex.join(words)
