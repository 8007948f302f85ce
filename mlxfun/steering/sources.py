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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.data.expert_lists import read_document, read_sets
from mlxfun.data.options import ExpertSets
from mlxfun.data.scan_reports import Found, Identity, read_report, require_current
from mlxfun.errors import PlanError, UsageError
from mlxfun.model.delta import Resident
from mlxfun.model.live_experts import LiveExperts
from mlxfun.steering.options import MAP_MODES, STEER_RULES, MapInForce, ScanMap, SteerOptions
from mlxfun.steering.reports import SteerReport
from mlxfun.steering.rules import FORCED, Steering, check

CONFIG_KEYS = ("activate", "deactivate", "rule", "boost_value", "mask_value", "layer_indices")
DONE = ("activated", "deactivated")
LOWEST = 1e9
"""How far down a mask may go: far below every logit, and still a number in every format."""


@dataclass(slots=True)
class Wish:
    """What is asked for: sets, the fields of Steering that change, sentences for the user.

    maps: the reports among the sources. asked_by: (layer, expert) -> who named it first.
    """

    activate: ExpertSets = field(default_factory=dict)
    deactivate: ExpertSets = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    maps: tuple[MapInForce, ...] = ()
    asked_by: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, sets: tuple[ExpertSets, ExpertSets], by: tuple[str, str]) -> None:
        """Join (activate, deactivate) to what is wished. by: who asks for each.

        Raises PlanError where they contradict what is wished already.
        """
        for mine, new, who in zip((self.activate, self.deactivate), sets, by, strict=True):
            for layer, experts in new.items():
                mine[layer] = tuple(dict.fromkeys((*mine.get(layer, ()), *experts)))
                for expert in experts:
                    self.asked_by.setdefault((layer, expert), who)
        for layer, experts in self.activate.items():
            both = sorted(set(experts) & set(self.deactivate.get(layer, ())))
            if both:
                raise PlanError(
                    f"layer {layer}: experts {both} are asked to be both activated and "
                    "deactivated; leave one source out"
                )

    def side(self, number: int) -> ExpertSets:
        """What is activated (0) or deactivated (1)."""
        return (self.activate, self.deactivate)[number]


class SteeringHost(Protocol):
    """The model that is steered, see mlxfun.editing.editor.Editor."""

    steering: Steering

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
        return still_there(_reported(options), host)
    wish = read(options, host.resident, now, host.root_state)
    host.require_steerable()
    asked = Steering(wish.activate, wish.deactivate, levels=options.levels)
    before, gone = still_there(host.steering, host)
    settled = before.cells - asked.cells
    if options.clear:
        asked, gone = _repeated(asked, host)
        before, settled = Steering(), asked.shared(host.steering)
    maps = _in_force(before, wish)
    wanted = replace(before.with_more(asked.activate, asked.deactivate), maps=maps, **wish.rule)
    checked, notices = check(wanted.with_levels(asked.levels), host.resident, settled)
    return checked, (*gone, *wish.notices, *unused_values(wish, checked.rule), *notices)


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
        f"layer {ly}: experts {es} are pruned, so steering lets go of them"
        for ly, es in gone.items()
    )
    cells = {(layer, expert) for layer, experts in gone.items() for expert in experts}
    return steering.without(cells), said


def _in_force(before: Steering, wish: Wish) -> tuple[MapInForce, ...]:
    """The reports that steer once the wish is granted.

    An expert that is named anew is no longer an older report's; one that was steered by hand the
    same way stays so, and is not a newer report's.
    """
    reported = {cell for use in before.maps for cell in use.cells}
    same = (_cells(before.activate) & _cells(wish.activate)) | (
        _cells(before.deactivate) & _cells(wish.deactivate)
    )
    new = {use.path for use in wish.maps}
    older = [_without(use, set(wish.asked_by)) for use in before.maps if use.path not in new]
    newer = [_without(use, same - reported) for use in wish.maps]
    return (*(use for use in older if use.cells), *newer)


def _cells(sets: Mapping[int, tuple[int, ...]]) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, experts in sets.items() for expert in experts}


def _without(use: MapInForce, cells: set[tuple[int, int]]) -> MapInForce:
    return replace(use, cells=tuple(cell for cell in use.cells if cell not in cells))


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
        said = [warning] if warning else []
        taken = _take(use, found, wish, resident)
        wish.maps = (taken.use, *wish.maps)
        wish.add(taken.sets, (str(use.path), str(use.path)))
        told = [*said, *taken.notices, *told]
    wish.notices += told


def _check_words(options: SteerOptions) -> None:
    rule = options.rule or STEER_RULES[0]
    words = [("--rule", rule, STEER_RULES)]
    for use in options.maps:
        if use.kind not in MAP_MODES:
            raise UsageError(f"a map of kind {use.kind!r}: choose one of {', '.join(MAP_MODES)}")
        words.append((f"--{use.kind}-mode", use.mode, MAP_MODES[use.kind]))
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


