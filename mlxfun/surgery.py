"""The only place that reads, slices and reassigns a model's tensors.

Everything here works on parameter paths as `model.parameters()` names them. Slicing along the
expert dimension is exact for packed quantised tensors too, since packing runs along the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def flatten(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every parameter in a tree, in order."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


class ParameterTree:
    """Parameters of one model by path. The module table is made once; swaps are dict writes."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self.paths = tuple(path for path, _ in flatten(model.parameters()))

    def _locate(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self._modules[owner], name

    def get(self, path: str) -> mx.array:
        """The array at `path`."""
        module, name = self._locate(path)
        array = module[name]
        if not isinstance(array, mx.array):
            raise TypeError(f"{path} is not a parameter but {type(array).__name__}")
        return array

    def put(self, path: str, array: mx.array) -> None:
        """Reassign `path`. Taps and module identity are untouched."""
        module, name = self._locate(path)
        module[name] = array

    def get_list(self, path: str) -> list[nn.Module]:
        """A list of submodules (dbrx's experts)."""
        module, name = self._locate(path)
        value: list[nn.Module] = module[name]
        return value

    def put_list(self, path: str, modules: list[nn.Module]) -> None:
        """Replace a list of submodules."""
        module, name = self._locate(path)
        module[name] = modules

    def get_attribute(self, path: str, name: str) -> Any:
        """A plain attribute of the module at `path`."""
        return vars(self._modules[path])[name]

    def put_attribute(self, path: str, name: str, value: Any) -> None:
        """Set a plain attribute of the module at `path`."""
        setattr(self._modules[path], name, value)


def take_rows(array: mx.array, rows: Sequence[int], tail: int = 0) -> mx.array:
    """Rows of the first dimension plus the last `tail` rows, in order; dtype and packing kept."""
    total = array.shape[0]
    index = [*rows, *range(total - tail, total)]
    if index == list(range(total)):
        return array
    return mx.take(array, mx.array(np.array(index, dtype=np.uint32)), axis=0)


def rounded(array: mx.array, dtype: mx.Dtype, resident: mx.Dtype) -> mx.array:
    """An edited tensor rounded to its stored `dtype`, held as `resident`.

    On the CPU backend 16-bit models are resident in float32; what is previewed must be what will
    be saved, so the rounding happens when the edit is made.
    """
    return array.astype(dtype).astype(resident)


def nbytes_as(array: mx.array, dtype: mx.Dtype) -> int:
    """Bytes of `array` when written as `dtype`."""
    return int(array.size) * int(dtype.size)
