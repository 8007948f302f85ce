"""Which experts of a scan's report are steered, and which are left out and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.data.options import ExpertSets
from mlxfun.data.scan_reports import Found
from mlxfun.model.delta import Resident
from mlxfun.model.live_experts import LiveExperts
from mlxfun.steering.options import MapInForce, ScanMap
from mlxfun.steering.wish import Wish, cells_of

DONE = ("activated", "deactivated")


def _sides(found: Found, use: ScanMap) -> tuple[Mask, Mask]:
    """(activate, deactivate), bool [L, E]."""
    nothing = np.zeros_like(found.more)
    if use.kind == "domain" and use.mode == "suppress-general":
        return nothing, found.less
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
    theirs = tuple(sorted((cells_of(chosen[0]) | cells_of(chosen[1])) - by_hand))
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
