"""Where in the checkpoint's files each expert of a stacked parameter lies.

Stock loading passes the tensors of a checkpoint through the model's `sanitize`, which renames them
and stacks those that are stored one per expert. What it does is found out by giving it stand-ins:
for a tensor that is stored as a stack an array without memory, recognised by identity in what comes
out; for a tensor of one expert a few numbers of its own, in an order of rows and columns that a
transposition, a split or arithmetic would disturb.

Some checkpoints hold stacks that `sanitize` splits, turns or views as another type, each expert for
itself (gpt-oss and Qwen3.5 on the Hub). Of those the rows of one expert are read, and passed through
`sanitize` when they are needed. Whatever is found is compared with what stock loading makes before
anything runs on it (mlxfun.memory.slots.partly). Experts that are changed in another way are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.checkpoint.headers import Header, TensorInfo
from mlxfun.checkpoint.load import LOAD_ERRORS, short
from mlxfun.errors import ModelError
from mlxfun.model.anatomy.stored_names import layer_of, part_of
from mlxfun.model.parameters import flatten

if TYPE_CHECKING:
    from mlxfun.arrays import Array

DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8,
    "F8_E8M0": mx.uint8, "U16": mx.uint16, "I16": mx.int16, "F16": mx.float16, "BF16": mx.bfloat16,
    "U32": mx.uint32, "I32": mx.int32, "F32": mx.float32, "U64": mx.uint64, "I64": mx.int64,
}  # fmt: skip
"""Types of safetensors files as MLX reads them."""

_ONE_EXPERT = re.compile(r"experts?\.\d+\.")
_STEP = 6  # numbers that tell one tensor from the next, no fewer than a stand-in has


@dataclass(frozen=True, slots=True)
class StackSource:
    """A stacked parameter [E, *shape] on disk.

    dtype: as stored. places: (number of the file, first byte) of each expert, [E].
    nbytes: of one expert.
    """

    path: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file."""

    file: int
    info: TensorInfo


Arrays = Mapping[str, mx.array]


@dataclass(frozen=True, slots=True)
class LayerSource:
    """The experts of one layer on disk.

    stacks: what is read of each, by name. held: path of a parameter -> shape [*shape] and stored
    dtype of one expert's part. convert: makes the parameters [n, *shape] by path of what was read,
    [n, *shape] by name; None where that is the same.
    """

    stacks: Mapping[str, StackSource]
    held: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]
    convert: Callable[[Arrays], Arrays] | None = None

    @property
    def experts(self) -> int:
        """E."""
        return min(len(source.places) for source in self.stacks.values())

    def made(self, rows: Mapping[str, Array]) -> Arrays:
        """The parameters by path, [n, *shape] in the stored dtype, of uint8 [n, nbytes] by name."""
        read = {
            name: mx.array(rows[name]).view(source.dtype).reshape(len(rows[name]), *source.shape)
            for name, source in self.stacks.items()
        }
        return read if self.convert is None else self.convert(read)


def find_sources(
    model: nn.Module, layers: Mapping[int, Sequence[str]], headers: Sequence[Header]
) -> tuple[LayerSource, ...]:
    """The sources of the stacked parameters of a lazily loaded model. layers: by decoder layer.

    Raises ModelError naming the first parameter that cannot be read one expert at a time.
    """
    stored = {
        name: _Stored(number, info)
        for number, header in enumerate(headers)
        for name, info in header.tensors.items()
    }
    probe = _Probe(stored)
    try:
        made = _sanitized(model, probe.stand_ins())
    except ModelError:
        made = {}  # numbers in the place of weights are not always taken
    arrays = dict(flatten(model.parameters()))
    return tuple(
        _of_layer(model, probe, index, {path: arrays[path] for path in paths}, made)
        for index, paths in layers.items()
    )


def _of_layer(
    model: nn.Module, probe: _Probe, index: int, arrays: Arrays, made: Arrays
) -> LayerSource:
    held = {path: (tuple(array.shape[1:]), array.dtype) for path, array in arrays.items()}
    try:
        found = {path: probe.source(path, array, made.get(path)) for path, array in arrays.items()}
        return LayerSource(found, held)
    except ModelError:
        experts = next(iter(arrays.values())).shape[0]
        stacks = probe.stacks_of(index, experts)

        def convert(rows: Arrays) -> Arrays:
            return _sanitized(model, dict(rows))

        zeros = {
            name: mx.broadcast_to(mx.zeros((), one.dtype), (1, *one.shape))
            for name, one in stacks.items()
        }
        try:
            tried = convert(zeros) if zeros else {}
        except ModelError:
            tried = {}
        fits = all(
            path in tried
            and (tuple(tried[path].shape[1:]), tried[path].dtype) == held[path]
            and len(tried[path]) == 1
            for path in arrays
        )
        if not fits:
            raise
        return LayerSource(stacks, held, convert)