def _sides(found: Found, use: ScanMap) -> tuple[Mask, Mask]:
    """(activate, deactivate), bool [L, E]."""
    nothing = np.zeros_like(found.more)
    if use.kind == "domain":
        return (found.more, nothing) if use.mode == "boost" else (nothing, found.more)
    return (found.more, found.less) if use.mode == "safe" else (found.less, found.more)


class _Taken(NamedTuple):
    """What is taken of a report. sets: (activate, deactivate)."""

    sets: tuple[ExpertSets, ExpertSets]
    use: MapInForce
    notices: list[str]


def _take(use: ScanMap, found: Found, wish: Wish, resident: Resident) -> _Taken:
    """What the routers can carry of a report beside the wish, strongest |composite| first."""
    up, down = _sides(found, use)
    order = [(resident.layers[row], e) for row, e in _strongest_first(found, up | down)]
    names = tuple(sorted((moe.layer.index, expert) for moe, expert in order))
    left = use.most if use.most is not None else len(names)
    by_hand = wish.asked_by.keys() - {cell for other in wish.maps for cell in other.cells}
    chosen: tuple[ExpertSets, ExpertSets] = ({}, {})
    out: dict[_Reason, list[int]] = {}
    for moe, expert in order:
        if left == 0:
            break
        side = 0 if up[moe.layer.position, expert] else 1
        reason = _obstacle(moe, side, expert, wish, chosen[side])
        if reason is not None:
            out.setdefault(reason, []).append(expert)
            continue
        layer = moe.layer.index
        chosen[side][layer] = (*chosen[side].get(layer, ()), expert)
        left -= 1
    notices = [] if names else [f"{found.path} names no experts to steer: it has no effect"]
    notices += [_left_out(found, *item, resident) for item in sorted(out.items())]
    theirs = tuple(sorted((_cells(chosen[0]) | _cells(chosen[1])) - by_hand))
    in_force = MapInForce(str(use.path), use.kind, use.mode, use.most, names, theirs)
    return _Taken(chosen, in_force, notices)


class _Reason(NamedTuple):
    """Why experts of a report are left out. why: 0 pruned, 1 who else is against it, 2 too many."""

    why: int
    layer: int
    side: int
    who: str = ""


def _obstacle(
    moe: LiveExperts, side: int, expert: int, wish: Wish, chosen: ExpertSets
) -> _Reason | None:
    """What keeps a report's expert from being steered to `side`, None for nothing."""
    layer = moe.layer.index
    if expert in wish.side(1 - side).get(layer, ()):
        return _Reason(1, layer, side, wish.asked_by[layer, expert])
    if expert not in moe.live:
        return _Reason(0, layer, side)
    wished = wish.side(side).get(layer, ())
    if expert in wished:
        return None
    # What a person asked for is checked later; here only living experts count.
    beside = tuple(e for e in (*wished, *chosen.get(layer, ())) if e in moe.live)
    together = tuple(dict.fromkeys((*beside, expert)))
    fits = (_may_activate, _may_deactivate)[side](moe, together)
    return None if fits else _Reason(2, layer, side)


def _left_out(found: Found, reason: _Reason, experts: list[int], resident: Resident) -> str:
    """The sentence that says so."""
    why, layer, side, who = reason
    if why == 0:
        return f"layer {layer}: experts {sorted(experts)} are pruned; left out"
    if why == 1:
        mine, other = DONE[side], DONE[1 - side]
        return (
            f"layer {layer}: experts {sorted(experts)} are {other} as {who} asks, not {mine} as "
            f"{found.path} does"
        )
    top_k = next(t.layer.top_k for t in resident.layers if t.layer.index == layer)
    return (
        f"layer {layer}: each token uses {top_k} experts; of those {found.path} names, the "
        f"weakest, {sorted(experts)}, are left out"
    )


def _strongest_first(found: Found, named: Mask) -> list[tuple[int, int]]:
    rows, experts = np.nonzero(named)
    order = np.argsort(-np.abs(found.composite[rows, experts]), kind="stable")
    return [(int(rows[i]), int(experts[i])) for i in order]


def _groups(moe: LiveExperts) -> Callable[[int], int]:
    size = len(moe.live) // moe.layer.n_group
    return lambda expert: moe.live.index(expert) // size


def _may_activate(moe: LiveExperts, experts: tuple[int, ...]) -> bool:
    """Whether each token could use all of them."""
    if len(experts) > moe.layer.top_k:
        return False
    return not moe.layer.grouped or len(set(map(_groups(moe), experts))) <= moe.layer.topk_group


def _may_deactivate(moe: LiveExperts, experts: tuple[int, ...]) -> bool:
    """Whether the router still has enough experts without them, whichever groups win."""
    layer = moe.layer
    if not layer.grouped:
        return len(moe.live) - len(experts) >= layer.top_k
    gone = [_groups(moe)(expert) for expert in experts]
    size = len(moe.live) // layer.n_group
    left = sorted(size - gone.count(group) for group in range(layer.n_group))
    return sum(left[: layer.topk_group]) >= layer.top_k


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
