"""The routing of a decoding step, stacked on the device: a few kernels a step, not a few a layer."""

from __future__ import annotations

from collections.abc import Sequence
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


def stack_rows(rows: Sequence[mx.array]) -> mx.array:
    """Rows [K] of one dtype as [L, K], bit for bit.

    `mx.stack` copies each row by a kernel of its own. On a GPU that was measured at 3 percent of a
    token's time for 48 layers, so there eight rows are joined by one fused kernel. The CPU backend
    gains nothing and would start a compiler.
    """
    if len(rows) <= FUSED or mx.default_device() != mx.Device(mx.gpu):
        return mx.stack(list(rows))
    whole = len(rows) - len(rows) % FUSED
    parts = [_fused_join(*rows[start : start + FUSED]) for start in range(0, whole, FUSED)]
    if whole < len(rows):
        parts.append(mx.stack(list(rows[whole:])))
    return mx.concatenate(parts)


def _join(*rows: mx.array) -> mx.array:
    place = mx.arange(len(rows))[:, None]
    joined = mx.broadcast_to(rows[-1][None], (len(rows), rows[-1].shape[0]))
    for number, row in enumerate(rows[:-1]):
        joined = mx.where(place == number, row[None], joined)
    return joined


_fused_join = mx.compile(_join)


def norms_of_rows(outputs: Sequence[mx.array]) -> mx.array:
    """L2 norms, float32 [L, K], of outputs [K, D] of one shape and dtype, as of `output_norms`.

    On a GPU one fused kernel joins the squares of eight layers, for the reason of `stack_rows`.
    """
    if len(outputs) <= FUSED or mx.default_device() != mx.Device(mx.gpu):
        return output_norms(mx.stack(list(outputs)))
    whole = len(outputs) - len(outputs) % FUSED
    parts = [
        mx.sum(_fused_squares(*outputs[start : start + FUSED]), axis=-1)
        for start in range(0, whole, FUSED)
    ]
    if whole < len(outputs):
        rest = mx.stack(list(outputs[whole:])).astype(mx.float32)
        parts.append(mx.sum(mx.square(rest), axis=-1))
    return mx.sqrt(mx.concatenate(parts))


def _join_squares(*outputs: mx.array) -> mx.array:
    place = mx.arange(len(outputs))[:, None, None]
    joined = mx.broadcast_to(outputs[-1][None], (len(outputs), *outputs[-1].shape))
    for number, y in enumerate(outputs[:-1]):
        joined = mx.where(place == number, y[None], joined)
    return mx.square(joined.astype(mx.float32))


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
        outputs = [y.reshape(-1, y.shape[-1]) for y in self.outputs if y is not None]
        if len({y.shape for y in outputs}) == 1 and outputs[0].shape[0] == self._width * self._rows:
            return norms_of_rows(outputs)
        return self._stack([output_norms(y) for y in outputs])

    def _stack(self, arrays: Sequence[mx.array | None]) -> mx.array:
        return stack_rows([self._flat(a) for a in arrays if a is not None])

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
