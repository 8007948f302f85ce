"""Deltas: the new arrays, attributes and expert lists that an edit swaps into a resident model.

`swap` exchanges a delta with what the model holds and returns the inverse, so staging, A/B, apply,
undo and redo are one operation. MLX arrays are immutable and reference-counted: for a virtual
prune this moves kilobytes of router rows and an index map, whatever the model's size.

Arrays that can be had again are not held: `FromCheckpoint` reads rows back from disk,
`FromResident` slices what the model holds, `FromFile` was written aside while an edit goes straight
to disk. Only tensors that an edit made are kept, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from mlxfun.context import SILENT, Context
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.anatomy.layers import in_order
from mlxfun.model.anatomy.types import SlicedRole
from mlxfun.model.experts import neurons_of
from mlxfun.model.identity import Ledger, Rows
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.mlps import Mlp, mlps_of
from mlxfun.model.parameters import ParameterTree, take_rows
from mlxfun.model.places import (
    FromCheckpoint,
    FromFile,
    FromResident,
    LayerStore,
    OpenCheckpoint,
    Reader,
    Source,
)


@dataclass(frozen=True, slots=True)
class LayerDelta:
    """What changes in one decoder layer.

    position: of its MoE layer, None for a layer without experts. arrays: parameter path -> new
    array or where it comes from. rows: path -> identity of its rows, None for as in the
    checkpoint. counts: (module path, attribute) -> expert count. live/resident: the experts that
    route, and those in the stack, in checkpoint numbers. modules: list path -> submodules (dbrx).
    made: the paths whose array an edit made.
    """

    position: int | None
    live: tuple[int, ...] = ()
    resident: tuple[int, ...] = ()
    arrays: Mapping[str, Source] = field(default_factory=dict)
    rows: Mapping[str, Rows | None] = field(default_factory=dict)
    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    modules: Mapping[str, list[nn.Module]] = field(default_factory=dict)
    made: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        """Bytes of the arrays that an edit made and this delta holds."""
        return sum(
            a.nbytes for p, a in self.arrays.items() if isinstance(a, mx.array) and p in self.made
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """Changes of one edit. release: let go of replaced arrays that can be read back."""

    layers: tuple[LayerDelta, ...]
    release: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of edit-made arrays held."""
        return sum(layer.bytes for layer in self.layers)


Keep = Callable[[LayerDelta], LayerDelta]
"""What is held of a layer's delta in its place, e.g. with arrays that were written to a file."""


