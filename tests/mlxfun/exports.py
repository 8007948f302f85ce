"""Exports for the tests of saving: an unpruned model as loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxfun.checkpoint.load import Loaded, load
from mlxfun.checkpoint.save import Export


@dataclass
class Dictionary:
    """Weights from a dictionary; `asked` records every tensor that was handed out."""

    arrays: dict[str, mx.array]
    asked: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

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
