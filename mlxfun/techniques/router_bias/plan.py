"""The plan of amplify and bake: what is added to which expert's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlxfun.editing.plans import PLAN_VERSION, AllWork, SavedExperts
from mlxfun.techniques.router_bias.reports import BoostWay

FILES = {"amplify": "amplification_metadata.json", "bake": "bake_metadata.json"}
METHODS = {"amplify": "amplification", "bake": "bake"}
"""What a technique is called in its file, in the words of other tools of the family."""


@dataclass(frozen=True, slots=True)
class BoostPlan(AllWork):
    """Experts raised or lowered in their routers.

    keep: {decoder layer: live experts}, all of which stay. boosts: {decoder layer: {expert:
    addend}}; ways: {decoder layer: where it is held}. about: what the metadata says beside them.
    """

    technique: Literal["amplify", "bake"]
    keep: dict[int, tuple[int, ...]]
    boosts: dict[int, dict[int, float]]
    ways: dict[int, BoostWay]
    about: dict[str, Any]
    warnings: tuple[str, ...] = ()
    metric: ClassVar[None] = None

    @property
    def strategy(self) -> str:
        """Where the addends are held."""
        return " and ".join(sorted(set(self.ways.values())))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "version": PLAN_VERSION,
            "technique": self.technique,
            **self.about,
            **self._layers(),
        }

    @classmethod
    def metadata(cls, plans: Sequence[BoostPlan], saved: SavedExperts) -> dict[str, Any]:
        """A file for each of the two techniques, about its last plan."""
        return {FILES[plan.technique]: plan._document(saved) for plan in plans}

    def _document(self, saved: SavedExperts) -> dict[str, Any]:
        """per_layer_bias is a list with one addend for each expert of the saved model, in its
        order; `boosts` has the addends by the checkpoint's numbers of experts."""
        layers = self._layers()
        boosts = layers.pop("per_layer_bias")
        found = {"method": METHODS[self.technique], **self.about, **layers, "boosts": boosts}
        found["per_layer_bias"] = {
            str(layer): [addends.get(expert, 0.0) for expert in saved.live[layer]]
            for layer, addends in self.boosts.items()
        }
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
