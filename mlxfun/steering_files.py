"""From options, scan reports and configuration files to what is to be steered.

A configuration is a JSON object with any of `activate` and `deactivate` ({layer: [experts]}),
`rule`, `boost_value` and `mask_value`. Its layers are positions among the MoE layers, as in scan
reports. A report names as many experts as it found; what a layer's router cannot carry is left
out, weakest first, with a notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from mlxfun.deltas import Resident
from mlxfun.editor import Editor
from mlxfun.errors import PlanError, UsageError
from mlxfun.expert_lists import read_document, read_sets
from mlxfun.options import STEER_RULES, ExpertSets, SteerOptions
from mlxfun.scan_reports import Found, Identity, read_report, require_current
from mlxfun.selection import Mask
from mlxfun.steering import Steering, check
from mlxfun.taps import LayerTap

SAFETY_MODES = ("safe", "unsafe")
DOMAIN_MODES = ("boost", "suppress")
CONFIG_KEYS = ("activate", "deactivate", "rule", "boost_value", "mask_value", "layer_indices")


@dataclass(slots=True)
class Wish:
    """What is asked for: sets, the fields of Steering that change, sentences for the user."""

    activate: ExpertSets
    deactivate: ExpertSets
    rule: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add(self, activate: ExpertSets, deactivate: ExpertSets) -> None:
        """Join sets to what is wished. Raises PlanError where two sources contradict."""
        for mine, new in ((self.activate, activate), (self.deactivate, deactivate)):
            for layer, experts in new.items():
                mine[layer] = tuple(dict.fromkeys((*mine.get(layer, ()), *experts)))
        for layer, experts in self.activate.items():
            both = sorted(set(experts) & set(self.deactivate.get(layer, ())))
            if both:
                raise PlanError(
                    f"layer {layer}: experts {both} are asked to be both activated and "
                    "deactivated; leave one source out"
                )


def changed(
    options: SteerOptions, editor: Editor, now: Identity
) -> tuple[Steering, tuple[str, ...]]:
    """What the options make of the steering in force, checked, and sentences for the user.

    Changes nothing. Raises PlanError, UsageError and StateError as `read` and `steering.check` do.
    """
    wish = read(options, editor.resident, now, editor.history.root.state)
    editor.require_steerable()
    wanted = Steering() if options.clear else editor.steering
    wanted = replace(wanted.with_more(wish.activate, wish.deactivate), **wish.rule)
    checked, notices = check(wanted.with_levels(options.levels), editor.resident)
    return checked, (*wish.notices, *unused_values(wish, checked.rule), *notices)


def unused_values(wish: Wish, rule: str) -> tuple[str, ...]:
    """A notice when values are given that the rule then in force does not use."""
    given = [name for name in ("boost_value", "mask_value") if name in wish.rule]
    if not given or rule == "additive":
        return ()
    return tuple(f"without --rule additive, {name} changes nothing" for name in given)


def read(options: SteerOptions, resident: Resident, now: Identity, root: str) -> Wish:
    """All sources of `options` together. now: the present weights; root: the checkpoint's state.

    Raises UsageError, PlanError for what cannot be read or carried out, and StateError for a
    report of another state unless it is allowed.
    """
    _check_words(options)
    wish = Wish({}, {})
    wish.add(options.activate, options.deactivate)
    anatomy = resident.taps.anatomy
    for path, kind in ((options.safety_map, "safety"), (options.domain_map, "domain")):
        if path is None:
            continue
        found = read_report(path, kind, anatomy.indices, anatomy.num_experts)
        warning = require_current(path, found.identity, now, root, options.allow_stale)
        wish.notices += [warning] if warning else []
        up, down = _sides(found, kind, options)
        _take(wish, found, (up, down), resident, options.max_experts)
    if options.config is not None:
        _read_config(options.config, wish, resident)
    for name in ("rule", "boost_value", "mask_value"):
        value = getattr(options, name)
        if value is not None:
            wish.rule[name] = value
    _check_values(wish)
    return wish


def _check_words(options: SteerOptions) -> None:
    for name, value, known in (
        ("--safety-mode", options.safety_mode, SAFETY_MODES),
        ("--domain-mode", options.domain_mode, DOMAIN_MODES),
        ("--rule", options.rule or STEER_RULES[0], STEER_RULES),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r}: choose one of {', '.join(known)}")
    if options.max_experts is not None:
        if options.max_experts < 1:
            raise UsageError(f"--max-experts {options.max_experts} must be at least 1")
        if options.safety_map is None and options.domain_map is None:
            raise UsageError("--max-experts limits a map: give --safety-map or --domain-map")


def _check_values(wish: Wish) -> None:
    for name, sign in (("boost_value", 1), ("mask_value", -1)):
        value = wish.rule.get(name)
        if value is not None and not (isfinite(value) and value * sign > 0):
            side = "above" if sign > 0 else "below"
            raise UsageError(f"{name} {value:g} must be a finite number {side} 0")


def _sides(found: Found, kind: str, options: SteerOptions) -> tuple[Mask, Mask]:
    """(activate, deactivate), bool [L, E]."""
    nothing = np.zeros_like(found.more)
    if kind == "domain":
        boost = options.domain_mode == "boost"
        return (found.more, nothing) if boost else (nothing, found.more)
    safe = options.safety_mode == "safe"
    return (found.more, found.less) if safe else (found.less, found.more)


def _take(
    wish: Wish, found: Found, sides: tuple[Mask, Mask], resident: Resident, most: int | None
) -> None:
    """Add what the routers can carry of a report, strongest |composite| first."""
    up, down = sides
    named = int((up | down).sum())
    if not named:
        wish.notices.append(f"{found.path} names no experts to steer: it has no effect")
    left = most if most is not None else named
    chosen: tuple[ExpertSets, ExpertSets] = ({}, {})
    over: dict[str, dict[int, list[int]]] = {"pruned": {}, "over": {}}
    for row, expert in _strongest_first(found, up | down):
        if left == 0:
            break
        tap = resident.taps.layers[row]
        layer, side = tap.layer.index, 0 if up[row, expert] else 1
        taken = (*chosen[side].get(layer, ()), expert)
        if expert not in tap.live:
            over["pruned"].setdefault(layer, []).append(expert)
        elif not (_may_activate, _may_deactivate)[side](tap, taken):
            over["over"].setdefault(layer, []).append(expert)
        else:
            chosen[side][layer] = taken
            left -= 1
    for layer, experts in over["pruned"].items():
        wish.notices.append(f"layer {layer}: experts {sorted(experts)} are pruned; left out")
    for layer, experts in over["over"].items():
        top_k = next(t.layer.top_k for t in resident.taps.layers if t.layer.index == layer)
        wish.notices.append(
            f"layer {layer}: each token uses {top_k} experts; of those the report names, the "
            f"weakest, {sorted(experts)}, are left out"
        )
    wish.add(*chosen)


def _strongest_first(found: Found, named: Mask) -> list[tuple[int, int]]:
    rows, experts = np.nonzero(named)
    order = np.argsort(-np.abs(found.composite[rows, experts]), kind="stable")
    return [(int(rows[i]), int(experts[i])) for i in order]


def _groups(tap: LayerTap) -> Callable[[int], int]:
    size = len(tap.live) // tap.layer.n_group
    return lambda expert: tap.live.index(expert) // size


def _may_activate(tap: LayerTap, experts: tuple[int, ...]) -> bool:
    """Whether each token could use all of them."""
    if len(experts) > tap.layer.top_k:
        return False
    return not tap.layer.grouped or len(set(map(_groups(tap), experts))) <= tap.layer.topk_group


def _may_deactivate(tap: LayerTap, experts: tuple[int, ...]) -> bool:
    """Whether the router still has enough experts without them, whichever groups win."""
    layer = tap.layer
    if not layer.grouped:
        return len(tap.live) - len(experts) >= layer.top_k
    gone = [_groups(tap)(expert) for expert in experts]
    size = len(tap.live) // layer.n_group
    left = sorted(size - gone.count(group) for group in range(layer.n_group))
    return sum(left[: layer.topk_group]) >= layer.top_k


def _read_config(path: Path, wish: Wish, resident: Resident) -> None:
    anatomy = resident.taps.anatomy
    document = read_document(path)
    unknown = sorted(set(document) - set(CONFIG_KEYS))
    if unknown:
        raise PlanError(
            f"{path} has the unknown keys {', '.join(map(repr, unknown))}; a steering "
            f"configuration has {', '.join(CONFIG_KEYS)}"
        )
    sets: list[ExpertSets] = []
    for key in ("activate", "deactivate"):
        found = {key: document.get(key, {}), "layer_indices": document.get("layer_indices")}
        mask = read_sets(path, found, key, anatomy.indices, anatomy.num_experts)
        sets.append(
            {
                layer: tuple(int(e) for e in np.flatnonzero(experts))
                for layer, experts in zip(anatomy.indices, mask, strict=True)
                if experts.any()
            }
        )
    if not any(sets):
        wish.notices.append(f"{path} names no experts to steer: it has no effect")
    wish.add(*sets)
    _config_rule(path, document, wish)


def _config_rule(path: Path, document: dict[str, Any], wish: Wish) -> None:
    for key in ("boost_value", "mask_value"):
        value = document.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{path}: {key} {value!r} is not a number")
        wish.rule[key] = float(value)
    rule = document.get("rule")
    if rule is not None:
        if rule not in STEER_RULES:
            raise PlanError(f"{path}: rule {rule!r}: choose one of {', '.join(STEER_RULES)}")
        wish.rule["rule"] = rule
