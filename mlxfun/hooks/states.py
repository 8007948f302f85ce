"""Hidden states of many batches on their way through a model: in memory, or in files above a bound."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import finalize

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from mlxfun.arrays import Array

BOUND = 1 << 30
"""Bytes of hidden states that are held in memory, where they may go to disk."""

_BITS = {1: (np.uint8, mx.uint8), 2: (np.uint16, mx.uint16), 4: (np.uint32, mx.uint32)}
"""Unsigned integers of so many bytes: NumPy has no bfloat16."""


class States:
    """One array for each number, replaced again and again by one of the same shape.

    directory: where files go once `bound` bytes are held; None to hold everything. They are
    removed with this object.
    """

    def __init__(self, directory: Path | None = None, bound: int = BOUND) -> None:
        self._held: dict[int, mx.array] = {}
        self._mapped: dict[int, tuple[Array, mx.Dtype]] = {}
        self._bytes, self._bound = 0, bound
        self._parent = directory
        self._own: Path | None = None

    def put(self, number: int, array: mx.array) -> None:
        """Keep `array`, evaluated, as the state of a number."""
        if number not in self._mapped and not self._fits(number, array):
            self._map(number, array)
        if number in self._mapped:
            self._mapped[number][0][...] = _integers(array)
        else:
            self._held[number] = array

    def get(self, number: int) -> mx.array:
        """The state of a number, bit for bit as it was put."""
        if number in self._held:
            return self._held[number]
        host, dtype = self._mapped[number]
        found = mx.array(np.asarray(host)).view(dtype)
        mx.eval(found)
        return found

    def pop(self, number: int) -> mx.array:
        """The state of a number, which is not kept any longer."""
        found = self.get(number)
        if number in self._mapped:
            del self._mapped[number]
        else:
            del self._held[number]
            self._bytes -= 0 if self._parent is None else found.nbytes
        return found

    @property
    def spilled(self) -> int:
        """Bytes that are in files."""
        return sum(int(host.nbytes) for host, _ in self._mapped.values())

    def _fits(self, number: int, array: mx.array) -> bool:
        if number in self._held or self._parent is None:
            return True
        if self._bytes + array.nbytes > self._bound:
            return False
        self._bytes += array.nbytes
        return True

    def _map(self, number: int, array: mx.array) -> None:
        assert self._parent is not None
        if self._own is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._own = Path(tempfile.mkdtemp(prefix="states-", dir=self._parent))
            finalize(self, shutil.rmtree, self._own, True)
        kind, _ = _BITS[array.dtype.size]
        file = self._own / f"{number:06d}"
        self._mapped[number] = (
            np.memmap(file, dtype=kind, mode="w+", shape=tuple(array.shape)),
            array.dtype,
        )


def _integers(array: mx.array) -> Array:
    """The bits of an array, on the host."""
    host: Array = np.array(array.view(_BITS[array.dtype.size][1]))
    return host
