"""Plans: what a technique decided, as plain data that can be shown, saved as JSON and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlxfun.errors import PlanError
from mlxfun.techniques.ablate.plan import AblationPlan

VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Experts to keep. keep: {decoder layer: experts, ascending, checkpoint numbers}.

    Every layer keeps the same number: stock loading holds one expert count for all layers. dead:
    those kept for that reason alone, which are never chosen.
    """

    technique: ClassVar[str] = "prune"
    keep: dict[int, tuple[int, ...]]
    metric: str | None = None
    strategy: str = "list"
    warnings: tuple[str, ...] = ()
    dead: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; `from_json` reads it back."""
        return {
            "version": VERSION,
            "technique": self.technique,
            "metric": self.metric,
            "strategy": self.strategy,
            "keep": {str(layer): list(experts) for layer, experts in self.keep.items()},
            "dead": {str(layer): list(experts) for layer, experts in self.dead.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrunePlan:
        """Read a plan. Raises PlanError when it is not one."""
        if data.get("technique") != cls.technique or not isinstance(data.get("keep"), dict):
            raise PlanError(
                f"not a prune plan: technique is {data.get('technique')!r}; "
                "give a file written by the shell"
            )
        keep, dead = (
            {int(k): tuple(int(e) for e in v) for k, v in sets.items()}
            for sets in (data["keep"], data.get("dead", {}))
        )
        return cls(keep, data.get("metric"), data.get("strategy", "list"), dead=dead)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Experts merged into centroids.

    groups: {decoder layer: {centroid: members, itself first}}, centroids ascending, the same
    number in every layer. weights: {decoder layer: {expert: share of its group}}.
    """

    technique: ClassVar[str] = "merge"
    groups: dict[int, dict[int, tuple[int, ...]]]
    weights: dict[int, dict[int, float]]
    metric: str | None = None
    strategy: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def keep(self) -> dict[int, tuple[int, ...]]:
        """{decoder layer: centroids}."""
        return {layer: tuple(groups) for layer, groups in self.groups.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "version": VERSION,
            "technique": self.technique,
            "metric": self.metric,
            "strategy": self.strategy,
            "groups": {
                str(layer): {str(centroid): list(members) for centroid, members in groups.items()}
                for layer, groups in self.groups.items()
            },
            "weights": {
                str(layer): {str(expert): share for expert, share in shares.items()}
                for layer, shares in self.weights.items()
            },
        }


@dataclass(frozen=True, slots=True)
class BoostPlan:
    """Experts raised or lowered in their routers.

    technique: "amplify" or "bake". keep: {decoder layer: live experts}, all of which stay. boosts:
    {decoder layer: {expert: addend}}; ways: {decoder layer: where it is held}. about: what the
    metadata says beside them.
    """

    technique: str
    keep: dict[int, tuple[int, ...]]
    boosts: dict[int, dict[int, float]]
    ways: dict[int, str]
    about: dict[str, Any]
    warnings: tuple[str, ...] = ()
    metric: ClassVar[None] = None

    @property
    def strategy(self) -> str:
        """Where the addends are held."""
        return " and ".join(sorted(set(self.ways.values())))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"version": VERSION, "technique": self.technique, **self.about, **self._layers()}

    def metadata(self) -> dict[str, Any]:
        """What is written beside a saved model; keys are decoder layers."""
        found = {"method": self.technique, **self.about, **self._layers()}
        if self.technique == "amplify":
            found["amplified_layers"] = sorted(self.boosts)
        return found

    def _layers(self) -> dict[str, Any]:
        return {
            "held_in": {str(layer): way for layer, way in self.ways.items()},
            "per_layer_bias": {
                str(layer): {str(expert): value for expert, value in boosts.items()}
                for layer, boosts in self.boosts.items()
            },
        }


Plan = PrunePlan | MergePlan | AblationPlan | BoostPlan
