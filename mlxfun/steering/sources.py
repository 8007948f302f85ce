"""Steering rules from their sources: options, scan reports, configuration files.

A configuration is a JSON object with any of `activate` and `deactivate` ({layer: [experts]}),
`rule`, `boost_value` and `mask_value`. Its layers are positions among the MoE layers, as in scan
reports.

Several reports steer together. Where one wants an expert in and another wants it out, the later
one decides, as it would if the two were given one after the other in two commands; sets and
configurations, where a person has named the expert, decide before any report. The same order says
who comes first where a layer's router cannot carry all that is asked; of one report the weakest
are left out. Scores of different reports do not decide: their scales depend on the sets that were
compared. Whatever is left out is said in a notice. Two sets that contradict each other are a
mistake, and refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxfun.data.expert_lists import read_document, read_sets
from mlxfun.data.options import ExpertSets
from mlxfun.data.scan_reports import Identity, read_report, require_current
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.model.delta import Resident
from mlxfun.steering.checks import check
from mlxfun.steering.options import STEER_MODES, STEER_RULES, MapInForce, SteerOptions, SteerRule
from mlxfun.steering.report_experts import _take
from mlxfun.steering.reports import SteerReport
from mlxfun.steering.rules import FORCED, Steering
from mlxfun.steering.wish import Wish, cells_of
from mlxfun.tracing.standing import Placed, Standing

CONFIG_KEYS = ("activate", "deactivate", "rule", "boost_value", "mask_value", "layer_indices")
LOWEST = 1e9
"""How far down a mask may go: far below every logit, and still a number in every format."""


class SteeringHost(Protocol):
    """The model that is steered, see mlxfun.editing.editor.Editor."""

    steering: Steering
    standing: Standing | None

    @property
    def resident(self) -> Resident: ...
    @property
    def committed(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def root_state(self) -> str: ...
    def require_steerable(self) -> None:
        """Raise StateError while steering must not change."""


def changed(
    options: SteerOptions | SteerReport, host: SteeringHost, now: Identity
) -> tuple[Steering, tuple[str, ...]]:
    """What the options make of the steering in force, checked, and sentences for the user.

    A report, which is of steering that was in force before, is taken as it stands. Changes nothing.
    Raises PlanError, UsageError and StateError as `read` and `steering.check` do.
    """
    if isinstance(options, SteerReport):
        host.require_steerable()
        standing = _standing(options, host)
        return still_there(replace(_reported(options), interventions=standing), host)
    wish = read(options, host.resident, now, host.root_state)
    host.require_steerable()
    asked = Steering(wish.activate, wish.deactivate, levels=options.levels)
    before, gone = still_there(host.steering, host)
    settled = before.cells - asked.cells
    if options.clear:
        asked, gone = _repeated(asked, host)
        # What intervenes elsewhere than in routers is not the mixer's, which says all anew.
        before = Steering(interventions=host.steering.interventions)
        settled = asked.shared(host.steering)
    maps = _in_force(before, wish)
    wanted = replace(before.with_more(asked.activate, asked.deactivate), maps=maps, **wish.rule)
    checked, notices = check(wanted.with_levels(asked.levels), host.resident, settled)
    return checked, (*gone, *wish.notices, *unused_values(wish, checked.rule), *notices)


def _standing(report: SteerReport, host: SteeringHost) -> tuple[Placed, ...]:
    """The interventions of a report, whose values only the model has."""
    known = {} if host.standing is None else host.standing.known
    gone = [one.words for one in report.interventions if one.key not in known]
    if gone:
        raise StateError(f"{gone[0]} is not known to this session any more; put it in force again")
    return tuple(known[one.key] for one in report.interventions)


def _repeated(asked: Steering, host: SteeringHost) -> tuple[Steering, tuple[str, ...]]:
    """`asked` without what was in force and is pruned by now, and a sentence for each layer.

    The mixer and the keys say all that is in force anew, so what is repeated is not a new wish.
    """
    gone = host.steering.cells - still_there(host.steering, host)[0].cells
    _, said = still_there(asked.without(asked.cells - gone), host)
    return asked.without(gone), said


def _reported(report: SteerReport) -> Steering:
    return Steering(
        report.activated,
        report.deactivated,
        report.rule,
        report.boost_value,
        report.mask_value,
        report.levels,
        report.maps,
    )


def still_there(steering: Steering, host: SteeringHost) -> tuple[Steering, tuple[str, ...]]:
    """A steering without experts that a committed prune took away, and a sentence for
    each layer of them. Those of a staged plan stay: they are back when it is discarded."""
    living = dict(zip(host.resident.anatomy.indices, host.committed, strict=True))
    gone: dict[int, list[int]] = {}
    for layer, expert in sorted(steering.cells):
        if expert not in living[layer]:
            gone.setdefault(layer, []).append(expert)
    said = tuple(
        f"layer {ly}: experts {es} are pruned and no longer steered" for ly, es in gone.items()
    )
    cells = {(layer, expert) for layer, experts in gone.items() for expert in experts}
    return steering.without(cells), said


def _in_force(before: Steering, wish: Wish) -> tuple[MapInForce, ...]:
    """The reports that steer once the wish is granted.

    An expert that is named anew is no longer an older report's; one that was steered by hand the
    same way stays so, and is not a newer report's.
    """
    reported = {cell for use in before.maps for cell in use.cells}
    same = (cells_of(before.activate) & cells_of(wish.activate)) | (
        cells_of(before.deactivate) & cells_of(wish.deactivate)
    )
    new = {use.path for use in wish.maps}
    older = [_without(use, set(wish.asked_by)) for use in before.maps if use.path not in new]
    newer = [_without(use, same - reported) for use in wish.maps]
    return (*(use for use in older if use.cells), *newer)


def _without(use: MapInForce, cells: set[tuple[int, int]]) -> MapInForce:
    return replace(use, cells=tuple(cell for cell in use.cells if cell not in cells))


def unused_values(wish: Wish, rule: SteerRule) -> tuple[str, ...]:
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
    wish = Wish()
    wish.add((options.activate, options.deactivate), ("--activate", "--deactivate"))
    if options.config is not None:
        _read_config(options.config, wish, resident)
    _read_maps(options, wish, resident, (now, root))
    for name in ("rule", "boost_value", "mask_value"):
        value = getattr(options, name)
        if value is not None:
            wish.rule[name] = value
    _check_values(wish)
    return wish


def _read_maps(
    options: SteerOptions, wish: Wish, resident: Resident, where: tuple[Identity, str]
) -> None:
    """Add the reports, the last one first: who comes later goes before."""
    anatomy = resident.anatomy
    read = []
    for use in options.maps:
        found = read_report(use.path, use.kind, anatomy.indices, anatomy.num_experts)
        read.append(
            (use, found, require_current(use.path, found.identity, *where, options.allow_stale))
        )
    told: list[str] = []
    for use, found, warning in reversed(read):
        said = [*([warning] if warning else []), *found.notices]
        taken = _take(use, found, wish, resident)
        wish.maps = (taken.use, *wish.maps)
        wish.add(taken.sets, (str(use.path), str(use.path)))
        told = [*said, *taken.notices, *told]
    wish.notices += told


def _check_words(options: SteerOptions) -> None:
    rule = options.rule or STEER_RULES[0]
    words: list[tuple[str, str, tuple[str, ...]]] = [("--rule", rule, STEER_RULES)]
    for use in options.maps:
        if use.kind not in STEER_MODES:
            raise UsageError(f"a map of kind {use.kind!r}: choose one of {', '.join(STEER_MODES)}")
        words.append((f"--{use.kind}-mode", use.mode, STEER_MODES[use.kind]))
        if use.most is not None and use.most < 1:
            raise UsageError(f"--max-experts {use.most} must be at least 1")
    for name, value, known in words:
        if value not in known:
            raise UsageError(f"{name} {value!r}: choose one of {', '.join(known)}")


def _check_values(wish: Wish) -> None:
    for name, sign, most in (("boost_value", 1, FORCED), ("mask_value", -1, LOWEST)):
        value = wish.rule.get(name)
        if value is not None and not 0 < value * sign <= most:
            side = "above 0 and at most" if sign > 0 else "below 0 and at least"
            raise UsageError(f"{name} {value:g} must be {side} {sign * most:g}")


def _read_config(path: Path, wish: Wish, resident: Resident) -> None:
    anatomy = resident.anatomy
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
    wish.add((sets[0], sets[1]), (str(path), str(path)))
    _config_rule(path, document, wish)


def _config_rule(path: Path, document: dict[str, Any], wish: Wish) -> None:
    for key in ("boost_value", "mask_value"):
        value = document.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{path}: {key} {value!r} is not a number")
        try:
            wish.rule[key] = float(value)
        except OverflowError as error:
            raise PlanError(f"{path}: {key} is a number beyond all bounds") from error
    rule = document.get("rule")
    if rule is not None:
        if rule not in STEER_RULES:
            raise PlanError(f"{path}: rule {rule!r}: choose one of {', '.join(STEER_RULES)}")
        wish.rule["rule"] = rule
