"""Keeps a layer on slots to the kernels that it runs on whole, which may round differently.

mlx-lm sorts the experts of 64 choices and more (`SwitchGLU.__call__`), and MLX then takes another
kernel than for choices as they come. On Metal, packed experts have a third rule: sorted choices are
multiplied as matrices once there are four of them for each expert of the stack; on CUDA, packed
choices are once there are eight (`GatherQMM::eval_gpu` in mlx/backend/metal/quantized.cpp and
mlx/backend/cuda/quantized/quantized.cpp). A stack of slots has fewer experts, and a group of experts
fewer choices, so these conditions have to be brought about. One is not: CUDA devices of compute
capability 12 have a kernel of their own for more than 2,048 choices of 4-bit floats.

Within one kernel the output of a choice does not depend on the others, which is what tests compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxfun.model.device.memory import on_cuda

if TYPE_CHECKING:
    from mlxfun.arrays import Array

SORTED = 64
"""From this many choices on mlx-lm sorts them."""

_MATRICES = 8
"""Packed choices from which CUDA multiplies them as matrices."""

_DENSE = 4
"""Choices for each expert of the stack, from which Metal multiplies packed experts as matrices."""


def _counts_experts(packed: bool) -> bool:
    """Whether the kernel depends on how many experts the stack has."""
    return packed and mx.metal.is_available()


def _counts_choices(packed: bool) -> bool:
    """Whether the kernel depends on how many choices there are, sorted or not."""
    return packed and on_cuda()


def same_kernel(choices: int, experts: int, slots: int, packed: bool) -> bool:
    """Whether `choices` run on a stack of `slots` as they would on one of `experts`."""
    if choices < SORTED or not _counts_experts(packed):
        return True
    return (choices // experts >= _DENSE) == (choices // slots >= _DENSE)


def pieces(
    rows: Array, choices: int, experts: int, slots: int, packed: bool
) -> Iterator[tuple[Array, Array]]:
    """`rows` of a group in parts that run as they would among all `choices`.

    Yields each part, and the part filled up with repetitions of its last row to as many rows as the
    kernel takes.
    """
    most, least = len(rows), 1
    if choices >= _MATRICES and _counts_choices(packed):
        least = _MATRICES
    if choices >= SORTED:
        least = SORTED  # more than _MATRICES
        if _counts_experts(packed):
            if choices // experts >= _DENSE:
                least = max(SORTED, _DENSE * slots)
            else:
                # Unsorted choices take the kernel that sparse sorted ones take.
                most = _DENSE * slots - 1 if _DENSE * slots > SORTED else SORTED - 1
                least = 1
    for start in range(0, len(rows), max(most, 1)):
        part = rows[start : start + most]
        filling = np.repeat(part[-1:], max(least - len(part), 0))
        yield part, np.concatenate([part, filling])
