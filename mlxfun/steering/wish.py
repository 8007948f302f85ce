"""What a steer command asks for, before it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxfun.data.options import ExpertSets
from mlxfun.errors import PlanError
from mlxfun.steering.options import MapInForce


@dataclass(slots=True)
class Wish:
    """What is asked for: sets, the fields of Steering that change, sentences for the user.

    maps: the reports among the sources. asked_by: (layer, expert) -> who named it first.
    """

    activate: ExpertSets = field(default_factory=dict)
    deactivate: ExpertSets = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    maps: tuple[MapInForce, ...] = ()
    asked_by: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, sets: tuple[ExpertSets, ExpertSets], by: tuple[str, str]) -> None:
        """Join (activate, deactivate) to what is wished. by: who asks for each.

        Raises PlanError where they contradict what is wished already.
        """
        for mine, new, who in zip((self.activate, self.deactivate), sets, by, strict=True):
            for layer, experts in new.items():
                mine[layer] = tuple(dict.fromkeys((*mine.get(layer, ()), *experts)))
                for expert in experts:
                    self.asked_by.setdefault((layer, expert), who)
        for layer, experts in self.activate.items():
            both = sorted(set(experts) & set(self.deactivate.get(layer, ())))
            if both:
                raise PlanError(
                    f"layer {layer}: experts {both} are asked to be both activated and "
                    "deactivated; leave one source out"
                )

    def side(self, number: int) -> ExpertSets:
        """What is activated (0) or deactivated (1)."""
        return (self.activate, self.deactivate)[number]


def cells_of(sets: Mapping[int, tuple[int, ...]]) -> set[tuple[int, int]]:
    """{decoder layer: experts} as (decoder layer, expert) cells."""
    return {(layer, expert) for layer, experts in sets.items() for expert in experts}
