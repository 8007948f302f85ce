"""Reads, slices and reassigns a model's tensors; no other module does.

Everything here works on parameter paths as `model.parameters()` names them. Slicing along the
expert dimension is exact for packed quantised tensors too, since packing runs along the last one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

if TYPE_CHECKING:
    from mlxfun.arrays import Array


def flatten(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every parameter in a tree, in order."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def finite(array: mx.array) -> bool:
    """Whether every value is a number; packed integers always are."""
    return not mx.issubdtype(array.dtype, mx.floating) or bool(mx.isfinite(array).all().item())


Stored = Callable[[str], mx.Dtype]
"""The dtype that a parameter is stored in, by path."""


class ParameterTree:
    """Parameters of one model by path. The module table is made once; swaps are dict writes."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.paths = tuple(path for path, _ in flatten(model.parameters()))

    def _locate(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self.modules[owner], name

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
        return vars(self.modules[path])[name]

    def put_attribute(self, path: str, name: str, value: Any) -> None:
        """Set a plain attribute of the module at `path`."""
        setattr(self.modules[path], name, value)


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


SMALL_BYTES = 8 << 20
"""Up to so much is hashed before threads would have started."""


def row_digests(array: mx.array, stored: mx.Dtype) -> list[str]:
    """Hash of every row's bytes as stored, so that devices that hold other dtypes agree."""
    host = np.array(array.astype(stored).reshape(array.shape[0], -1).view(mx.uint8))

    def digest(row: Array) -> str:
        return blake2b(row.data, digest_size=16).hexdigest()

    # Hashing lets go of the interpreter. Of a stack of a large model it takes longer than the rest.
    if len(host) > 1 and host.nbytes > SMALL_BYTES:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(digest, host))
    return [digest(row) for row in host]


def whole_digest(array: mx.array, stored: mx.Dtype) -> str:
    """Hash of a whole tensor's bytes as stored."""
    return row_digests(array[None], stored)[0]


# -- quantised projections --------------------------------------------------------------------

PACKED = ("weight", "scales", "biases", "global_scale")
"""Names of the arrays that hold a quantised projection."""


def unpacked_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a projection's weight with one value a place, [..., out, in].

    A quantised weight packs 32 / bits values into each 32-bit integer of its last dimension.
    """
    shape = tuple(module["weight"].shape)
    if "scales" not in module:
        return shape
    return (*shape[:-1], shape[-1] * 32 // int(module.bits))


def unpacked_bytes(module: nn.Module) -> int:
    """Bytes of a projection's weight in float32."""
    return 4 * math.prod(unpacked_shape(module))


def dequantised(module: nn.Module, rows: Sequence[int] | None = None) -> mx.array:
    """The weight of a projection in float32, [E, out, in] or [out, in], quantised or not.

    rows: of the first dimension, all where None.
    """
    held: dict[str, mx.array] = {
        name: module[name] for name in PACKED if isinstance(module.get(name), mx.array)
    }
    if rows is not None:
        held = {name: take_rows(array, rows) for name, array in held.items()}
    if "scales" not in held:
        return held["weight"].astype(mx.float32)
    layout = _layout(module)
    scale = held.get("global_scale")
    if scale is None or scale.ndim == 0:
        whole: mx.array = mx.dequantize(
            held["weight"], held["scales"], held.get("biases"), **layout,
            global_scale=scale, dtype=mx.float32,
        )  # fmt: skip
        return whole
    # A global scale belongs to one expert, and MLX takes one at a time.
    pairs = zip(held["weight"], held["scales"], scale, strict=True)
    return mx.stack(
        [mx.dequantize(w, s, **layout, global_scale=g, dtype=mx.float32) for w, s, g in pairs]
    )


