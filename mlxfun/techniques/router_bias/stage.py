"""Stages a router edit from a domain report (amplify) or from the active steering (bake).

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

from mlxfun.calibration.collect import batch_shape
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import batches, read_lines, tokenize
from mlxfun.data.options import DatasetOptions
from mlxfun.data.scan_reports import Identity, read_report, require_current
from mlxfun.editing.plans import BoostPlan
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.session import views
from mlxfun.session.workspace import Workshop
from mlxfun.steering import rules as steer
from mlxfun.steering.command_line import line_of
from mlxfun.steering.rules import Steering
from mlxfun.steering.sources import still_there
from mlxfun.techniques.prune import plan as planning
from mlxfun.techniques.router_bias.delta import LEAST_FACTOR, ROWS, Edit, Fold, folds, way_of
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from mlxfun.techniques.router_bias.reports import BoostReport, BoostRow
from mlxfun.text import option_words

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.hooks.routing import LayerTap

NEVER = -100.0
"""An additive mask at or below this means "never", which a fold reaches with far less."""

Addends = dict[int, "Array"]
"""{position: what is added to each live expert, float64 [live]}."""


def _edit(shop: Workshop) -> Edit:
    return Edit(shop.editor.resident, shop.modules(), shop.stored)


def _batches(shop: Workshop, data: DatasetOptions | None, what: str) -> list[Batch]:
    """The calibration text. Raises UsageError where it is needed and not named."""
    if data is None:
        raise UsageError(
            f"{what} folds boosts into router rows on this model, which takes calibration text; "
            "give --dataset, e.g. --dataset demo:mixed"
        )
    sequences = tokenize(read_lines(data), shop.tokenizer, data.max_tokens, shop.anatomy.vocabulary)
    return batches(sequences, *batch_shape(None, None))


# -- amplify ----------------------------------------------------------------------------------


def amplify(
    shop: Workshop, options: AmplifyOptions, command: str, ctx: Context = SILENT
) -> PlanReport:
    """Stage an amplification of the committed weights, in place of a staged plan.

    Raises UsageError, PlanError and StateError before any forward where they can be foreseen. A
    cancel or failure leaves the model, and a plan that was staged before, as they were.
    """
    _check(options)
    editor = shop.editor
    with editor.live("current"), editor.unsteered():
        addends, name, notes = _amplification(shop, options)
        edit = _edit(shop)
        fitted = _fitted(shop, edit, addends, options.data, "amplify", ctx)
        taps = editor.resident.taps.layers
        deltas = [edit.raised(taps[p], addends[p], fitted.get(p)) for p in addends]
        ways = {taps[p].layer.index: way_of(taps[p].layer, edit.modules) for p in addends}
        plan = BoostPlan(
            technique="amplify",
            keep=_live(shop),
            boosts=_boosts(shop, addends),
            ways=ways,
            about={
                "domain_name": name,
                "scale": options.scale,
                "threshold": options.threshold,
            },
            warnings=(*notes, *_fold_notes(ways, fitted)),
        )
    return _stage(shop, plan, deltas, fitted, command or _line("amplify", options))


def _check(options: AmplifyOptions) -> None:
    if not 0 < options.scale <= steer.MOST:
        raise UsageError(
            f"--scale {options.scale:g} must be above 0 and at most {steer.MOST:g}, where an expert "
            "is as good as forced"
        )
    if not 0 <= options.threshold < 1:
        raise UsageError(f"--threshold {options.threshold:g} must be at least 0 and below 1")


def _amplification(shop: Workshop, options: AmplifyOptions) -> tuple[Addends, str, tuple[str, ...]]:
    """Boosts of the report's domain experts, the domain's name, and notes."""
    anatomy, editor = shop.anatomy, shop.editor
    found = read_report(options.domain_map, "domain", anatomy.indices, anatomy.num_experts)
    now = Identity(editor.checkpoint_id, editor.state, editor.model_name)
    stale = require_current(
        found.path, found.identity, now, editor.history.root.state, options.allow_stale
    )
    boost = options.scale * np.maximum(0.0, found.composite - options.threshold) * found.more
    addends: Addends = {}
    gone = 0
    for tap in editor.resident.taps.layers:
        row = boost[tap.layer.position]
        live = row[list(tap.live)]
        gone += int((row > 0).sum() - (live > 0).sum())
        if (live > 0).any():
            addends[tap.layer.position] = live
    if not addends:
        raise PlanError(
            f"{found.path} leaves nothing to amplify: {int(found.more.sum())} domain experts, "
            f"{gone} of them pruned, the others not above --threshold {options.threshold:g}"
        )
    notes = [stale] if stale else []
    notes += [f"{gone} of the domain's experts are pruned and left out"] if gone else []
    return addends, found.domain_name, tuple(notes)


# -- bake -------------------------------------------------------------------------------------


def bake(shop: Workshop, options: BakeOptions, command: str, ctx: Context = SILENT) -> PlanReport:
    """Stage the steering in force as a permanent edit, in place of a staged plan.

    Steering is off on the candidate's side, back on the base's, and cleared when the plan is
    applied. Raises StateError without steering, PlanError for what a router cannot hold.
    """
    editor = shop.editor
    with editor.live("current"):
        # Of this side: while a bake is staged, its candidate runs without.
        steering = editor.steering
        if steering.empty:
            raise StateError("nothing is steered, so there is nothing to bake; run steer first")
        edit = _edit(shop)
        wished = _wished(shop, steering)
        require_bakeable(steering, [tap for tap, *_ in wished])
        with editor.unsteered():
            folded = {
                tap.layer.position: _constants(tap, steering, up, down)
                for tap, up, down in wished
                if tap.layer.bias_name is None
            }
            fitted = _fitted(shop, edit, folded, options.data, "bake", ctx)
            deltas, addends = _baked(edit, steering, wished, fitted)
        ways = {tap.layer.index: way_of(tap.layer, edit.modules) for tap, *_ in wished}
        plan = BoostPlan(
            technique="bake",
            keep=_live(shop),
            boosts=_boosts(shop, addends),
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
    report = _stage(shop, plan, deltas, fitted, command or _line("bake", options))
    editor.replace_steering(steering)
    # Set as it stands, whatever steps led there: reports, faders, experts pruned since.
    living, _ = still_there(steering, editor)
    editor.require_staged("bake").evidence = (line_of(views.steer_report(living)),)
    return report


Wished = list[tuple["LayerTap", "Array", "Array"]]
"""(layer, activated, deactivated), bool [router rows as sliced]."""


def _wished(shop: Workshop, steering: Steering) -> Wished:
    found: Wished = []
    for tap in shop.editor.resident.taps.layers:
        up, down = (
            steer.mask(tap, side.get(tap.layer.index, ()))
            for side in (steering.activate, steering.deactivate)
        )
        if up.any() or down.any() or steer.addends(steering, tap, up, down).any():
            found.append((tap, up, down))
    if not found:
        raise StateError("no expert that is steered is live, so there is nothing to bake")
    return found


def require_bakeable(steering: Steering, taps: Sequence[LayerTap]) -> None:
    """Raise PlanError naming what a router cannot hold, and why."""
    if steering.rule == "additive":
        return
    for tap in taps:
        up = steering.activate.get(tap.layer.index, ())
        if up and tap.layer.bias_name is None:
            raise PlanError(
                f"layer {tap.layer.index}: activating {list(up)} by SteerMoE's rule lifts them "
                "above each token's highest logit, which no constant in a router without a "
                "selection bias can do; steer them with --rule additive, then bake"
            )


def _constants(tap: LayerTap, steering: Steering, up: Array, down: Array) -> Array:
    """What bake adds to each live expert's logit; -inf stands for "never"."""
    count = len(tap.live)
    never = steering.rule != "additive" or steering.mask_value <= NEVER
    values = steer.addends(steering, tap, up, down)[:count]
    return np.where(down[:count], -np.inf, values) if never else values


