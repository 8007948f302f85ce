"""Tensors set aside on disk while an edit goes straight to a new model directory.

They lie in a hidden directory beside the destination, named like those of saves that are not
finished, so that what a killed process leaves is removed by the next save there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlxfun.checkpoint.replacing import atomic
from mlxfun.checkpoint.replacing.unfinished import recorded
from mlxfun.checkpoint.save import beside, failures, require_space
from mlxfun.model.delta import LayerDelta
from mlxfun.model.places import FromFile, Source


class Scratch:
    """Writes the arrays of layers' deltas to files, a file a layer."""

    def __init__(self, directory: Path, target: Path) -> None:
        """target: the destination, for messages."""
        self._directory, self._target = directory, target
        self._files = 0

    def keep(self, layer: LayerDelta) -> LayerDelta:
        """The delta with its arrays on disk, bit for bit; nothing of them stays in memory.

        Raises SaveError for whatever the file system refuses.
        """
        held = {p: a for p, a in layer.arrays.items() if isinstance(a, mx.array)}
        if not held:
            return layer
        file = self._directory / f"{self._files:05d}.safetensors"
        self._files += 1
        with failures(self._target):
            mx.save_safetensors(str(file), held)
        arrays: dict[str, Source] = {
            path: FromFile(file, path, tuple(array.shape), array.dtype)
            if isinstance(array, mx.array)
            else array
            for path, array in layer.arrays.items()
        }
        return replace(layer, arrays=arrays)

    def require_space(self, needed: int) -> None:
        """Raise BudgetError unless so many bytes are free where the destination is."""
        require_space(self._target, needed)


@contextlib.contextmanager
def scratch_for(target: Path) -> Iterator[Scratch]:
    """A scratch beside `target`, gone when the block ends. Raises SaveError."""
    with contextlib.ExitStack() as stack:
        with failures(target):
            directory = stack.enter_context(beside(target))
        yield Scratch(directory, target)


def own_directory(parent: Path) -> Path:
    """A new directory in `parent` for this process; those of dead processes are removed there.

    Raises SaveError for whatever the file system refuses.
    """
    with failures(parent):
        parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep(parent, recorded)
        return atomic.temporary_sibling(parent / "layers")