def requantised(
    module: nn.Module, weight: mx.array, stored: Callable[[str], mx.Dtype]
) -> dict[str, mx.array]:
    """`weight`, float32 [E, out, in] or [out, in], as the arrays that `module` holds, by name.

    The same mode, group size and bits; every array in the dtype it has, after rounding to the
    dtype that it is stored in (`stored(name)`).
    """
    if "scales" not in module:
        return {"weight": rounded(weight, stored("weight"), module["weight"].dtype)}
    layout = _layout(module)
    # MLX gives affine scales the dtype of what it packs: rounding them later would shift values.
    affine = module.mode == "affine"
    weight = weight.astype(stored("scales") if affine else mx.float32)
    if isinstance(module.get("global_scale"), mx.array):
        scale = mx.max(mx.abs(weight), axis=(-2, -1)).astype(mx.float32)
        each = [
            mx.quantize(w, **layout, global_scale=g) for w, g in zip(weight, scale, strict=True)
        ]
        new = {name: mx.stack([e[i] for e in each]) for i, name in enumerate(PACKED[:2])}
        new["global_scale"] = scale
    else:
        parts = mx.quantize(weight, **layout)
        new = dict(zip(PACKED, parts, strict=False))
    return {name: array.astype(module[name].dtype) for name, array in new.items()}


def _layout(module: nn.Module) -> dict[str, Any]:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


# -- neurons ----------------------------------------------------------------------------------


def packed_group(module: nn.Module) -> int:
    """How many neighbours of the last dimension of a projection are packed together, 1 for none."""
    return int(module.group_size) if "scales" in module else 1


def sliced_neurons(
    module: nn.Module, rows: Sequence[int], kept: Array, inward: bool
) -> dict[str, mx.array]:
    """Some neurons of a stacked projection, every value as it is, by name of its arrays.

    rows: of the stack, [E]. kept: int [E, W], neurons that stay of each; of a packed projection out
    of the neurons (inward False) they are whole groups. Neurons are the second dimension of a
    projection into them, and the last of one out of them.
    """
    held = {
        name: take_rows(module[name], rows)
        for name in (*PACKED, "bias")
        if isinstance(module.get(name), mx.array)
    }
    out: dict[str, mx.array] = {}
    for name, array in held.items():
        alone = array.ndim == 1 or name == "global_scale" or (name == "bias" and not inward)
        if alone:
            out[name] = array
            continue
        index = kept if inward else _places(module, kept, array.shape[-1])
        shape = (len(kept), -1, *(1,) * (array.ndim - 2)) if inward else (len(kept), 1, -1)
        places = mx.array(index.astype(np.uint32)).reshape(shape)
        out[name] = mx.take_along_axis(array, places, axis=1 if inward else -1)
    return out


def sliced_matrix(module: nn.Module, kept: Array, inward: bool) -> dict[str, mx.array]:
    """Some neurons [W] of a projection that is no stack, as `sliced_neurons`."""
    out: dict[str, mx.array] = {}
    for name in (*PACKED, "bias"):
        array = module.get(name)
        if not isinstance(array, mx.array):
            continue
        if name == "global_scale" or (name == "bias" and not inward):
            out[name] = array
            continue
        places = kept if inward else _places(module, kept[None], array.shape[-1])[0]
        out[name] = mx.take(array, mx.array(places.astype(np.uint32)), axis=0 if inward else -1)
    return out


def _places(module: nn.Module, kept: Array, width: int) -> Array:
    """Where the values of neurons `kept` [E, W] are in the last dimension of an array, [E, w]."""
    neurons = unpacked_shape(module)[-1]
    if width == neurons:
        return kept
    # Whole groups: each is the same number of words, or of scales.
    group = packed_group(module)
    each = width * group // neurons
    firsts = kept[:, ::group] // group * each
    return np.asarray((firsts[:, :, None] + np.arange(each)).reshape(len(kept), -1))


def padded_neurons(module: nn.Module, width: int, inward: bool) -> dict[str, mx.array]:
    """A projection with zeros up to `width` neurons: rows of one into them, columns of one out."""
    shape = unpacked_shape(module)
    neurons = shape[0 if inward else -1]
    out: dict[str, mx.array] = {}
    for name in (*PACKED, "bias"):
        array = module.get(name)
        if not isinstance(array, mx.array) or name == "global_scale":
            continue
        if name == "bias" and not inward:
            continue
        axis = 0 if inward else array.ndim - 1
        more = array.shape[axis] * width // neurons - array.shape[axis]
        pad = [(0, more if i == axis else 0) for i in range(array.ndim)]
        out[name] = mx.pad(array, pad)
    return out
