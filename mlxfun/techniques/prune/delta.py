"""The delta of a prune: sliced router and an index map; experts are sliced on compact or save.

The sliced router (kilobytes) runs for real, and the experts moe maps its picks into the full
stack (`inds -> keep[inds]`). This is bitwise equal to the physically sliced model for every router
family; filling pruned experts with -inf is not, because grouped routers fill losing groups with
0.0 and because a softmax over fewer logits rounds differently.
"""

from __future__ import annotations

from mlxfun.errors import PlanError
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.delta import Delta, Resident
from mlxfun.model.slicing import prune_layer
from mlxfun.techniques.prune.plan import PrunePlan


def validate(plan: PrunePlan, resident: Resident) -> None:
    """Check a whole plan before anything is made. Raises PlanError naming layer and remedy."""
    layers = {moe.layer.index: moe for moe in resident.layers}
    unknown = sorted(set(plan.keep) - set(layers))
    if unknown:
        raise PlanError(
            f"the plan names decoder layers {unknown}, which are not MoE layers; "
            f"the MoE layers are {_span(tuple(layers))}"
        )
    missing = sorted(set(layers) - set(plan.keep))
    if missing:
        raise PlanError(f"the plan says nothing about MoE layers {_span(tuple(missing))}")
    if len({len(experts) for experts in plan.keep.values()}) > 1:
        raise PlanError(
            "the plan keeps different numbers of experts in different layers; stock loading "
            "holds one count for all of them, so keep the same number everywhere"
        )
    for index, experts in plan.keep.items():
        _validate_layer(layers[index].layer, layers[index].live, experts)


def _span(values: tuple[int, ...]) -> str:
    return f"{values[0]}..{values[-1]}" if len(values) > 4 else ", ".join(map(str, values))


def _validate_layer(layer: MoELayer, live: tuple[int, ...], keep: tuple[int, ...]) -> None:
    gone = sorted(set(keep) - set(live))
    if gone:
        raise PlanError(
            f"layer {layer.index}: experts {gone} are not there to keep; "
            f"{len(live)} of {layer.num_experts} are left"
        )
    if list(keep) != sorted(set(keep)):
        raise PlanError(f"layer {layer.index}: kept experts must be ascending, each once")
    if len(keep) < layer.top_k:
        raise PlanError(
            f"layer {layer.index}: {len(keep)} experts would be left, fewer than the "
            f"{layer.top_k} that every token uses; keep at least {layer.top_k}"
        )
    if layer.grouped:
        _validate_groups(layer, live, keep)


def _validate_groups(layer: MoELayer, live: tuple[int, ...], keep: tuple[int, ...]) -> None:
    # Groups are consecutive runs of the *live* experts, since the router reshapes its scores.
    size = len(live) // layer.n_group
    kept = set(keep)
    counts = [sum(e in kept for e in live[g * size : (g + 1) * size]) for g in range(layer.n_group)]
    if len(set(counts)) > 1 or counts[0] < 2 or layer.top_k > layer.topk_group * counts[0]:
        raise PlanError(
            f"layer {layer.index}: the router selects {layer.topk_group} of {layer.n_group} groups "
            f"of experts, so every group must keep the same number, at least 2, and "
            f"{layer.topk_group} groups must hold top-{layer.top_k}; the plan keeps {counts}"
        )


def prune_delta(plan: PrunePlan, resident: Resident) -> Delta:
    """The delta of a validated plan on the model as it is."""
    layers = []
    for moe in resident.layers:
        keep = plan.keep[moe.layer.index]
        if keep != moe.live:
            layers.append(prune_layer(resident, moe.layer, moe.live, keep))
    return Delta(tuple(layers))
