"""Where tensors are: in the checkpoint, in a file, in the model; and layers that are in memory only
while they run.

A model may be larger than memory. Then no tensor of a decoder layer is held: each is an array that
was not read yet, and is read when its layer runs and let go of after it (`LayerStore`). What an
edit made of such a tensor is in a file, and read in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from mlxfun.errors import ModelError
from mlxfun.model.parameters import ParameterTree
from mlxfun.text import readable_bytes

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class FromCheckpoint:
    """Rows of the checkpoint's tensor at the same path; None is the whole tensor."""

    rows: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class FromResident:
    """Rows of the tensor that the model holds at the same path."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FromFile:
    """A whole tensor in a safetensors file that this process wrote, under `name`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def lazy(self) -> mx.array:
        """The tensor, read when it is evaluated."""
        held = cast(dict[str, mx.array], mx.load(str(self.file)))
        return held[self.name]

    def read(self) -> mx.array:
        """The tensor, evaluated. Raises ModelError."""
        try:
            array = self.lazy()
            mx.eval(array)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise ModelError(f"{self.name} cannot be read from {self.file}: {error}") from error
        return array

    def placeholder(self) -> mx.array:
        """An array of this shape and dtype that takes no memory; its values mean nothing."""
        return mx.broadcast_to(mx.zeros((), self.dtype), self.shape)


Source = mx.array | FromCheckpoint | FromResident | FromFile
Reader = Callable[[str], mx.array]
"""Reads a whole parameter back from the checkpoint, as it was loaded."""

OpenCheckpoint = Callable[[], Reader]
"""Checks that the checkpoint is still the one that was loaded and opens it, for one swap."""

Stored = FromCheckpoint | FromFile
"""A place on disk that holds a whole tensor."""

Unread = Callable[[], dict[str, mx.array]]
"""Opens the checkpoint: every parameter by path, as stock loading makes it, none of them read.
Raises ModelError if the files are not those that were loaded."""

_OWNER = "_layer_store"


