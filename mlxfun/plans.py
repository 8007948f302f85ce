"""Plans: what a technique decided, as plain data that can be shown, saved as JSON and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxfun.ablation_plan import AblationPlan
from mlxfun.errors import PlanError

VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Experts to keep. keep: {decoder layer: experts, ascending, checkpoint numbers}.

    Every layer keeps the same number: stock loading holds one expert count for all layers.
    """

    technique: ClassVar[str] = "prune"
    keep: dict[int, tuple[int, ...]]
    metric: str | None = None
    strategy: str = "list"
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; `from_json` reads it back."""
        return {
            "version": VERSION,
            "technique": self.technique,
            "metric": self.metric,
            "strategy": self.strategy,
            "keep": {str(layer): list(experts) for layer, experts in self.keep.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrunePlan:
        """Read a plan. Raises PlanError when it is not one."""
        if data.get("technique") != cls.technique or not isinstance(data.get("keep"), dict):
            raise PlanError(
                f"not a prune plan: technique is {data.get('technique')!r}; "
                "give a file written by the shell"
            )
        keep = {int(k): tuple(int(e) for e in v) for k, v in data["keep"].items()}
        return cls(keep, data.get("metric"), data.get("strategy", "list"))


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


Plan = PrunePlan | MergePlan | AblationPlan
