"""What is held of the model in memory: reports, profiles, and what needs the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.errors import StateError
from mlxfun.memory.profile import Layers, read_profile, write_profile
from mlxfun.memory.reports import ResidencyReport
from mlxfun.memory.slots.slots import ExpertSlots
from mlxfun.report import TextReport
from mlxfun.session.base import SessionBase

if TYPE_CHECKING:
    from mlxfun.arrays import Array


class Residency(SessionBase):
    """Sessions whose experts may be in slots."""

    def _opened(self, options: LoadOptions) -> None:
        if options.profile is not None and self._workspace.slots is not None:
            self.load_profile(options.profile)

    def residency(self) -> ResidencyReport:
        """What is in memory, and what reading the rest has cost."""
        self._own()
        slots = self._workspace.slots
        if slots is not None:
            return slots.report()
        size = sum(array.nbytes for array in self._workspace.export().resident_arrays())
        return ResidencyReport(len(self.anatomy.layers), self.anatomy.num_experts, 0, 0, size, size)

    def forget_residency(self) -> ResidencyReport:
        """Count hits, misses and bytes from now on; the report until now."""
        before = self.residency()
        if self._workspace.slots is not None:
            self._workspace.slots.forget_counts()
        return before

    def save_profile(self, path: Path) -> TextReport:
        """Write how much each expert is used: by the slots' own count, and by the statistics in hand
        where the model is whole in memory. Raises StateError without either."""
        self._own()
        self.map.require_experts("profile")
        slots, shape = self._workspace.slots, self._layers
        stats = self._observations.stats
        if slots is not None:
            scores, held = slots.scores(shape.experts), slots.resident(shape.experts)
        elif stats is not None:
            scores = stats.score("freq")
            held = scores > 0
        else:
            raise StateError(
                "nothing is known of how much each expert is used: run collect first, or load the "
                "model with --resident auto and let it answer"
            )
        write_profile(path, shape, scores, held, (self._loaded.model_id, self.checkpoint_id))
        return TextReport(f"wrote the profile of {len(shape.indices)} layers to {path}")

    def load_profile(self, path: Path) -> TextReport:
        """Hold the experts that a file names: a profile, or routing statistics (`.npz`).

        Raises PlanError for a file that cannot be used, StateError for a model that is whole."""
        self._own()
        slots = self._slots("load a profile")
        scores = self._scores(path)
        for row, live in zip(scores, self.editor.committed, strict=True):
            row[[e for e in range(len(row)) if e not in set(live)]] = 0.0  # pruned
        slots.seed(scores)
        return TextReport(f"{slots.report().capacity} experts a layer are held by {path}")

    def _scores(self, path: Path) -> Array:
        shape = self._layers
        if path.suffix.lower() == ".npz":
            return RoutingStats.load(path, shape.indices, shape.experts).score("freq")
        return read_profile(path, shape)

    @property
    def _layers(self) -> Layers:
        return Layers(self.anatomy.indices, self.anatomy.num_experts)

    def _slots(self, action: str) -> ExpertSlots:
        slots = self._workspace.slots
        if slots is None:
            raise StateError(
                f"the whole model is in memory, so there is no need to {action}: load it with "
                "--resident auto, a size, or --capacity to hold some experts only"
            )
        return slots

    def _require_whole(self, action: str) -> None:
        """Raise StateError where experts are on disk. action: what needs all of them."""
        if self._workspace.slots is not None:
            raise StateError(
                f"{action} makes new tensors of experts, and those of this model are partly on "
                "disk: load it with --resident none, which runs layer by layer, or --resident all"
            )
