"""The routing of a decoding step, stacked on the device: a few kernels a step, not a few a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import HookError


def output_norms(y: mx.array) -> mx.array:
    """L2 norms [..., K] of expert outputs y [..., K, D], in float32.

    In float32 because bfloat16 sums of squares lose three digits. On a GPU the cast and the square
    are fused, which halves the memory traffic of the largest thing that statistics read; the CPU
    backend gains nothing and would start a compiler.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return _fused_norms(y)
    return _norms(y)


def _norms(y: mx.array) -> mx.array:
    return mx.sqrt(mx.sum(mx.square(y.astype(mx.float32)), axis=-1))


def output_peaks(y: mx.array) -> mx.array:
    """The largest absolute value [..., K] in expert outputs y [..., K, D], in float32."""
    # Two reductions and no array of absolute values, which would be as large as y.
    return mx.maximum(mx.max(y, axis=-1), -mx.min(y, axis=-1)).astype(mx.float32)


_fused_norms = mx.compile(_norms, shapeless=True)


FUSED = 8
"""Layers whose rows one fused kernel joins: a compiled function holds a chain of about ten steps."""


def stack_layers(arrays: Sequence[mx.array]) -> mx.array:
    """Arrays [...] of one shape and dtype as [L, ...], bit for bit.

    `mx.stack` copies each array by a kernel of its own. On a GPU that was measured at 3 percent of
    a token's time for 48 layers, so there eight layers are joined by one fused kernel. The CPU
    backend gains nothing and would start a compiler.
    """
    return _in_groups(arrays, mx.stack, _fused_join)


def layer_norms(outputs: Sequence[mx.array]) -> mx.array:
    """L2 norms, float32 [L, ...], of expert outputs [..., D] of one shape and dtype, as of
    `output_norms`, joined like `stack_layers`."""
    squares = _in_groups(outputs, _squares, _fused_squares, lambda joined: mx.sum(joined, axis=-1))
    return mx.sqrt(squares)


def _in_groups(
    arrays: Sequence[mx.array],
    plain: Callable[[list[mx.array]], mx.array],
    fused: Callable[..., mx.array],
    then: Callable[[mx.array], mx.array] = lambda joined: joined,
) -> mx.array:
    """`then` of the arrays joined along a new first axis: on a GPU by `fused` for each FUSED of
    them, by `plain` for the others."""
    whole = len(arrays) - len(arrays) % FUSED
    if len(arrays) <= FUSED or mx.default_device() != mx.Device(mx.gpu):
        whole = 0
    parts = [then(fused(*arrays[start : start + FUSED])) for start in range(0, whole, FUSED)]
    if whole < len(arrays):
        parts.append(then(plain(list(arrays[whole:]))))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _join(*arrays: mx.array) -> mx.array:
    first = arrays[0]
    place = mx.arange(len(arrays)).reshape(-1, *[1] * first.ndim)
    joined = mx.broadcast_to(arrays[-1][None], (len(arrays), *first.shape))
    for number, array in enumerate(arrays[:-1]):
        joined = mx.where(place == number, array[None], joined)
    return joined


def _join_squares(*outputs: mx.array) -> mx.array:
    return mx.square(_join(*outputs).astype(mx.float32))


def _squares(outputs: list[mx.array]) -> mx.array:
    return mx.square(mx.stack(outputs).astype(mx.float32))


_fused_join = mx.compile(_join)
_fused_squares = mx.compile(_join_squares)


@dataclass(frozen=True, slots=True)
class StepRouting:
    """The routing of a forward over one token, on the device and queued: experts int [L, K],
    weights [L, K], norms float32 [L, K] or None. K is the widest layer's, times the rows."""

    experts: mx.array
    weights: mx.array
    norms: mx.array | None

    def arrays(self) -> list[mx.array]:
        """All of it."""
        return [a for a in (self.experts, self.weights, self.norms) if a is not None]

    def on_host(self) -> tuple[Array, Array, Array | None]:
        """Experts int32 [L, K], -1 where unused with weight 0; weights float32 and norms [L, K].

        Waits for the forward.
        """
        experts, weights = np.array(self.experts).astype(np.int32), np.array(self.weights)
        # Layers with a smaller top-k, and longcat's zero experts, which carry weight 0.
        experts[weights == 0] = -1
        return experts, weights, None if self.norms is None else np.array(self.norms)


class Stepping:
    """Collects the routing of one forward over one token of each of `rows` requests, [L] of each.
    See Taps.stepping."""

    def __init__(self, width: int, layers: int, norms: bool, rows: int = 1) -> None:
        self._width, self._norms, self._rows = width, norms, rows
        self.indices: list[mx.array | None] = [None] * layers
        self.weights: list[mx.array | None] = [None] * layers
        self.outputs: list[mx.array | None] = [None] * layers

    def opened(self, position: int, indices: mx.array, y: mx.array) -> None:
        """A layer has routed its tokens to `indices`, in checkpoint numbers; y: [..., K, D]."""
        self.indices[position] = indices
        if self._norms:
            self.outputs[position] = y

    def stacked(self) -> StepRouting | None:
        """What was collected, lazy, [L, rows * K]; None for a model without experts.

        Raises HookError for a layer whose weights the forward did not show.
        """
        if not self.indices:
            return None
        require_all(
            range(len(self.weights)), {i: w for i, w in enumerate(self.weights) if w is not None}
        )
        return StepRouting(
            self._stack(self.indices),
            self._stack(self.weights).astype(mx.float32),
            self._norms_of_all() if self._norms else None,
        )

    def _norms_of_all(self) -> mx.array:
        """float32 [L, rows * K], of all layers at once: a few kernels a step and not a few a layer."""
        outputs = [y for y in self.outputs if y is not None]
        if self._alike(outputs, outputs[0].shape[-1]):
            return layer_norms(outputs).reshape(len(outputs), -1)
        return self._stack([output_norms(y) for y in outputs])

    def _stack(self, arrays: Sequence[mx.array | None]) -> mx.array:
        known = [a for a in arrays if a is not None]
        if self._alike(known):
            # Not flattened one by one: each costs the host as much as a kernel.
            return stack_layers(known).reshape(len(known), -1)
        return stack_layers([self._flat(a) for a in known])

    def _alike(self, arrays: Sequence[mx.array], each: int = 1) -> bool:
        """Whether all have the same shape, with `each` numbers for every row and place."""
        shape = arrays[0].shape
        whole = arrays[0].size == self._width * self._rows * each
        return whole and all(array.shape == shape for array in arrays)

    def _flat(self, array: mx.array) -> mx.array:
        """[rows * K], of layers that choose fewer experts too."""
        missing = self._width - array.size // self._rows
        if not missing:
            return array.reshape(-1)
        return mx.pad(array.reshape(self._rows, -1), [(0, 0), (0, missing)]).reshape(-1)


def require_all(positions: Sequence[int], seen: dict[int, Any]) -> None:
    missed = [position for position in positions if position not in seen]
    if missed:
        raise HookError(
            f"the forward did not show the routing of MoE layers {missed}: this architecture "
            "computes them in a way that mlxfun does not know; please report it"
        )
