"""Reports on staged plans of narrower experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxfun.editing.reports import PlanReport
from mlxfun.text import readable_bytes


@dataclass(frozen=True, slots=True)
class NarrowReport(PlanReport):
    """A staged plan of narrower experts. errors: {decoder layer: squared error of the layer's output
    relative to its square}. scarce: {decoder layer: experts that too few tokens were routed to}. beside: {path
    of an MLP beside the experts that became narrower too: the same of its output}.
    """

    width_before: int = 0
    width: int = 0
    errors: dict[int, float] = field(default_factory=dict)
    scarce: dict[int, tuple[int, ...]] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        size = f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}"
        text = f"{self.deed}: experts of {self.width_before} -> {self.width} neurons, {size}"
        if self.errors:
            mean = sum(self.errors.values()) / len(self.errors)
            text += f", mean error of the layers' outputs {mean:.1%}"
        if self.beside:
            mean = sum(self.beside.values()) / len(self.beside)
            text += f"; {len(self.beside)} MLPs beside the experts, mean error {mean:.1%}"
        return text
