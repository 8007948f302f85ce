"""Protocols of what techniques need from the session that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path

    from mlxfun.arrays import Array
    from mlxfun.calibration.routing_stats import RoutingStats
    from mlxfun.data.datasets import Tokenizer, Tokens
    from mlxfun.editing.editor import Editor
    from mlxfun.evaluation.evaluator import EvalSet, Evaluator
    from mlxfun.hooks.routing import Taps
    from mlxfun.model.anatomy import MoEMap
    from mlxfun.model.delta import Delta, LayerDelta, Resident, Trial
    from mlxfun.model.device.memory import Need
    from mlxfun.model.export import ExportView
    from mlxfun.model.model_map import ModelMap


class ResidentModel(Protocol):
    """A resident model with its hooks and the editable view of its parameters."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def map(self) -> ModelMap: ...
    @property
    def anatomy(self) -> MoEMap: ...
    @property
    def taps(self) -> Taps: ...
    @property
    def resident(self) -> Resident: ...
    def stored(self, path: str) -> mx.Dtype:
        """The dtype in which a parameter is stored on disk (see mlxfun.model.parameters.Stored)."""

    def hold(self, layer: LayerDelta) -> LayerDelta:
        """What is kept of the delta of a layer that is done, while the others are made: itself, or
        one whose arrays were written to disk."""

    def trial(self, delta: Delta) -> AbstractContextManager[Trial]:
        """Resident.trial of layers that are held: where those are on disk, what they replace is set
        aside there too, so that one side at a time is in memory."""


class Workspace(ResidentModel, Protocol):
    """A resident model with its history, and what was collected and measured on it.

    stats: the routing statistics in hand, None before a collect; source_commands: the commands that
    made them. calibration: the sequences of the last collect, empty before one. held_out: what it kept away
    from calibration, None without any.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def editor(self) -> Editor: ...
    @property
    def evaluator(self) -> Evaluator: ...
    @property
    def calibration(self) -> Sequence[Tokens]: ...
    @property
    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""

    @property
    def held_out(self) -> EvalSet | None: ...
    @property
    def stats(self) -> RoutingStats | None: ...
    @property
    def source_commands(self) -> tuple[str, ...]: ...
    def read_statistics(self, path: Path, allow_stale: bool = False) -> RoutingStats:
        """An `.npz` made on this model. Raises DatasetError, ModelError, PlanError, and StateError
        for one of another state unless it is allowed."""

    def export(self) -> ExportView:
        """The live side as it would be saved."""

    def protected_or_none(self, mask: Array | None) -> Array:
        """bool [L, E]; None is no expert."""

    def require_room(self, need: Need, what: str, advice: str) -> None:
        """Raise BudgetError with the figures if an edit does not fit beside what is in memory, or,
        where it goes straight to disk, on the disk.

        what: the work, as the sentence begins; advice: what would need less.
        """


def collected_text(workspace: Workspace, does: str) -> Sequence[Tokens]:
    """The text of the last collect. does: what happens on it, as a sentence begins.

    Raises StateError where nothing was collected.
    """
    if not workspace.calibration:
        raise StateError(
            f"{does} the text of the last collect, and there is none; give --dataset, or run "
            "`collect --dataset ...` first"
        )
    return workspace.calibration
