"""The plan of narrower experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlxfun.editing.plans import PLAN_VERSION, AllWork, SavedExperts


@dataclass(frozen=True, slots=True)
class NarrowPlan(AllWork):
    """Experts of `width` neurons instead of `width_before`.

    keep: {MoE layer: experts}, unchanged by this technique. scarce: {decoder layer: experts that
    too few tokens were routed to, whose largest neurons stay}. errors: {decoder layer: squared
    error of the layer's output relative to its square}. beside: {path of an MLP beside the experts
    that became narrower too: the same of its output}.
    """

    technique: ClassVar[str] = "narrow"
    keep: dict[int, tuple[int, ...]]
    width_before: int
    width: int
    scarce: Mapping[int, tuple[int, ...]]
    errors: Mapping[int, float]
    metric: str | None = None
    strategy: str = ""
    warnings: tuple[str, ...] = ()
    beside: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "version": PLAN_VERSION,
            "technique": self.technique,
            "method": self.metric,
            "strategy": self.strategy,
            "width_before": self.width_before,
            "width": self.width,
            "scarce": {str(layer): list(experts) for layer, experts in self.scarce.items()},
            "errors": {str(layer): error for layer, error in self.errors.items()},
            "beside": dict(self.beside),
        }

    @classmethod
    def metadata(cls, plans: Sequence[NarrowPlan], saved: SavedExperts) -> dict[str, Any]:
        """narrow_metadata.json."""
        return {
            "narrow_metadata.json": {
                "method": "narrow",
                "original_expert_width": plans[0].width_before,
                "expert_width": plans[-1].width,
                "chosen_by": [plan.metric for plan in plans],
                "strategy": [plan.strategy for plan in plans],
                "layer_indices": list(saved.live),
            }
        }
