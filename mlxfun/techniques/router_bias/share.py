"""The scale of an amplification that raises a share of the routed choices as asked.

The experts that are raised only take more tokens as the scale grows, and what the model says only
moves further from what it said. So of the scales that reach a share the least costs least KL, and it
is found by halving an interval of scales, with one pass over the text for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.calibration.collect import PASS, watch
from mlxfun.calibration.routing_stats import SUMS
from mlxfun.context import SILENT, Context
from mlxfun.errors import PlanError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import each_forward
from mlxfun.model.delta import Delta
from mlxfun.techniques.router_bias.delta import Edit, Fold
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

CLOSE = 0.02
"""Of the rise that is asked for: how far above it is near enough."""

MOST_DOUBLINGS, MOST_HALVINGS = 6, 8


@dataclass(frozen=True, slots=True)
class Found:
    """The scale that was found, and the share of routed choices before and with it."""

    scale: float
    before: float
    share: float
    passes: int

    @property
    def note(self) -> str:
        """As the plan says it."""
        return (
            f"scale {self.scale:.3g}, found in {self.passes} passes: the experts' share of routed "
            f"choices rises from {self.before:.4f} to {self.share:.4f} on this text"
        )


@dataclass(frozen=True, slots=True)
class Boosts:
    """What is added to the scores of experts at one scale, and how routers are given it.

    addends: {position of a layer: what is added to each live expert, float64 [live]}.
    """

    edit: Edit
    addends: Mapping[int, Array]
    fitted: Mapping[int, Fold]
    scale: float

    @property
    def experts(self) -> Array:
        """Who is raised, bool [L, E]."""
        layers = self.edit.resident.layers
        found = np.zeros((len(layers), layers[0].layer.num_experts), np.bool_)
        for position, row in self.addends.items():
            found[position, np.array(layers[position].live)[row > 0]] = True
        return found

    def at(self, scale: float) -> Delta:
        """The edit at another scale."""
        layers, factor = self.edit.resident.layers, scale / self.scale
        return Delta(
            tuple(
                self.edit.raised(layers[p], row * factor, self.fitted.get(p))
                for p, row in self.addends.items()
            )
        )


def scale_for_share(
    workspace: Workspace,
    batches: Sequence[Batch],
    boosts: Boosts,
    rise: float,
    ctx: Context = SILENT,
) -> Found:
    """The least scale at which the raised experts take 1 + `rise` times the share of their layers'
    choices that they take now, counted on `batches`.

    Raises PlanError where they take none, or no scale up to 64 times the usual one reaches it.
    """
    passes, experts, edit = 0, boosts.experts, boosts.at

    def share(delta: Delta) -> float:
        nonlocal passes
        passes += 1
        ctx.progress("finding the scale", passes, None, "passes")
        with workspace.resident.trial(delta):
            return _share(workspace, batches, experts, ctx)

    before = share(Delta(()))
    wanted = before * (1 + rise)
    if not before:
        raise PlanError(
            "--share: no choice on this text goes to these experts, so there is no share to raise; "
            "give text of the domain as --dataset"
        )
    low, high = 0.0, boosts.scale
    reached = share(edit(high))
    while reached < wanted and passes < 2 + MOST_DOUBLINGS:
        low, high = high, 2 * high
        reached = share(edit(high))
    if reached < wanted:
        raise PlanError(
            f"--share +{rise:.0%}: these experts take {before:.4f} of the choices now and no more "
            f"than {reached:.4f} at scale {high:g}, less than the {wanted:.4f} asked for; ask for "
            "less, or lower --threshold"
        )
    for _ in range(MOST_HALVINGS):
        if reached - wanted <= CLOSE * (wanted - before):
            break
        middle = (low + high) / 2
        found = share(edit(middle))
        if found >= wanted:
            high, reached = middle, found
        else:
            low = middle
    return Found(high, before, reached, passes)


def _share(workspace: Workspace, batches: Sequence[Batch], experts: Array, ctx: Context) -> float:
    """Of the choices of layers that have some of `experts`, those that go to them."""
    model, taps = workspace.model, workspace.taps
    task = Task("finding the scale", PASS)
    counts = np.zeros(experts.shape)
    for _, sums in each_forward(
        model, workspace.anatomy, batches, lambda batch: watch(model, taps, batch), ctx, task
    ):
        counts += sums[:, SUMS.index("freq")]
    of_layers = counts[experts.any(axis=1)]
    return float(counts[experts].sum() / max(of_layers.sum(), 1.0))