class LayerStore:
    """The decoder layers of a model whose tensors stay on disk while their layer does not run.

    At rest the model holds unread arrays. `layer` reads those of one layer, and puts the unread
    ones back at its end, which frees what was read.
    """

    def __init__(
        self,
        tree: ParameterTree,
        layers: Sequence[str],
        unread: Unread,
        require_unchanged: Callable[[], None],
    ) -> None:
        """layers: paths of the decoder layers, in order. The model must hold unread arrays there.

        require_unchanged: raises ModelError if the checkpoint's files are not those that were
        loaded; asked after each reading.
        """
        self._tree, self._open = tree, unread
        self._require_unchanged = require_unchanged
        self.paths = tuple(
            tuple(path for path in tree.paths if path.startswith(f"{layer}.")) for layer in layers
        )
        self.numbers = {layer: number for number, layer in enumerate(layers)}
        self._number = {path: n for n, paths in enumerate(self.paths) for path in paths}
        self._first = {path: tree.get(path) for path in self._number}  # never evaluated
        self._resting = dict(self._first)
        self._places: dict[str, Stored] = dict.fromkeys(self._number, FromCheckpoint(None))
        self._unread: dict[str, mx.array] = {}
        self._users = [0] * len(layers)
        self._captured: dict[str, mx.array] = {}
        self.capturing = False
        self.scratch: Path | None = None  # a directory for what does not fit in memory
        self.passes: Path | None = None  # one for what a killed process leaves to the next
        self.identity: Callable[[], str] = str  # of the weights that are live
        self.verdict: str | None = None  # why layers cannot be replayed; "" if they can
        self.tested = 0  # the longest sequence that this was tested with
        self.after_read: Callable[[int], object] = lambda _: None  # told of a layer's number
        self.reads = 0  # of layers, so far
        self.on_disk = self.total  # bytes that one reading takes from disk
        self._bytes, self._seconds = 0, 0.0
        vars(tree.modules[""])[_OWNER] = self

    @classmethod
    def of(cls, model: nn.Module) -> LayerStore | None:
        """The store of a model, None for one that is in memory."""
        found = vars(model).get(_OWNER)
        return found if isinstance(found, cls) else None

    # -- sizes --------------------------------------------------------------------------------

    def nbytes(self, number: int) -> int:
        """Bytes of a decoder layer in memory."""
        return sum(self._tree.get(path).nbytes for path in self.paths[number])

    @property
    def largest(self) -> int:
        """Bytes of the largest layer."""
        return max((self.nbytes(n) for n in range(len(self.paths))), default=0)

    @property
    def total(self) -> int:
        """Bytes that one reading of all layers takes in memory, one layer after the other."""
        return sum(self.nbytes(number) for number in range(len(self.paths)))

    def cost(self, times: int = 1) -> str:
        """What reading the model so many times takes, as part of a sentence: bytes, and seconds at
        the rate that layers were read with so far."""
        size = readable_bytes(times * self.on_disk)
        if not self.reads:
            return size
        seconds = times * self.total * self._seconds / max(self._bytes, 1)
        return f"{size}, {seconds:,.0f} s at the rate so far"

    # -- running ------------------------------------------------------------------------------

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Decoder layer `number` is in memory inside the block. Nests. Raises ModelError."""
        if not self._users[number]:
            began = perf_counter()
            self._read(self.paths[number])
            self._seconds += perf_counter() - began
            self._bytes += self.nbytes(number)
            self.reads += 1
            self.after_read(number)
        self._users[number] += 1
        try:
            yield
        finally:
            self._users[number] -= 1
            if not self._users[number]:
                self._let_go(self.paths[number])

    @contextmanager
    def captured(self, number: int) -> Iterator[None]:
        """What is built inside the block, without evaluating it, is of the arrays with which that
        layer will be read the next time."""
        for path in self.paths[number]:
            if path in self._places:
                self._captured[path] = self.fresh(path)
                self._tree.put(path, self._captured[path])
        try:
            yield
        finally:
            self._rest(self.paths[number])

    def forget_captured(self) -> None:
        """Layers are read with arrays of their own again."""
        self._captured.clear()

    def in_use(self, number: int) -> bool:
        """Whether a block holds that layer in memory."""
        return self._users[number] > 0

    @contextmanager
    def module(self, module: str) -> Iterator[None]:
        """The parameters of one module are in memory inside the block. Raises ModelError."""
        paths = [path for path in self._number if path.startswith(f"{module}.")]
        waiting = [path for path in paths if not self._users[self._number[path]]]
        self._read(waiting)
        try:
            yield
        finally:
            self._let_go(waiting)

    def _read(self, paths: Sequence[str]) -> None:
        stored = [path for path in paths if path in self._places]
        path = ""
        try:
            for path in stored:
                found = self._captured.pop(path, None)
                self._tree.put(path, self.fresh(path) if found is None else found)
            # One at a time: a cast holds two copies of what is evaluated together.
            for path in stored:
                mx.eval(self._tree.get(path))
            if stored:
                self._require_unchanged()
        except (RuntimeError, ValueError) as error:
            self._let_go(paths)
            self._require_unchanged()
            said = " ".join(str(error).split())[:240]
            raise ModelError(f"{path} cannot be read: {said}") from error
        except BaseException:
            self._let_go(paths)
            raise

    def _let_go(self, paths: Sequence[str]) -> None:
        self._rest(paths)
        mx.clear_cache()

    def _rest(self, paths: Sequence[str]) -> None:
        for path in paths:
            if path in self._places:
                self._tree.put(path, self._resting[path])

    # -- tensors ------------------------------------------------------------------------------

    def place(self, path: str) -> Stored | None:
        """Where the tensor at `path` is on disk, None for one that is in memory."""
        return self._places.get(path)

    def holds(self, path: str, source: Source) -> bool:
        """Whether a tensor from `source` would stay on disk at `path`."""
        if path not in self._number:
            return False
        return isinstance(source, FromFile) or source == FromCheckpoint(None)

    def resting(self, path: str, source: Source) -> mx.array:
        """The unread array of a source that `holds`."""
        return source.lazy() if isinstance(source, FromFile) else self._first[path]

    def put(self, path: str, source: Source, array: mx.array) -> None:
        """The model holds `array` at `path` from now on, which is from `source`."""
        self._captured.pop(path, None)
        if path not in self._number:
            self._tree.put(path, array)
            return
        if not isinstance(source, FromFile | FromCheckpoint) or not self.holds(path, source):
            self._places.pop(path, None)
            self._resting.pop(path, None)
            self._tree.put(path, array)
            return
        self._places[path], self._resting[path] = source, array
        # What runs now is another array than the one that rests, which must stay unread.
        self._tree.put(path, self.fresh(path) if self._users[self._number[path]] else array)

    def fresh(self, path: str) -> mx.array:
        """The tensor at `path` as an array that nobody else holds: evaluate it, and let it go."""
        place = self._places.get(path)
        if place is None:
            return self._tree.get(path)
        if isinstance(place, FromFile):
            return place.lazy()
        if path not in self._unread:
            # Unread arrays keep their files open: those of the last opening go first.
            self._unread.clear()
            self._unread = {p: array for p, array in self._open().items() if p in self._number}
        return self._unread.pop(path).astype(self._first[path].dtype)