def _baked(
    edit: Edit, steering: Steering, wished: Wished, fitted: dict[int, Fold]
) -> tuple[list[LayerDelta], Addends]:
    deltas, addends = [], {}
    for tap, up, down in wished:
        position, count = tap.layer.position, len(tap.live)
        if tap.layer.bias_name is not None:
            path = f"{tap.layer.bias_owner}.{tap.layer.bias_name}"
            own = edit.resident.tree.get(path)
            new = steer.baked_bias(steering, tap, own, up, down)
            deltas.append(edit.replaced(tap, path, new))
            addends[position] = np.array(new - own.astype(new.dtype), np.float64)[:count]
            continue
        values = _constants(tap, steering, up, down)
        fold = fitted.get(position)
        # Twice the widest span of any token's logits, through the smallest v.x there is.
        reach = 2e4 if fold is None else 2 * (fold.reach + 1) / max(fold.lowest, LEAST_FACTOR)
        addends[position] = np.where(np.isinf(values), -reach, values)
        deltas.append(edit.raised(tap, addends[position], fold))
    return deltas, addends


def _rounding_notes(edit: Edit, wished: Wished) -> tuple[str, ...]:
    """Where a selection bias is stored with less precision than steering worked with."""
    coarse = [
        tap.layer.index
        for tap, *_ in wished
        if tap.layer.bias_name is not None
        and edit.stored(f"{tap.layer.bias_owner}.{tap.layer.bias_name}").size < 4
        and tap.layer.grouped
    ]
    if not coarse:
        return ()
    shown = ", ".join(map(str, coarse))
    return (f"layers {shown}: the selection bias is stored in 16 bits, so its shift is rounded",)


