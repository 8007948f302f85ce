"""The plan of baked vectors: which bias takes which vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxfun.editing.plans import PLAN_VERSION, AllWork, SavedExperts
from mlxfun.techniques.vector_bias.reports import Held


@dataclass(frozen=True, slots=True)
class VectorPlan(AllWork):
    """Vectors that are added to biases. keep: {MoE layer: experts}, unchanged."""

    technique: ClassVar[str] = "bake"
    keep: dict[int, tuple[int, ...]]
    held: tuple[Held, ...]
    metric: str | None = None
    strategy: str = "bias"
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"version": PLAN_VERSION, "technique": self.technique, "vectors": self._rows()}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"at": name, "intervention": words, "bias": path, "norm": norm}
            for name, words, path, norm in self.held
        ]

    @classmethod
    def metadata(cls, plans: Sequence[VectorPlan], saved: SavedExperts) -> dict[str, Any]:
        """vectors_metadata.json: every vector of every plan, in their order."""
        rows = [row for plan in plans for row in plan._rows()]
        return {"vectors_metadata.json": {"method": "steering vectors in biases", "vectors": rows}}
