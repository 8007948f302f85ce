"""For the tests of saving: exports of unpruned models, and what is on disk afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxfun.checkpoint.headers import read_headers
from mlxfun.checkpoint.load import Loaded, load
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.save import Export, write
from mlxfun.context import Context
from mlxfun.errors import Cancelled, SaveError


@dataclass
class Dictionary:
    """Weights from a dictionary; `asked` records every tensor that was handed out."""

    arrays: dict[str, mx.array]
    asked: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def dtype(self, name: str) -> mx.Dtype:
        return self.arrays[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.arrays[name].shape)

    def nbytes(self, name: str) -> int:
        return int(self.arrays[name].nbytes)

    def tensor(self, name: str) -> mx.array:
        self.asked.append(name)
        return self.arrays[name]


def stored_weights(loaded: Loaded) -> Dictionary:
    """Every parameter in the dtype it has on disk."""
    return Dictionary(
        {
            path: array.astype(loaded.stored_dtypes[path])
            for path, array in tree_flatten(loaded.model.parameters())
        }
    )


def export_of(source: Path | str, **changes: Any) -> Export:
    """An export of the model at `source`, ready for `write`."""
    loaded = load(source)
    facts: dict[str, Any] = {
        "weights": stored_weights(loaded),
        "config": loaded.config,
        "source": loaded.path,
        "model_id": loaded.model_id,
        "checkpoint_id": loaded.checkpoint_id,
        "experts": 8,
        "logits": loaded.model,
    }
    return Export(**(facts | changes))


def on_disk(path: Path) -> dict[str, mx.array]:
    """The tensors of a checkpoint as its files hold them."""
    arrays: dict[str, mx.array] = {}
    for header in read_headers(path):
        arrays |= mx.load(str(header.path))
    return arrays


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file below `path`."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def refused(tmp_path: Path, export: Any, message: str) -> None:
    """Saving fails with `message` and leaves only the model it came from."""
    with pytest.raises(SaveError, match=message):
        write(export, SaveOptions(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


class StopAt(Context):
    """Cancel (or call `end`) at the n-th check."""

    def __init__(self, n: int, end: Callable[[], None] | None = None) -> None:
        self.left, self.end = n, end

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.end:
                self.end()
            raise Cancelled("cancelled")