# -- both -------------------------------------------------------------------------------------


def _live(shop: Workshop) -> dict[int, tuple[int, ...]]:
    return dict(zip(shop.anatomy.indices, shop.editor.committed, strict=True))


def _boosts(shop: Workshop, addends: Addends) -> dict[int, dict[int, float]]:
    taps = shop.editor.resident.taps.layers
    return {
        taps[p].layer.index: {
            expert: float(value)
            for expert, value in zip(taps[p].live, values, strict=True)
            if value != 0
        }
        for p, values in addends.items()
    }


def _fitted(
    shop: Workshop,
    edit: Edit,
    addends: Addends,
    data: DatasetOptions | None,
    what: str,
    ctx: Context,
) -> dict[int, Fold]:
    """Folds of the layers that need one, in one pass over the calibration text."""
    taps = [shop.editor.resident.taps.layers[p] for p in sorted(addends)]
    need = [tap for tap in taps if way_of(tap.layer, edit.modules) == ROWS]
    if not need:
        return {}
    carrier = Carrier(shop.model, shop.editor.resident.taps, _batches(shop, data, what), ctx)
    return folds(carrier, need, ctx)


def _fold_notes(ways: dict[int, str], fitted: dict[int, Fold]) -> tuple[str, ...]:
    if not fitted:
        kinds = " and ".join(sorted(set(ways.values())))
        return (f"held exactly, in the {kinds}",)
    worst = min(fitted.values(), key=lambda fold: fold.r2)
    return (
        f"folded into router rows of {len(fitted)} layers by least squares: R^2 at least "
        f"{worst.r2:.3f}, so a token gets {worst.mean:.2f} +- {worst.deviation:.2f} of a boost in "
        "the worst layer",
    )


def _stage(
    shop: Workshop,
    plan: BoostPlan,
    deltas: list[LayerDelta],
    fitted: dict[int, Fold],
    command: str,
) -> PlanReport:
    editor = shop.editor
    with editor.live("current"):
        before = shop.export().total_bytes()
    proposal = planning.Proposal(plan, Delta(tuple(deltas)), command, before)
    report = planning.stage(editor, shop.anatomy, proposal, shop.export)
    known = {f.name: getattr(report, f.name) for f in fields(PlanReport)}
    rows = tuple(_row(shop, plan, layer, fitted) for layer in plan.boosts)
    staged = editor.require_staged(plan.technique)
    staged.report = BoostReport(**known, rows=rows, subject=str(plan.about.get("domain_name", "")))
    return staged.report


def _row(shop: Workshop, plan: BoostPlan, layer: int, fitted: dict[int, Fold]) -> BoostRow:
    position = shop.anatomy.position_of(layer)
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
    data = options.data
    words = [name]
    if data is not None:
        words += ["--dataset", data.source]
        words += option_words(data, DatasetOptions(data.source))
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name != "data" and value != f.default:
            flag = "--" + f.name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
