"""Reports on staged router edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxfun.editing.reports import PlanReport
from mlxfun.text import counted

BoostWay = Literal["selection bias", "router bias", "router rows"]
"""Where a layer holds what is added to the scores of its experts."""


@dataclass(frozen=True, slots=True)
class BoostRow:
    """One layer. boosts: {expert: addend}. r2, realised, deviation: how much of an addend a token
    gets, on text that was left out of the fit; 1, 1 and 0 where it is held exactly.
    """

    layer: int
    way: BoostWay
    boosts: dict[int, float]
    r2: float
    realised: float
    deviation: float


@dataclass(frozen=True, slots=True)
class BoostReport(PlanReport):
    """A staged amplification or baked steering. subject: the domain, "" for steering."""

    rows: tuple[BoostRow, ...] = ()
    subject: str = ""

    def summary(self) -> str:
        up, down = (
            sum(sign * value > 0 for row in self.rows for value in row.boosts.values())
            for sign in (1, -1)
        )
        what = f" {self.subject}" if self.subject else ""
        parts = [
            f"{counted(n, 'expert', 'experts')} {verb}"
            for n, verb in ((up, "raised"), (down, "lowered"))
            if n
        ]
        worst = min((row.r2 for row in self.rows), default=1.0)
        how = "exactly" if worst == 1.0 else f"R^2 at least {worst:.3f}"
        return (
            f"staged {self.technique}{what}: {', '.join(parts)} in "
            f"{counted(len(self.rows), 'layer', 'layers')}, {how}"
        )