def _sanitized(model: nn.Module, weights: dict[str, mx.array]) -> Arrays:
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return weights
    try:
        made: Arrays = sanitize(weights)
        return made
    except LOAD_ERRORS as error:
        raise ModelError(
            f"this checkpoint's experts are changed while mlx-lm loads it ({short(error)}), so they "
            f"cannot be read one at a time; {REMEDY}"
        ) from error


REMEDY = (
    "convert the model with `mlx_lm.convert`, which stores experts as they are held, or load it "
    "whole with --resident all"
)


class _Probe:
    """Stand-ins for the tensors of a checkpoint, and what became of them."""

    def __init__(self, stored: Mapping[str, _Stored]) -> None:
        self._stored = stored
        self._single = [name for name in stored if _ONE_EXPERT.search(name)]
        self._name_of: dict[int, str] = {}
        self._held: list[mx.array] = []  # identities are only unique while the arrays are alive

    def stand_ins(self) -> dict[str, mx.array]:
        """An array for every tensor that is stored."""
        numbers = {name: number for number, name in enumerate(self._single)}
        found = {}
        for name, one in self._stored.items():
            info = one.info
            if name in numbers:
                found[name] = mx.array(_marks(numbers[name], len(info.shape)))
            else:
                zero = mx.zeros((), DTYPES.get(info.dtype, mx.uint8))
                found[name] = mx.broadcast_to(zero, info.shape)
            self._name_of[id(found[name])] = name
            self._held.append(found[name])
        return found

    def stacks_of(self, layer: int, experts: int) -> dict[str, StackSource]:
        """The tensors of a decoder layer that are stacks of its experts, by name."""
        found = {}
        for name, one in self._stored.items():
            info = one.info
            if layer_of(name) != layer or part_of(name) != "experts" or not info.shape:
                continue
            if info.shape[0] == experts and info.dtype in DTYPES:
                size = info.nbytes // experts
                places = tuple((one.file, info.start + e * size) for e in range(experts))
                found[name] = StackSource(name, DTYPES[info.dtype], info.shape[1:], places, size)
        return found

    def source(self, path: str, held: mx.array, made: mx.array | None) -> StackSource:
        """Where the parameter `path` lies, of which stock loading makes `held` and `sanitize` made
        `made` of the stand-ins. Raises ModelError."""
        if made is not None and id(made) in self._name_of:
            name = self._name_of[id(made)]
            one = self._stored[name]
            if one.info.shape == tuple(held.shape) and _same(one.info, held):
                size = one.info.nbytes // held.shape[0]
                places = tuple((one.file, one.info.start + e * size) for e in range(held.shape[0]))
                return StackSource(path, held.dtype, tuple(held.shape[1:]), places, size)
        elif made is not None and self._single:
            names = self._stacked_names(made, int(held.shape[0]))
            if names and all(self._is_row(name, held) for name in names):
                ones = [self._stored[name] for name in names]
                places = tuple((one.file, one.info.start) for one in ones)
                size = ones[0].info.nbytes
                return StackSource(path, held.dtype, tuple(held.shape[1:]), places, size)
        raise ModelError(
            f"the experts at {path} are not stored as they are held in memory, so they cannot be "
            f"read one at a time; {REMEDY}"
        )

    def _is_row(self, name: str, held: mx.array) -> bool:
        info = self._stored[name].info
        return info.shape == tuple(held.shape[1:]) and _same(info, held)

    def _stacked_names(self, made: mx.array, experts: int) -> list[str]:
        """The tensors whose stand-ins were stacked to `made`, [] if anything else was done."""
        rows: Any = np.array(made)
        if rows.ndim < 1 or len(rows) != experts or rows.dtype != np.int32:
            return []
        first = rows.reshape(experts, -1)[:, 0] // _STEP
        whole = all(
            0 <= number < len(self._single) and np.array_equal(row, _marks(number, row.ndim))
            for row, number in zip(rows, first.tolist(), strict=True)
        )
        return [self._single[number] for number in first.tolist()] if whole else []


def _marks(number: int, ndim: int) -> Any:
    """int32 numbers of tensor `number`: [2, 3] for a matrix, [3] for a vector, else one."""
    shape = (2, 3)[2 - ndim :] if 0 < ndim <= 2 else (1,) * ndim
    size = int(np.prod(shape))
    return (number * _STEP + np.arange(size, dtype=np.int32)).reshape(shape)


def _same(info: TensorInfo, held: mx.array) -> bool:
    return DTYPES.get(info.dtype) == held.dtype
