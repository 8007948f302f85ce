"""The report on active steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mlxfun.report import Report
from mlxfun.steering.options import MapInForce, SteerRule


@dataclass(frozen=True, slots=True)
class SteerReport(Report):
    """Steering in force. *_value: what the additive rule adds. levels: faders. maps: of scans."""

    kind: ClassVar[str] = "steer"
    activated: dict[int, tuple[int, ...]]
    deactivated: dict[int, tuple[int, ...]]
    notices: tuple[str, ...] = ()
    rule: SteerRule = "steermoe"
    boost_value: float = 0.0
    mask_value: float = 0.0
    levels: dict[int, dict[int, float]] = field(default_factory=dict)
    maps: tuple[MapInForce, ...] = ()

    def summary(self) -> str:
        up, down = (sum(map(len, s.values())) for s in (self.activated, self.deactivated))
        if not (up or down or self.levels):
            return "no experts steered"
        biased = sum(map(len, self.levels.values()))
        counts = ((up, "forced on"), (down, "forced off"), (biased, "biased"))
        text = "steering: " + ", ".join(f"{count} {what}" for count, what in counts if count)
        if self.rule == "additive":
            text += f", adding {self.boost_value:+g} and {self.mask_value:+g}"
        return text
