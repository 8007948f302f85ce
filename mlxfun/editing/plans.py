"""Plans as plain data: what a technique decided, and what the decision is based on.

Each technique has its own plan class in its folder; what editing needs of one is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mlxfun.editing.reports import ShownSide, ShownSubject
from mlxfun.events import Side
from mlxfun.steering.rules import Steering

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Subject = Literal[Side, "checkpoint"]
"""What can be made live for a measurement; the checkpoint is run without steering."""


SHOWN_SIDES: dict[Side, ShownSide] = {"base": "current", "candidate": "candidate"}
SHOWN: dict[Subject, ShownSubject] = {
    "base": "current",
    "candidate": "candidate",
    "checkpoint": "checkpoint",
}
"""What sides and subjects are called in reports."""

PLAN_VERSION = "1.0"
"""Version of the JSON form of plans."""


@dataclass(frozen=True, slots=True)
class SavedExperts:
    """Which experts a saved model holds. original: E of the checkpoint; live: {decoder layer:
    checkpoint numbers}."""

    original: int
    live: Mapping[int, tuple[int, ...]]

    @property
    def kept(self) -> int:
        """Experts per layer in the saved model."""
        return len(next(iter(self.live.values()), ()))

    @property
    def keep_map(self) -> dict[str, list[int]]:
        """`live` as it stands in metadata files, keyed by decoder layer."""
        return {str(layer): list(experts) for layer, experts in self.live.items()}


class Plan(Protocol):
    """A technique's decision.

    keep: {decoder layer: experts that stay, ascending, checkpoint numbers}. working: those of them
    that the router can choose. metric: the ranking it was made by, None for none; strategy: how.
    """

    @property
    def technique(self) -> str: ...
    @property
    def keep(self) -> dict[int, tuple[int, ...]]: ...
    @property
    def working(self) -> dict[int, tuple[int, ...]]: ...
    @property
    def metric(self) -> str | None: ...
    @property
    def strategy(self) -> str: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""

    @classmethod
    def metadata(cls, plans: Sequence[Any], saved: SavedExperts) -> dict[str, Any]:
        """{file name: document} to write beside a saved model, of all plans of this class that led
        to it, oldest first. Keys of their maps are decoder layers."""


class AllWork:
    """Of a plan whose experts that stay can all be chosen."""

    __slots__ = ()
    keep: dict[int, tuple[int, ...]]

    @property
    def working(self) -> dict[int, tuple[int, ...]]:
        """The same as `keep`."""
        return self.keep


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a plan comes from.

    command: the line that stages it again. source_commands: those that made what it was decided on;
    made_on: the state that they looked at, "" for the one it is staged on. protected: bool [L, E],
    experts it was told to spare, None for a technique that takes no such list. scores: what was
    measured while it was planned. steering: what the plan makes permanent (bake), in force on the
    base's side only.
    """

    command: str
    source_commands: tuple[str, ...] = ()
    made_on: str = ""
    protected: Array | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    steering: Steering | None = None
