"""Whether a model can carry out a steering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite

from mlxfun.errors import PlanError
from mlxfun.model.delta import Resident
from mlxfun.model.live_experts import LiveExperts
from mlxfun.steering.rules import Cells, Steering

MOST = 100.0
"""The largest level of a fader; beyond, an expert is as good as forced."""


def check(
    steering: Steering, resident: Resident, settled: Cells = frozenset()
) -> tuple[Steering, tuple[str, ...]]:
    """Validate against the live experts; cap activations at top-k, with a notice.

    settled: what was in force before and is not asked for now. It may not be live on this side,
    and a layer in which nothing else is steered stays as it is. Raises PlanError for an unknown
    layer or expert, a contradiction, or more deactivations than the router can do without.
    """
    taps = {moe.layer.index: moe for moe in resident.layers}
    notices: list[str] = []
    activate: dict[int, tuple[int, ...]] = {}
    for layer in sorted({*steering.activate, *steering.deactivate, *steering.levels}):
        if layer not in taps:
            known = resident.anatomy.indices
            raise PlanError(
                f"decoder layer {layer} is not an MoE layer; they are {known[0]}..{known[-1]}"
            )
        up, down = steering.activate.get(layer, ()), steering.deactivate.get(layer, ())
        levels = steering.levels.get(layer, {})
        asked = [e for e in (*up, *down, *levels) if (layer, e) not in settled]
        if asked:
            _check_there(taps[layer], asked)
            _check_levels(taps[layer], levels)
            up, said = _carried(taps[layer], up, down)
            notices += said
        if up:
            activate[layer] = up
    return replace(steering, activate=activate, deactivate=dict(steering.deactivate)), tuple(
        notices
    )


def _carried(
    moe: LiveExperts, up: tuple[int, ...], down: tuple[int, ...]
) -> tuple[tuple[int, ...], list[str]]:
    """What the router can carry of `up`, beside what sleeps while it is not live; notices."""
    top_k, notices = moe.layer.top_k, []
    awake, barred = (tuple(e for e in side if e in moe.live) for side in (up, down))
    _check_experts(moe, awake, barred)
    if len(awake) > top_k:
        notices.append(
            f"layer {moe.layer.index}: {len(awake)} experts activated but each token uses "
            f"{top_k}; taking {list(awake[:top_k])}"
        )
        up = tuple(e for e in up if e not in awake[top_k:])
        awake = awake[:top_k]
    return up, [*notices, *_check_groups(moe, awake, barred)]


def _check_levels(moe: LiveExperts, levels: Mapping[int, float]) -> None:
    for expert, level in levels.items():
        if not isfinite(level) or abs(level) > MOST:
            raise PlanError(
                f"layer {moe.layer.index}, expert {expert}: the level {level:g} is beyond "
                f"{MOST:g}; use --activate or --deactivate to force it"
            )


def _check_experts(moe: LiveExperts, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    layer = moe.layer
    both = sorted(set(up) & set(down))
    if both:
        raise PlanError(f"layer {layer.index}: experts {both} are both activated and deactivated")
    left = len(moe.live) - len(down)
    if left < layer.top_k:
        raise PlanError(
            f"layer {layer.index}: deactivating {len(down)} of {len(moe.live)} experts leaves "
            f"{left}, fewer than the {layer.top_k} each token uses; deactivate at most "
            f"{len(moe.live) - layer.top_k}"
        )


def _check_there(moe: LiveExperts, experts: Iterable[int]) -> None:
    layer = moe.layer
    for expert in experts:
        if not 0 <= expert < layer.num_experts:
            raise PlanError(
                f"layer {layer.index} has no expert {expert}; they are 0..{layer.num_experts - 1}"
            )
        if expert not in moe.live:
            raise PlanError(
                f"layer {layer.index}: expert {expert} is pruned in the live model; flip to "
                "current or discard if that is staged only, undo if it is applied"
            )


def _check_groups(moe: LiveExperts, up: tuple[int, ...], down: tuple[int, ...]) -> list[str]:
    layer = moe.layer
    if not layer.grouped:
        return []
    size = len(moe.live) // layer.n_group
    group = {expert: place // size for place, expert in enumerate(moe.live)}
    wanted = {group[expert] for expert in up}
    if len(wanted) > layer.topk_group:
        raise PlanError(
            f"layer {layer.index}: the activated experts lie in {len(wanted)} groups but a token "
            f"uses {layer.topk_group}; choose experts of at most {layer.topk_group} groups"
        )
    left = [size - sum(group[e] == g for e in down) for g in range(layer.n_group)]
    if sum(sorted(left)[: layer.topk_group]) < layer.top_k:
        raise PlanError(
            f"layer {layer.index}: after the deactivations the groups hold {left} experts, and "
            f"{layer.topk_group} of them may not hold the {layer.top_k} each token uses; "
            "deactivate fewer in one group"
        )
    if up and layer.bias_name is None and layer.facts.score == "sigmoid":
        return [f"layer {layer.index}: its groups may still exclude an activated expert"]
    return []