class Trial:
    """A delta that is being tried, see Resident.trial."""

    def __init__(self, resident: Resident, delta: Delta, keep: Keep | None = None) -> None:
        self._resident, self._delta, self._live = resident, delta, False
        self._keep = keep
        self._other: Delta | None = None  # with `keep`: the way that was gone last, unchanged

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model without the delta inside the block."""
        self.go(False)
        try:
            yield
        finally:
            self.go(True)

    def go(self, live: bool) -> None:
        """Swap the delta in or out."""
        if live == self._live:
            return
        if self._keep is None:
            self._delta = self._resident.swap(self._delta)
        else:
            # Both ways are kept after the first time: nothing that is swapped out is held.
            inverse = self._resident.swap(self._delta, keep=self._keep, known=self._other)
            self._delta, self._other = inverse, self._delta
        self._live = live


class Resident:
    """A resident model with the ledger of its rows: what deltas are swapped into.

    layers: the live experts of each MoE layer, [L].
    """

    def __init__(self, model: nn.Module, anatomy: MoEMap, checkpoint: OpenCheckpoint) -> None:
        self.tree = ParameterTree(model)
        self.anatomy = anatomy
        self.layers = tuple(LiveExperts(layer) for layer in anatomy.layers)
        self.ledger: Ledger = {}
        self.stack: list[tuple[int, ...]] = [experts.live for experts in self.layers]
        self.version = 0  # counts swaps, so that what was derived from the weights can be kept
        self.made: set[str] = set()  # paths whose array an edit made: it exists nowhere else
        self._widths = self.expert_widths
        self.mlps = mlps_of(in_order(model), anatomy)
        self._mlp_widths = self.mlp_widths
        self._checkpoint = checkpoint
        self._reader: Reader | None = None
        self.store: LayerStore | None = None  # of a model that is read layer by layer

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Decoder layer `index` is in memory inside the block, as it always is of most models."""
        with nullcontext() if self.store is None else self.store.layer(index):
            yield

    @contextmanager
    def module(self, path: str) -> Iterator[None]:
        """The parameters of the module at `path` are in memory inside the block."""
        with nullcontext() if self.store is None else self.store.module(path):
            yield

    def fresh(self, path: str) -> mx.array:
        """The tensor at `path`; one that is on disk is read when this is evaluated, and nothing
        else holds it."""
        return self.tree.get(path) if self.store is None else self.store.fresh(path)

    def require_checkpoint(self) -> None:
        """Raise ModelError if what a release lets go of could not be read back."""
        self._checkpoint()

    def made_bytes(self, delta: Delta) -> int:
        """Bytes of edit-made arrays that swapping `delta` in would take out of the model, which is
        what its inverse would hold."""
        paths = (path for layer in delta.layers for path in layer.arrays)
        held = (path for path in paths if path in self.made and self._place(path) is None)
        return sum(self.tree.get(path).nbytes for path in held)

    def _place(self, path: str) -> Source | None:
        return None if self.store is None else self.store.place(path)

    def swap(
        self,
        delta: Delta,
        ctx: Context = SILENT,
        keep: Keep | None = None,
        known: Delta | None = None,
    ) -> Delta:
        """Exchange `delta` with what the model holds; the returned inverse undoes it bit for bit.

        Layer by layer, so that a compact needs one layer's extra memory. A cancel or failure
        between layers swaps back what was done and leaves the model as it was. keep: what is held
        of each layer's inverse. known: the inverse, where it is held already.
        """
        done: list[LayerDelta] = []
        try:
            for number, layer in enumerate(delta.layers):
                ctx.check()
                inverse = self._swap_layer(layer, delta.release)
                if known is not None:
                    done.append(known.layers[number])
                    continue
                done.append(inverse)
                if keep is not None:
                    done[-1] = keep(inverse)
                    del inverse
                if delta.release:
                    ctx.progress("layers", number + 1, len(delta.layers), "layers")
        except BaseException:
            for way_back in reversed(done):
                self._swap_layer(way_back, delta.release)
            raise
        finally:
            self._reader = None
        return Delta(tuple(done), delta.release)

    @contextmanager
    def trial(self, delta: Delta, keep: Keep | None = None) -> Iterator[Trial]:
        """The model with `delta` inside the block, and as before after it, whatever happens.

        keep: what is held of what is replaced; `delta` must then hold no arrays of its own either.
        Steering is not put in force anew: try deltas without steering.
        """
        trial = Trial(self, delta, keep)
        trial.go(True)
        try:
            yield trial
        finally:
            trial.go(False)

    def _swap_layer(self, delta: LayerDelta, release: bool) -> LayerDelta:
        old_arrays = {path: self.tree.get(path) for path in delta.arrays}
        old_rows = {path: self.ledger.get(path) for path in delta.rows}
        # Everything is resolved and evaluated before the first write.
        new = {
            path: self._resolve(path, source, old_arrays[path])
            for path, source in delta.arrays.items()
        }
        mx.eval([array for path, array in new.items() if not self._rests(path, delta.arrays[path])])
        inverse = LayerDelta(
            position=delta.position,
            live=() if delta.position is None else self.layers[delta.position].live,
            resident=() if delta.position is None else self.stack[delta.position],
            arrays={
                path: self._inverse_source(path, source, old_arrays[path], delta, release)
                for path, source in delta.arrays.items()
            },
            rows=old_rows,
            counts={key: self.tree.get_attribute(*key) for key in delta.counts},
            modules={path: self.tree.get_list(path) for path in delta.modules},
            made=frozenset(self.made & delta.arrays.keys()),
        )
        self._write(delta, new)
        return inverse

    @property
    def expert_bytes(self) -> int:
        """Bytes of the expert stacks in memory."""
        paths = (p.path for moe in self.layers for p in moe.layer.expert_parameters())
        return sum(self.tree.get(path).nbytes for path in paths)

    @property
    def expert_widths(self) -> tuple[int | None, ...]:
        """The neurons of an expert of each MoE layer, None where they are no known stack, [L]."""
        return tuple(neurons_of(moe.layer.experts, self.tree.modules) for moe in self.layers)

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """The neurons of each of `mlps`, the MLPs beside the routed experts."""
        return tuple(mlp.width(self.tree.modules) for mlp in self.mlps)

    @property
    def resized_mlps(self) -> tuple[tuple[Mlp, int], ...]:
        """The MLPs that have another width than the checkpoint's, and that one."""
        pairs = zip(self.mlps, self._mlp_widths, self.mlp_widths, strict=True)
        return tuple((mlp, before) for mlp, before, now in pairs if before != now)

    @property
    def narrowed(self) -> bool:
        """Whether the experts have another width than the checkpoint's."""
        return self.expert_widths != self._widths

    @property
    def checkpoint_widths(self) -> tuple[int | None, ...]:
        """`expert_widths` of the checkpoint."""
        return self._widths

    def readable_bytes(self, delta: Delta) -> int:
        """Bytes of the arrays that `delta` holds and `released` would leave to the checkpoint."""
        return sum(
            source.nbytes
            for layer in delta.layers
            for path, source in layer.arrays.items()
            if isinstance(source, mx.array) and path in self._spared(layer)
        )

    def _spared(self, layer: LayerDelta) -> set[str]:
        """The paths of a delta's arrays that can be read from the checkpoint. Routers are kept all
        the same: they are small, and undoing a prune reads nothing."""
        return layer.arrays.keys() - layer.made - self._paths(layer.position, "router")

    def released(self, delta: Delta) -> Delta:
        """A delta that leads back, without what can be read from the checkpoint."""
        layers, gone = [], 0
        for layer in delta.layers:
            spared = self._spared(layer)
            gone += len(spared)
            arrays = {
                path: FromCheckpoint(self._checkpoint_rows(layer.position, path, layer.resident))
                if path in spared
                else source
                for path, source in layer.arrays.items()
            }
            layers.append(replace(layer, arrays=arrays))
        return Delta(tuple(layers), release=True) if gone else delta

    def _paths(self, position: int | None, role: SlicedRole) -> set[str]:
        """Parameters of one role in an MoE layer; none elsewhere."""
        if position is None:
            return set()
        parameters = self.layers[position].layer.parameters
        return {p.path for p in parameters if p.role == role}

    def _checkpoint_rows(
        self, position: int | None, path: str, stack: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """The checkpoint's rows of `path` while its layer holds `stack`, None for all."""
        if position is None or path not in self._paths(position, "expert"):
            return None
        whole = stack == tuple(range(self.layers[position].layer.num_experts))
        return None if whole else stack

    def _write(self, delta: LayerDelta, new: dict[str, mx.array]) -> None:
        self.version += 1
        for path, array in new.items():
            # Rows of what an edit made are made as well.
            if path in delta.made:
                self.made.add(path)
            elif not isinstance(delta.arrays[path], FromResident):
                self.made.discard(path)
            self._put(path, delta.arrays[path], array)
        for list_path, modules in delta.modules.items():
            self.tree.put_list(list_path, modules)
        for (module, name), value in delta.counts.items():
            self.tree.put_attribute(module, name, value)
        for path, rows in delta.rows.items():
            if rows is None:
                self.ledger.pop(path, None)
            else:
                self.ledger[path] = rows
        if delta.position is not None:
            self.stack[delta.position] = delta.resident
            self.layers[delta.position].set(delta.live, delta.resident)

    def _put(self, path: str, source: Source, array: mx.array) -> None:
        if self.store is None:
            self.tree.put(path, array)
        else:
            self.store.put(path, source, array)

    def _rests(self, path: str, source: Source) -> bool:
        return self.store is not None and self.store.holds(path, source)

    def _resolve(self, path: str, source: Source, old: mx.array) -> mx.array:
        if self.store is not None and self.store.holds(path, source):
            return self.store.resting(path, source)
        if isinstance(source, FromResident):
            return take_rows(old, source.rows)
        if isinstance(source, FromCheckpoint):
            # Opened once a swap: opening is lazy, but lists every tensor of the checkpoint.
            self._reader = self._reader or self._checkpoint()
            whole = self._reader(path)
            return whole if source.rows is None else take_rows(whole, source.rows)
        return source.read() if isinstance(source, FromFile) else source

    def _inverse_source(
        self, path: str, source: Source, old: mx.array, delta: LayerDelta, release: bool
    ) -> Source:
        place = self._place(path)
        if place is not None:
            return place
        if not release or path in self.made:
            return old
        stack = () if delta.position is None else self.stack[delta.position]
        if isinstance(source, FromCheckpoint) and path in self._paths(delta.position, "expert"):
            # Undoing a release: what is replaced is part of what comes back.
            return FromResident(tuple(delta.resident.index(e) for e in stack))
        return FromCheckpoint(self._checkpoint_rows(delta.position, path, stack))
