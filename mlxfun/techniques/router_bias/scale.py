"""The scale of an amplification that suits a kind of router."""

from __future__ import annotations

from mlxfun.techniques.workspace import Workspace

LOGIT_SCALE, SELECTION_SCALE = 0.5, 0.1
"""The usual scales, measured on trained models of both kinds."""

HARMFUL_SCALE = 0.3
"""From here on a selection bias outweighs most differences between scores."""


def _selects_by_bias(workspace: Workspace) -> bool:
    return any(moe.layer.bias_name is not None for moe in workspace.resident.layers)


def usual_scale(workspace: Workspace) -> float:
    """A scale that raises a domain's share at little cost: SELECTION_SCALE for routers with a
    selection bias, whose scores are between 0 and 1, LOGIT_SCALE for all others."""
    return SELECTION_SCALE if _selects_by_bias(workspace) else LOGIT_SCALE


def scale_notes(workspace: Workspace, scale: float) -> tuple[str, ...]:
    """A warning of a scale that is likely to do harm."""
    if not _selects_by_bias(workspace) or scale < HARMFUL_SCALE:
        return ()
    return (
        f"--scale {scale:g} on a router with a selection bias: 0.5 raised the perplexity of a trained "
        f"model by 13 %, that of its own domain included, and {SELECTION_SCALE:g} by 1.4 %; preview "
        "before you apply it",
    )
