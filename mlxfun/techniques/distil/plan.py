"""The plan of a distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxfun.editing.plans import PLAN_VERSION, AllWork, SavedExperts


@dataclass(frozen=True, slots=True)
class DistilPlan(AllWork):
    """Parameters that were trained.

    keep: {MoE layer: experts}, unchanged by this technique. train: what was trained. figures: KL and
    perplexity before and after, and the steps, as in the report.
    """

    technique: ClassVar[str] = "distil"
    keep: dict[int, tuple[int, ...]]
    train: str
    figures: dict[str, float]
    strategy: str = ""
    warnings: tuple[str, ...] = ()
    metric: ClassVar[None] = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "version": PLAN_VERSION,
            "technique": self.technique,
            "train": self.train,
            "strategy": self.strategy,
            **self.figures,
        }

    @classmethod
    def metadata(cls, plans: Sequence[DistilPlan], saved: SavedExperts) -> dict[str, Any]:
        """distil_metadata.json."""
        runs = [{"train": p.train, "strategy": p.strategy, **p.figures} for p in plans]
        document = {"method": "distil", "runs": runs, "layer_indices": list(saved.live)}
        return {"distil_metadata.json": document}
