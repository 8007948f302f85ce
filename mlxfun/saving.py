"""Between a session and the checkpoint on disk: what to write, and how to read tensors back."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlxfun.checkpoint.identity import checkpoint_id
from mlxfun.checkpoint.load import Loaded
from mlxfun.deltas import Reader
from mlxfun.errors import ModelError, SaveError
from mlxfun.reports import SaveReport


def open_checkpoint(loaded: Loaded, dtypes: Callable[[str], mx.Dtype]) -> Reader:
    """A reader of single parameters as stock loading makes them from the checkpoint.

    The model is built lazily, so only the tensors that are asked for are read. dtypes: the
    resident dtype of a parameter. Raises ModelError if the files are not those that were loaded.
    """
    if checkpoint_id(loaded.path) != loaded.checkpoint_id:
        raise ModelError(
            f"{loaded.path} is not the checkpoint that was loaded any more, so pruned experts "
            "cannot be read back from it; restore the files, or reload"
        )
    model, _ = load_model(loaded.path, lazy=True)
    arrays = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))

    def read(path: str) -> mx.array:
        array = arrays[path].astype(dtypes(path))
        mx.eval(array)
        return array

    return read


def save(*args: object) -> SaveReport:
    raise SaveError("saving is being written")
