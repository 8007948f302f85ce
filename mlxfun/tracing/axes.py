"""Which axis of a value counts batch rows, positions and heads; choosing positions and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import UsageError
from mlxfun.tracing.names import Point

Positions = int | Sequence[int] | slice
"""Positions among a row's own tokens; -1 is its last one, whatever the padding."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one forward. rows, width: B and T. first, past: int [B], see Batch, as places in
    this forward; offset: tokens that went before it (in a cache). prompt: length of the prompt that
    a generation answers, None elsewhere: negative positions count from its end.
    """

    rows: int
    width: int
    first: Array
    past: Array
    offset: int = 0
    prompt: int | None = None

    @property
    def lengths(self) -> Array:
        """int [B]: how many tokens of its own each row has, or the prompt."""
        if self.prompt is not None:
            return np.full(self.rows, self.prompt)
        return self.past - self.first + self.offset

    def places(self, positions: Positions) -> Array:
        """int [B, P]: where each row has these positions in this forward; negative or past the
        width where another forward has them. Raises UsageError for what no row could have."""
        if isinstance(positions, slice):
            counts = {len(range(*positions.indices(n))) for n in self.lengths.tolist()}
            if len(counts) > 1:
                raise UsageError(
                    f"positions {positions.start}:{positions.stop} are not as many in every prompt "
                    "of the batch; name them one by one, or give prompts of one length"
                )
            listed = [list(range(*positions.indices(n))) for n in self.lengths.tolist()]
            return np.array(listed) + self.first[:, None] - self.offset
        wanted = np.atleast_1d(np.array(positions, np.int64))
        shortest = int(self.lengths.min())
        for position in wanted.tolist():
            if not -shortest <= position:
                raise UsageError(
                    f"there is no position {position}: the shortest prompt has {shortest} tokens"
                )
        counted = np.where(wanted < 0, self.lengths[:, None] + wanted, wanted)
        return counted + self.first[:, None] - self.offset

    def require(self, positions: Positions) -> None:
        """Raise UsageError for positions that a prompt of the batch does not have."""
        if isinstance(positions, slice) or self.prompt is not None:
            return
        shortest = int(self.lengths.min())
        for position in np.atleast_1d(np.array(positions)).tolist():
            if not -shortest <= position < shortest:
                raise UsageError(
                    f"there is no position {position}: the shortest prompt has {shortest} tokens, "
                    f"0 to {shortest - 1}, or -1 for its last"
                )


@dataclass(frozen=True, slots=True)
class Axes:
    """Axes of a value. batch, position, heads: None where it has no such axis."""

    batch: int | None
    position: int | None
    heads: int | None = None


def laid_out(point: Point, value: mx.array, span: Span, streams: int | None) -> mx.array:
    """`value` with rows and positions apart: some modules take all tokens of a batch as one axis.

    streams: which axis of a layer's output counts residual streams, for a model with several.
    """
    rows, width = span.rows, span.width
    if value.ndim < 2 or value.shape[0] != rows * width or width == 1:
        return value
    if point.kind == "attention":  # deepseek_v41 attends token by token: [B * T, H, 1, ...]
        if value.shape[2] != 1:
            return value
        return value.reshape(rows, width, value.shape[1], value.shape[3]).swapaxes(1, 2)
    if streams is None and value.shape[:2] != (rows, width):
        return value.reshape(rows, width, *value.shape[1:])
    return value


def put_back(point: Point, laid: mx.array, value: mx.array) -> mx.array:
    """A changed value in the shape that the model had it in; the reverse of `laid_out`."""
    if point.kind == "attention" and laid.shape != value.shape:
        laid = laid.swapaxes(1, 2)
    return laid.reshape(value.shape)


def axes_of(point: Point, value: mx.array, span: Span, streams: int | None) -> Axes:
    """The axes of a value that was laid out."""
    rows, width = span.rows, span.width
    if point.kind == "attention":
        keyed = point.attention in ("keys", "values")
        position = None if keyed and value.shape[2] != width else 2
        return Axes(0, position, 1)
    if streams == 0 and value.shape[1:3] == (rows, width):
        return Axes(1, 2)
    if value.shape[:2] == (rows, width):
        return Axes(0, 1)
    return Axes(0 if value.ndim and value.shape[0] == rows else None, None)


def chosen(
    value: mx.array,
    axes: Axes,
    span: Span,
    positions: Positions | None,
    heads: Sequence[int] | None,
) -> mx.array:
    """The chosen positions and heads of a value; a single position's axis goes away."""
    if heads is not None:
        value = mx.take(value, mx.array(_heads(value, axes, heads)), axis=axes.heads)
    if positions is None:
        return value
    if axes.position is None or axes.batch is None:
        raise UsageError("positions cannot be chosen of this value: it has no axis of positions")
    span.require(positions)
    places = span.places(positions)
    shape = [1] * value.ndim
    shape[axes.batch], shape[axes.position] = places.shape
    found = mx.take_along_axis(value, mx.array(places.reshape(shape)), axis=axes.position)
    return found.squeeze(axes.position) if isinstance(positions, int | np.integer) else found


def mask_of(
    value: mx.array,
    axes: Axes,
    span: Span,
    positions: Positions | None,
    heads: Sequence[int] | None,
) -> mx.array | None:
    """bool, True on the chosen positions and heads, to be broadcast to the value; None for all."""
    mask: mx.array | None = None
    if positions is not None:
        if axes.position is None or axes.batch is None:
            raise UsageError(
                "positions cannot be chosen of this value: it has no axis of positions"
            )
        hit = np.zeros((span.rows, span.width), np.bool_)
        for row, places in enumerate(span.places(positions)):
            hit[row, places[(places >= span.first[row]) & (places < span.past[row])]] = True
        shape = [1] * value.ndim
        shape[axes.batch], shape[axes.position] = hit.shape
        mask = mx.array(hit.reshape(shape))
    if heads is not None:
        numbers = _heads(value, axes, heads)
        shape = [1] * value.ndim
        shape[axes.heads or 0] = value.shape[axes.heads or 0]
        among = np.isin(np.arange(value.shape[axes.heads or 0]), numbers)
        there = mx.array(among.reshape(shape))
        mask = there if mask is None else mask & there
    return mask


def _heads(value: mx.array, axes: Axes, heads: Sequence[int]) -> list[int]:
    if axes.heads is None:
        raise UsageError(
            "heads cannot be chosen of this value; they can of attn.queries, .keys, .values, "
            ".weights and .heads"
        )
    count = value.shape[axes.heads]
    for head in heads:
        if not -count <= head < count:
            raise UsageError(f"there is no head {head}: there are {count}, 0 to {count - 1}")
    return [head % count for head in heads]
