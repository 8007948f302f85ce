"""The plan of a prune: the experts that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlxfun.editing.plans import PLAN_VERSION, SavedExperts
from mlxfun.errors import PlanError
from mlxfun.techniques.prune.options import PruneMetric


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Experts to keep. keep: {decoder layer: experts, ascending, checkpoint numbers}.

    Every layer keeps the same number: stock loading holds one expert count for all layers. dead:
    those kept for that reason alone, which are never chosen.
    """

    technique: ClassVar[str] = "prune"
    keep: dict[int, tuple[int, ...]]
    metric: PruneMetric | None = None
    strategy: str = "list"
    warnings: tuple[str, ...] = ()
    dead: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def working(self) -> dict[int, tuple[int, ...]]:
        """{decoder layer: kept experts that the router can choose}."""
        return {
            layer: tuple(e for e in experts if e not in self.dead.get(layer, ()))
            for layer, experts in self.keep.items()
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; `from_json` reads it back."""
        return {
            "version": PLAN_VERSION,
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

    @classmethod
    def metadata(cls, plans: Sequence[PrunePlan], saved: SavedExperts) -> dict[str, Any]:
        """reap_metadata.json, in the keys of other tools of the family."""
        document: dict[str, Any] = {
            "original_num_experts": saved.original,
            "pruned_num_experts": saved.kept,
            "metric": next((p.metric for p in reversed(plans) if p.metric), None),
            "keep_map": saved.keep_map,
            "layer_indices": list(saved.live),
        }
        never = _never_chosen(plans, saved.keep_map)
        return {"reap_metadata.json": document | ({"never_chosen": never} if never else {})}


def _never_chosen(
    plans: Sequence[PrunePlan], kept: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """{decoder layer: experts that are in the file and that the router can never choose}."""
    silent: dict[str, set[int]] = {}
    for plan in plans:
        for layer, experts in plan.dead.items():
            silent.setdefault(str(layer), set()).update(experts)
    found = {layer: sorted(experts & set(kept[layer])) for layer, experts in silent.items()}
    return {layer: experts for layer, experts in found.items() if experts}
