"""The session's workspace: the resident model and the objects built for it at load time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.checkpoint.load import Loaded
from mlxfun.editing import save
from mlxfun.editing.editor import Editor
from mlxfun.errors import BudgetError
from mlxfun.evaluation.evaluator import EvalSet, Evaluator
from mlxfun.hooks.head import HeadTap
from mlxfun.hooks.routing import Taps
from mlxfun.model.delta import Reader, Resident
from mlxfun.model.device.memory import free_bytes, memory_limit
from mlxfun.model.export import ExportView
from mlxfun.model.model_map import map_model
from mlxfun.session.observations import Observations
from mlxfun.text import readable_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlxfun.arrays import Array
    from mlxfun.calibration.routing_stats import RoutingStats
    from mlxfun.data.datasets import Tokens


class SessionWorkspace:
    """A session makes one and hands it to the techniques."""

    def __init__(self, loaded: Loaded, undo_budget: int | None = None) -> None:
        """Wrap an already loaded model. Raises ModelError for an unknown architecture."""
        self._loaded = loaded
        self.model: nn.Module = loaded.model
        self.tokenizer = loaded.tokenizer
        self.map = map_model(self.model, loaded.config)
        self.anatomy = self.map.experts
        self.resident = Resident(self.model, self.anatomy, self.open_checkpoint)
        self.taps = Taps(self.model, self.anatomy, self.resident.layers)
        self.taps.attach()
        began = f"load {loaded.model_id}"
        self.editor = Editor(self.resident, self.taps, loaded.checkpoint_id, began, undo_budget)
        self.editor.model_name = loaded.model_id
        if loaded.read_rate:
            self.editor.replaced.read_rate = loaded.read_rate
        self.editor.earlier.compute = lambda: save.earlier_checkpoint_id(loaded)
        head = HeadTap(self.model, self.anatomy.head) if self.anatomy.head else None
        self.evaluator = Evaluator(self.model, head, self.anatomy)
        self.observations = Observations(loaded, self.anatomy, self.taps, self.editor)

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint, see mlxfun.checkpoint.load.Loaded."""
        return self._loaded.config

    def open_checkpoint(self) -> Reader:
        """A reader of single parameters of the checkpoint."""
        return save.open_checkpoint(self._loaded, lambda path: self.resident.tree.get(path).dtype)

    def read_statistics(self, path: Path, allow_stale: bool = False) -> RoutingStats:
        """See Workspace.read_statistics."""
        return self.observations.read(path, allow_stale)

    @property
    def protected(self) -> Array:
        """bool [L, E], the experts to spare, see `Editor.protected`."""
        return self.protected_or_none(self.editor.protected)

    def protected_or_none(self, mask: Array | None) -> Array:
        """bool [L, E]; None is no expert."""
        shape = len(self.anatomy.layers), self.anatomy.num_experts
        return np.zeros(shape, np.bool_) if mask is None else mask

    @property
    def calibration(self) -> Sequence[Tokens]:
        """The sequences of the last collect, empty before one."""
        return self.observations.calibration

    @property
    def stats(self) -> RoutingStats | None:
        """The statistics in hand."""
        return self.observations.stats

    @property
    def source_commands(self) -> tuple[str, ...]:
        """The commands that made the statistics in hand."""
        return self.observations.source_commands

    @property
    def held_out(self) -> EvalSet | None:
        """What the last collect kept away from calibration."""
        return self.observations.held_out

    def stored(self, path: str) -> mx.Dtype:
        """The dtype of a parameter on disk (see mlxfun.model.parameters.Stored)."""
        known = self._loaded.stored_dtypes.get(path)
        return self.resident.tree.get(path).dtype if known is None else known

    def export(self) -> ExportView:
        """The live side as it would be saved."""
        return ExportView(self.model, self.resident, self.anatomy, self._loaded.stored_dtypes)

    def require_room(self, needed: int, what: str, advice: str) -> None:
        """Raise BudgetError with the figures if `needed` bytes do not fit beside what is active.

        what: the work, as the sentence begins; advice: what would need less.
        """
        free = free_bytes()
        if free is not None and needed > free:
            self.editor.replaced.let_go()
            mx.clear_cache()
            free = free_bytes()
        active, limit = int(mx.get_active_memory()), memory_limit()
        if free is not None and limit is not None and needed > free:
            raise BudgetError(
                f"{what} needs about {readable_bytes(needed)} on top of {readable_bytes(active)} in "
                f"use, over the {readable_bytes(limit)} there are; {advice}"
            )
