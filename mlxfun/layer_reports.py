"""The MoE layers of a model as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.reports import Report


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One MoE layer as anatomy found it. layer: decoder index; position: 0..L-1."""

    layer: int
    position: int
    router: str
    score: str
    experts: int
    kept: int
    top_k: int
    groups: int
    groups_kept: int
    shared_experts: int
    selection_bias: bool
    path: str


@dataclass(frozen=True, slots=True)
class LayersReport(Report):
    """Anatomy as a table."""

    kind: ClassVar[str] = "layers"
    config_key: str
    rows: tuple[LayerRow, ...]

    def summary(self) -> str:
        return f"{len(self.rows)} MoE layers; the expert count is config key {self.config_key}"
