"""The plan of a merge: which experts are averaged into which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxfun.calibration.options import Metric
from mlxfun.editing.plans import PLAN_VERSION, SavedExperts


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Experts merged into centroids.

    groups: {decoder layer: {centroid: members, itself first}}, centroids ascending, the same
    number in every layer. weights: {decoder layer: {expert: share of its group}}.
    """

    technique: ClassVar[str] = "merge"
    groups: dict[int, dict[int, tuple[int, ...]]]
    weights: dict[int, dict[int, float]]
    metric: Metric | None = None
    strategy: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def keep(self) -> dict[int, tuple[int, ...]]:
        """{decoder layer: centroids}."""
        return {layer: tuple(groups) for layer, groups in self.groups.items()}

    @property
    def working(self) -> dict[int, tuple[int, ...]]:
        """The same: every centroid can be chosen."""
        return self.keep

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "version": PLAN_VERSION,
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

    @classmethod
    def metadata(cls, plans: Sequence[MergePlan], saved: SavedExperts) -> dict[str, Any]:
        """ream_metadata.json, in the keys of other tools of the family."""
        return {
            "ream_metadata.json": {
                "method": "ream",
                "original_num_experts": saved.original,
                "merged_num_experts": saved.kept,
                "metric": plans[-1].metric,
                "similarity_and_alignment": plans[-1].strategy,
                "centroid_map": saved.keep_map,
                "group_map": {
                    str(layer): {str(expert): _origins(expert, layer, plans) for expert in experts}
                    for layer, experts in saved.live.items()
                },
                "layer_indices": list(saved.live),
            }
        }


def _origins(expert: int, layer: int, plans: Sequence[MergePlan]) -> list[int]:
    """The experts of the checkpoint that were merged into a live one, ascending."""
    members = {expert}
    for plan in reversed(plans):
        members = {m for e in members for m in plan.groups[layer].get(e, (e,))}
    return sorted(members)
