"""The plan of an ablation: one direction or one per part, and the strength per component and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlxfun.editing.plans import PLAN_VERSION, AllWork, SavedExperts
from mlxfun.model.components import Component
from mlxfun.techniques.ablate.oblique import Eraser
from mlxfun.techniques.ablate.options import Position, Target

Strengths = Mapping[Component, Mapping[int, float]]
"""{component: {decoder layer: strength}}; parts that are not named keep their weights."""


@dataclass(frozen=True, slots=True)
class AblationPlan(AllWork):
    """Remove `direction` from what the named parts write to the residual stream.

    direction: [D], of length 1. source_layer: the decoder layer behind which it was taken.
    norms: {decoder layer: norm of the difference of means there, before normalising}. erasers:
    {path of an output: what it loses instead of `direction`}, empty for an orthogonal projection.
    experts: {decoder layer: the experts that lose it}, None for all. keep: {MoE layer: experts},
    unchanged by this technique.
    """

    technique: ClassVar[str] = "abliterate"
    direction: tuple[float, ...]
    source_layer: int
    position: Position
    strengths: Strengths
    norms: Mapping[int, float]
    keep: dict[int, tuple[int, ...]]
    target: Target = "all"
    experts: Mapping[int, tuple[int, ...]] | None = None
    metric: str | None = None
    strategy: str = ""
    warnings: tuple[str, ...] = ()
    erasers: Mapping[str, Eraser] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers that are edited, ascending."""
        found = {i for part in self.strengths.values() for i, s in part.items() if s}
        if self.experts is not None:
            found = {i for i in found if self.experts.get(i)}
        return tuple(sorted(found))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        experts = self.experts
        return {
            "version": PLAN_VERSION,
            "technique": self.technique,
            "target": self.target,
            "source_layer": self.source_layer,
            "position": self.position,
            "projection": "oblique" if self.erasers else "orthogonal",
            "direction": list(self.direction),
            "direction_norms": {str(i): n for i, n in self.norms.items()},
            "strengths": {
                part: {str(i): s for i, s in each.items()} for part, each in self.strengths.items()
            },
            "experts": None if experts is None else {str(i): list(e) for i, e in experts.items()},
        }

    @classmethod
    def metadata(cls, plans: Sequence[AblationPlan], saved: SavedExperts) -> dict[str, Any]:
        """abliteration_metadata.json: the last ablation, the layers of all of them, and each in
        full under `edits`."""
        last = plans[-1]
        return {
            "abliteration_metadata.json": {
                "method": "abliteration",
                "how": "least-squares erasure of each part's own difference"
                if last.erasers
                else "directional ablation, output side",
                "target": last.target,
                "abliterated_layers": sorted({layer for plan in plans for layer in plan.layers}),
                "direction_norms": {str(layer): norm for layer, norm in last.norms.items()},
                "source_layer": last.source_layer,
                "position": last.position,
                "edits": [plan.to_json() for plan in plans],
            }
        }
