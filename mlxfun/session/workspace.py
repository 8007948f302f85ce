"""The session's workspace: the resident model and the objects built for it at load time."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import finalize

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.checkpoint.headers import read_headers
from mlxfun.checkpoint.load import Loaded
from mlxfun.checkpoint.save import checked_target
from mlxfun.context import SILENT, Context
from mlxfun.editing import save
from mlxfun.editing.editor import Editor
from mlxfun.editing.scratch import Scratch, own_directory, scratch_for
from mlxfun.evaluation.evaluator import EvalSet, Evaluator
from mlxfun.hooks.head import HeadTap
from mlxfun.hooks.routing import Taps
from mlxfun.memory.slots.partly import Partly
from mlxfun.memory.slots.slots import ExpertSlots
from mlxfun.memory.streaming.ahead import ReadAhead
from mlxfun.memory.streaming.residency import LayerReader
from mlxfun.memory.streaming.unread import allow_open_files, require_unchanged, unread
from mlxfun.model.delta import Delta, LayerDelta, Resident, Trial
from mlxfun.model.device.memory import Need, fits, require
from mlxfun.model.export import Aside, ExportView
from mlxfun.model.model_map import map_model
from mlxfun.model.places import FromFile, LayerStore, Reader
from mlxfun.session.observations import Observations
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.standing import Standing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mlxfun.arrays import Array
    from mlxfun.calibration.routing_stats import RoutingStats
    from mlxfun.checkpoint.options import SaveOptions
    from mlxfun.checkpoint.reports import SaveReport
    from mlxfun.data.datasets import Tokens
    from mlxfun.editing.history import Node


class SessionWorkspace:
    """A session makes one and hands it to the techniques."""

    def __init__(
        self, loaded: Loaded, undo_budget: int | None = None, partly: Partly | None = None
    ) -> None:
        """Wrap an already loaded model. Raises ModelError for an unknown architecture.

        partly: what was decided about experts that are not held.
        """
        self._loaded = loaded
        self._scratch: Scratch | None = None
        self.model: nn.Module = loaded.model
        self.tokenizer = loaded.tokenizer
        self.map = map_model(self.model, loaded.config)
        self.anatomy = self.map.experts
        self.resident = Resident(self.model, self.anatomy, self.open_checkpoint)
        self._own_scratch: Scratch | None = None
        if loaded.streamed is not None:
            self._keep_layers_on_disk(loaded.streamed.scratch)
        # Inside the taps: what they pass on are rows of the whole stacks.
        self.slots = ExpertSlots(self.model, partly) if partly and partly.layers else None
        for moe in self.resident.layers:
            moe.on_disk = self.slots is not None
        self.taps = Taps(self.model, self.anatomy, self.resident.layers)
        self.taps.attach()
        if self.slots is not None and partly is not None and partly.options.miss == "skip":
            self.slots.leave_out(self.taps.layers)
        began = f"load {loaded.model_id}"
        self.editor = Editor(self.resident, self.taps, loaded.checkpoint_id, began, undo_budget)
        self.editor.model_name = loaded.model_id
        self.parts = Parts(self.model, self.map, self.tokenizer, self.resident.layers)
        self.editor.standing = Standing(self.parts)
        if loaded.read_rate:
            self.editor.replaced.read_rate = loaded.read_rate
        self.editor.earlier.compute = lambda: save.earlier_checkpoint_id(loaded)
        head = HeadTap(self.model, self.anatomy.head) if self.anatomy.head else None
        self.evaluator = Evaluator(self.model, head, self.anatomy)
        self.observations = Observations(loaded, self.anatomy, self.taps, self.editor)

    def _keep_layers_on_disk(self, scratch: Path) -> None:
        loaded, layers = self._loaded, [layer.path for layer in self.map.layers]
        self.resident.store = store = LayerStore(
            self.resident.tree,
            layers,
            lambda: unread(loaded),
            lambda: require_unchanged(loaded),
        )
        LayerReader(self.model, store).attach()
        headers = read_headers(loaded.path)
        allow_open_files(len(headers))
        ahead = ReadAhead(headers, layers)
        store.on_disk = sum(ahead.bytes_of(number) for number in range(len(layers)))
        store.after_read = lambda number: ahead.want(number + 1)
        finalize(self, ahead.close)
        store.scratch = own_directory(scratch)
        finalize(self, shutil.rmtree, store.scratch, True)
        self._own_scratch = Scratch(store.scratch, store.scratch)
        store.passes = scratch / "passes"
        store.identity = lambda: " ".join((loaded.checkpoint_id, *self.editor.key()))

    def drop_pruned(self) -> None:
        """Let experts that no router can choose leave their slots."""
        if self.slots is not None:
            self.slots.keep_only(self.editor.committed)

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

    def export(self, aside: Mapping[str, FromFile] | None = None) -> ExportView:
        """The live side as it would be saved. aside: see ExportView."""
        dtypes = self._loaded.stored_dtypes
        on_disk: dict[str, Aside] = {} if self.slots is None else dict(self.slots.aside)
        on_disk |= aside or {}
        return ExportView(self.model, self.resident, self.anatomy, dtypes, on_disk)

    def save(
        self,
        view: ExportView,
        options: SaveOptions,
        ctx: Context = SILENT,
        node: Node | None = None,
    ) -> SaveReport:
        """Write the live side, see mlxfun.editing.save.save."""
        return save.save(self._loaded, self.editor, view, options, ctx, node)

    # -- straight to disk -----------------------------------------------------------------------

    @contextmanager
    def straight_to(self, options: SaveOptions) -> Iterator[None]:
        """What is held of layers that are done is on disk inside the block, beside the directory
        that is to be written. Raises SaveError for a place that must not be written to."""
        target, _ = checked_target(self._loaded.path, options)
        with scratch_for(target) as self._scratch:
            try:
                yield
            finally:
                self._scratch = None

    def hold(self, layer: LayerDelta) -> LayerDelta:
        """See ResidentModel.hold."""
        scratch = self._scratch or self._own_scratch
        return layer if scratch is None else scratch.keep(layer)

    def trial(self, delta: Delta) -> AbstractContextManager[Trial]:
        """See ResidentModel.trial."""
        keep = None if self._scratch is None else self._scratch.keep
        return self.resident.trial(delta, keep)

    def require_room(self, need: Need, what: str, advice: str) -> None:
        """See Workspace.require_room. Lets go of what is kept for undo before it refuses."""
        if self._scratch is not None:
            self._scratch.require_space(need.disk + self.export().total_bytes())
            require(need.straight, what, advice, self.editor.replaced.let_go)
            return
        store = self.resident.store
        if self._own_scratch is not None and store is not None:
            self._own_scratch.require_space(sum(need.layers))
            require(store.largest + need.straight, what, advice)
            return
        if fits(need.straight):
            advice = f"go straight to disk with --to PATH, or {advice}"
        require(need.staged, what, advice, self.editor.replaced.let_go)
