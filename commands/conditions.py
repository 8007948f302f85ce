"""When a command applies: conditions on a view of the session, each giving the reason why not.

They predict what the engine would refuse with StateError, so that palettes and completions can show
it beforehand; the engine decides. Nothing here imports Click.
"""

from __future__ import annotations

from collections.abc import Callable

from mlxfun.session.reports import SessionView

Condition = Callable[[SessionView], str | None]
"""The reason why a command does not apply to a view, None if it does."""


def always(_view: SessionView) -> str | None:
    """Applies to every state."""
    return None


def served(view: SessionView) -> str | None:
    """Needs a server beside the front end."""
    return None if view.serving else "nothing is served: start with mlxfun-shell MODEL --serve"


def with_model(view: SessionView) -> str | None:
    """Needs a resident model."""
    return None if view.model else "no model is loaded: type load PATH, or load demo"


def with_experts(view: SessionView) -> str | None:
    """Needs a resident model that has experts."""
    if view.model and not view.model.moe_layers:
        return f"{view.model.model_type} is a dense model: it has no experts"
    return with_model(view)


def _on_disk(view: SessionView) -> bool:
    """Whether some experts are on disk."""
    return view.heat is not None and view.heat.held is not None


def partly_resident(view: SessionView) -> str | None:
    """Needs a model of which some experts are on disk."""
    whole = "the whole model is in memory: load it with --resident auto, a size, or --capacity"
    return with_experts(view) or (None if _on_disk(view) else whole)


def profiled(view: SessionView) -> str | None:
    """Needs a count of how much each expert is used: by slots, or by collect."""
    return with_experts(view) if _on_disk(view) else with_stats(view)


def whole(view: SessionView) -> str | None:
    """Needs a model that is whole in memory."""
    needed = "some experts are on disk: load the model with --resident all"
    return with_model(view) or (needed if _on_disk(view) else None)


def whole_experts(view: SessionView) -> str | None:
    """Needs experts, all of them in memory."""
    return with_experts(view) or whole(view)


def edited_experts(view: SessionView) -> str | None:
    """Needs experts, all of them in memory, and an applied edit."""
    first = "apply the staged plan first" if view.plan else "apply a prune, narrow or merge first"
    unedited = f"the weights are still the checkpoint's: {first}"
    return whole_experts(view) or (None if edited(view) else unedited)


def with_stats(view: SessionView) -> str | None:
    """Needs routing statistics."""
    seen = view.heat is not None and view.heat.samples
    return with_experts(view) or (None if seen else "no statistics yet: run collect first")


def with_topics(view: SessionView) -> str | None:
    """Needs topics of experts."""
    known = view.heat is not None and view.heat.topics
    nothing = "no topics are known yet: run topics, a dossier or a domain-scan first"
    return with_experts(view) or (None if known else nothing)


def staged(view: SessionView) -> str | None:
    """Needs a staged plan."""
    dense = view.model is not None and not view.model.moe_layers
    first = "abliterate" if dense else "prune"
    return with_model(view) or (None if view.plan else f"nothing is staged: run {first} first")


def unstaged(view: SessionView) -> str | None:
    """Needs a model without a staged plan."""
    return with_model(view) or (
        "a plan is staged: apply or discard it first" if view.plan else None
    )


def applicable(view: SessionView) -> str | None:
    """Needs a staged plan that can be applied: a manual selection has to be even."""
    plan = view.plan
    uneven = plan is not None and plan.strategy == "hand" and _uneven(plan.kept)
    return staged(view) or ("the layers lose different numbers of experts" if uneven else None)


def selectable(view: SessionView) -> str | None:
    """Needs experts, and if a plan is staged, that it is a prune."""
    plan = view.plan
    other = plan is not None and plan.technique != "prune"
    return with_experts(view) or (
        f"{plan.technique} is staged: apply or discard it first" if plan and other else None
    )


def steered(view: SessionView) -> str | None:
    """Needs steering in force, of experts or of values."""
    if view.steering is not None and view.steering.interventions:
        return None
    return with_experts(view) or (
        None if steering_in_force(view) else "no experts are steered: run steer first"
    )


def comparable(view: SessionView) -> str | None:
    """Needs two models to compare: a staged plan, an applied edit, or steering."""
    same = view.plan is None and not edited(view) and not steering_in_force(view)
    return with_model(view) or (
        "nothing to compare: the model is as it was loaded; stage a plan, or steer"
        if same
        else None
    )


def undoable(view: SessionView) -> str | None:
    """Needs a parent of the current history node; beside a staged plan, one that differs from it in
    the steering alone."""
    nodes = {node.id: node for node in view.history.nodes} if view.history else {}
    here = nodes.get(view.history.current) if view.history else None
    if here is None or here.parent is None:
        return unstaged(view) or "nothing to undo"
    steers = here.state == nodes[here.parent].state and here.command.startswith("steer")
    return with_model(view) if steers else unstaged(view)


def redoable(view: SessionView) -> str | None:
    """Needs a child of the current history node."""
    history = view.history
    below = history is not None and any(n.parent == history.current for n in history.nodes)
    return unstaged(view) or (None if below else "nothing to redo")


def compactable(view: SessionView) -> str | None:
    """Needs applied prunes whose experts are still held in memory."""
    held = view.model is not None and view.model.compactable
    return with_experts(view) or unstaged(view) or (None if held else "no applied prune to compact")


def listable(view: SessionView) -> str | None:
    """Needs experts that a staged plan or an applied prune removes, as many from each layer."""
    plan, model = view.plan, view.model
    fewer = model is not None and model.experts_kept < model.experts
    if model is None or not (plan or fewer):
        return with_experts(view) or "nothing is staged or pruned: run prune first"
    uneven = _uneven(plan.kept) if plan else False
    return "the layers keep different numbers of experts" if uneven else None


def steering_in_force(view: SessionView) -> bool:
    """Whether any expert is forced on, forced off or biased."""
    now = view.steering
    if now is None:
        return False
    return any(any(sets.values()) for sets in (now.activated, now.deactivated, now.levels))


def edited(view: SessionView) -> bool:
    """Whether the committed weights differ from the checkpoint's."""
    history = view.history
    return history is not None and view.state != history.nodes[0].state


def _uneven(kept: dict[int, tuple[int, ...]]) -> bool:
    return len({len(experts) for experts in kept.values()}) > 1
