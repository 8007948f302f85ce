"""Reports on vectors that are staged to be baked."""

from __future__ import annotations

from dataclasses import dataclass

from mlxfun.editing.reports import PlanReport

Held = tuple[str, str, str, float]
"""(the value's name, the intervention in words, the bias's path, L2 norm of what is added)."""


@dataclass(frozen=True, slots=True)
class VectorReport(PlanReport):
    """Vectors that are staged to be baked. held: see VectorPlan."""

    held: tuple[Held, ...] = ()

    def summary(self) -> str:
        said = "; ".join(f"{words} at {name} in {path}" for name, words, path, _ in self.held)
        return f"{self.deed}: {said}"
