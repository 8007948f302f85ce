"""The report on active steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mlxfun.report import Report
from mlxfun.steering.options import MapInForce, SteerRule


@dataclass(frozen=True, slots=True)
class StandingView:
    """A standing intervention as text. name: the values that it changes; words: how; source: the
    name or file of its vector, "" for none; key: its identity; strength: of a vector that is added,
    None for other interventions."""

    name: str
    words: str
    source: str
    key: str
    strength: float | None = None

    @property
    def said(self) -> str:
        """What it does in a few words: of a vector its name and strength, not its array."""
        if self.source and self.strength is not None:
            return f"vector {self.source} {self.strength:+g}"
        return self.words


@dataclass(frozen=True, slots=True)
class SteerReport(Report):
    """Steering in force. *_value: what the additive rule adds. levels: faders. maps: of scans.

    interventions: those that stand in every forward, see mlxfun.tracing.standing.
    """

    kind: ClassVar[str] = "steer"
    activated: dict[int, tuple[int, ...]]
    deactivated: dict[int, tuple[int, ...]]
    notices: tuple[str, ...] = ()
    rule: SteerRule = "steermoe"
    boost_value: float = 0.0
    mask_value: float = 0.0
    levels: dict[int, dict[int, float]] = field(default_factory=dict)
    maps: tuple[MapInForce, ...] = ()
    interventions: tuple[StandingView, ...] = ()

    def summary(self) -> str:
        up, down = (sum(map(len, s.values())) for s in (self.activated, self.deactivated))
        standing = "; ".join(f"{one.said} at {one.name}" for one in self.interventions)
        if not (up or down or self.levels):
            return f"intervening: {standing}" if standing else "no experts steered"
        biased = sum(map(len, self.levels.values()))
        counts = ((up, "forced on"), (down, "forced off"), (biased, "biased"))
        text = "steering: " + ", ".join(f"{count} {what}" for count, what in counts if count)
        if self.rule == "additive":
            text += f", adding {self.boost_value:+g} and {self.mask_value:+g}"
        return f"{text}; intervening: {standing}" if standing else text
