"""The slots of one MoE layer: stacked arrays of some of its experts, and which are where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.memory.slots.choice import Usage
from mlxfun.memory.slots.reader import FileReader, Wanted
from mlxfun.memory.slots.sources import LayerSource, StackSource

if TYPE_CHECKING:
    from mlxfun.arrays import Array

ABSENT = -1

MOST_WAITING = 32 << 20
"""Bytes of experts that are written to slots in one evaluation; until then they are held twice."""


class LayerBank:
    """C slots, of which each holds one expert of all stacked parameters of a layer.

    source: where they lie. dtypes: that each parameter is held in, by path. arrays: path -> [C, ...], written in place.
    slot_of: int [E], ABSENT for an expert that is on disk only.
    """

    def __init__(
        self,
        source: LayerSource,
        dtypes: Mapping[str, mx.Dtype],
        capacity: int,
        reader: FileReader,
    ) -> None:
        self.source, self._dtypes, self._reader = source, dtypes, reader
        self.experts = source.experts
        self.usage = Usage(self.experts)
        self.evictions = 0
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity = min(capacity, self.experts)
        self.arrays = {
            path: mx.zeros((self.capacity, *shape), self._dtypes[path])
            for path, (shape, _) in self.source.held.items()
        }
        mx.eval(list(self.arrays.values()))
        self.slot_of: Array = np.full(self.experts, ABSENT, np.int64)

    def resize(self, capacity: int) -> None:
        """Have another number of slots, with the most used experts of those held in them."""
        keep = self.usage.ranked(self.resident)[-capacity:]
        self.arrays.clear()  # before the new ones take memory
        self._allocate(capacity)
        self.hold(keep)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert on disk."""
        return sum(source.nbytes for source in self.source.stacks.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in memory."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    @property
    def resident(self) -> list[int]:
        """The experts in slots, ascending."""
        return [int(e) for e in np.flatnonzero(self.slot_of != ABSENT)]

    def absent(self, experts: Iterable[int]) -> list[int]:
        """Those of `experts` that are in no slot, ascending."""
        return sorted(e for e in experts if self.slot_of[e] == ABSENT)

    def hold(self, experts: Sequence[int], ready: Mapping[int, Buffers] | None = None) -> list[int]:
        """Have `experts`, no more than there are slots, in slots; the ones that were read.

        Those that were used least make room. ready: experts whose bytes were read ahead. Raises
        ModelError if one cannot be read; the slots then hold what they held.
        """
        missing = self.absent(experts)
        if not missing:
            return []
        ahead = ready or {}
        unread = [e for e in missing if e not in ahead]
        buffers = {e: ahead[e] for e in missing if e in ahead} | read(
            self.source.stacks, unread, self._reader
        )
        slots, waiting = self._room(len(missing), set(experts)), 0
        for expert, slot in zip(missing, slots, strict=True):
            self._write(slot, buffers[expert])
            self.slot_of[expert] = slot
            waiting += self.expert_bytes
            if waiting > MOST_WAITING:
                mx.eval(list(self.arrays.values()))
                waiting = 0
        mx.eval(list(self.arrays.values()))
        return missing

    def drop(self, experts: Iterable[int]) -> None:
        """Let experts leave their slots."""
        for expert in experts:
            self.slot_of[expert] = ABSENT

    def _room(self, count: int, keep: set[int]) -> list[int]:
        """`count` slots, free ones first; the experts in the others are no longer held."""
        held = self.resident
        free = sorted(set(range(self.capacity)) - {int(self.slot_of[e]) for e in held})
        out = self.usage.ranked(e for e in held if e not in keep)[: max(count - len(free), 0)]
        slots = [*free[:count], *(int(self.slot_of[e]) for e in out)]
        self.drop(out)
        self.evictions += len(out)
        return slots

    def _write(self, slot: int, rows: Buffers) -> None:
        made = self.source.made({name: row[None] for name, row in rows.items()})
        for path, (shape, _) in self.source.held.items():
            # With a whole number as index this writes in place, if nothing else holds the array.
            self.arrays[path][slot] = made[path].reshape(shape).astype(self._dtypes[path])


@dataclass(frozen=True, slots=True)
class StackOnDisk:
    """A whole stack as it is stored, which a model of which experts are in slots is saved with."""

    path: str
    source: LayerSource
    reader: FileReader

    def lazy(self) -> mx.array:
        """The stack [E, *shape] as stored, read now. Raises ModelError."""
        stacks = self.source.stacks
        needed = stacks if self.source.convert else {self.path: stacks[self.path]}
        rows = {
            name: np.empty((len(one.places), one.nbytes), np.uint8) for name, one in needed.items()
        }
        self.reader.read(
            Wanted(file, start, row.data)
            for name, one in needed.items()
            for row, (file, start) in zip(rows[name], one.places, strict=True)
        )
        return replace(self.source, stacks=needed).made(rows)[self.path]


Buffers = Mapping[str, "Array"]
"""The bytes of one expert by name of what is read, uint8 [nbytes]."""


def read(
    sources: Mapping[str, StackSource], experts: Sequence[int], reader: FileReader
) -> dict[int, Buffers]:
    """The bytes of some experts, all in one go. Touches no MLX, so any thread may call it."""
    found: dict[int, dict[str, Array]] = {}
    wanted = []
    for expert in experts:
        rows = {path: np.empty(source.nbytes, np.uint8) for path, source in sources.items()}
        found[expert] = rows
        for path, source in sources.items():
            file, start = source.places[expert]
            wanted.append(Wanted(file, start, rows[path].data))
    if wanted:
        reader.read(wanted)
    return dict(found)
