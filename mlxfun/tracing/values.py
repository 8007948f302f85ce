"""Values that a trace saves: asked for before the forward, there after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import StateError
from mlxfun.tracing.axes import Axes, Positions, Span, chosen
from mlxfun.tracing.names import Point


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape and dtype of a value; a dimension that depends on the routing is -1."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).rpartition('.')[2]}"


class Saved:
    """One saved value. `value` after the trace: what the model went on with, interventions
    included. `values`: one for each time that the forward came by (a generation has one a step).
    """

    def __init__(
        self, point: Point, positions: Positions | None = None, heads: Sequence[int] | None = None
    ) -> None:
        self.point, self._positions, self._heads = point, positions, heads
        self._taken: list[mx.array] = []
        self._ready = False

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.point.name

    def take(self, value: mx.array, axes: Axes, span: Span) -> None:
        """Keep what was asked for of a value that has been reached, lazy.

        In a generation the chosen positions are in some forwards and not in others.
        """
        if self._positions is not None and span.prompt is not None:
            places = span.places(self._positions)
            if ((places < 0) | (places >= span.width)).any():
                return
        self._taken.append(kept(chosen(value, axes, span, self._positions, self._heads)))

    @property
    def reached(self) -> bool:
        """Whether a forward came by."""
        return bool(self._taken)

    def arrays(self) -> list[mx.array]:
        """What is to be evaluated."""
        return self._taken

    def finish(self, evaluated: bool) -> None:
        """The forward is over. evaluated: False after a dry run, which leaves shapes only."""
        self._ready = evaluated
        if not evaluated:
            self._shapes = [Shape(tuple(a.shape), a.dtype) for a in self._taken]
            self._taken = []

    @property
    def values(self) -> list[mx.array]:
        """Every value, in order. Raises StateError before the trace has run."""
        if not self._ready:
            raise StateError(
                f"{self.name} has no value yet: it is there after the `with` block, and not after "
                "a dry run"
            )
        return self._taken

    @property
    def value(self) -> mx.array:
        """The one value. Raises StateError where the forward came by several times."""
        values = self.values
        if len(values) != 1:
            raise StateError(
                f"{self.name} was reached {len(values)} times; choose one of its `values`"
            )
        return values[0]

    @property
    def described(self) -> Shape:
        """Shape and dtype, after a dry run as well."""
        if self._ready:
            return Shape(tuple(self.value.shape), self.value.dtype)
        if not hasattr(self, "_shapes"):
            raise StateError(f"{self.name} has no shape before the `with` block is over")
        return self._shapes[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.described.shape

    @property
    def dtype(self) -> mx.Dtype:
        """Its dtype."""
        return self.described.dtype

    def numpy(self) -> Array:
        """The value on the host; half floats as float32."""
        return on_host(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.numpy()
        return found if dtype is None else found.astype(dtype)

    def __getitem__(self, index: Any) -> mx.array:
        return self.value[index]

    def __repr__(self) -> str:
        try:
            return f"<{self.name} {self.described}>"
        except StateError:
            return f"<{self.name}, not run yet>"


class RouteSaved(Saved):
    """A value of experts, which comes with their route."""

    def take_route(
        self, contribution: mx.array, choice: mx.array, weights: mx.array, span: Span
    ) -> None:
        """contribution: [B, T, K, D]; choice, weights: [B, T, K], all lazy."""
        raise NotImplementedError


class SavedExpert(RouteSaved):
    """What one expert adds for the tokens that chose it.

    value: [n, D], its weighted outputs. tokens: int [n, 2], (row of the batch, position among the
    row's own tokens) of each. weights: [n], what its outputs were multiplied by. Families whose
    block scales or projects the sum once more (facts.BlockFacts.post_scale) do that afterwards.
    """

    def __init__(self, point: Point, positions: Positions | None = None) -> None:
        super().__init__(point)
        self._only = positions
        self._routes: list[tuple[mx.array, mx.array, Span]] = []
        self._tokens: list[Array] = []
        self._weights: list[mx.array] = []

    def take_route(
        self, contribution: mx.array, choice: mx.array, weights: mx.array, span: Span
    ) -> None:
        """Keep the whole layer's; the rows of this expert are picked when they are evaluated."""
        self._taken.append(kept(contribution))
        self._routes.append((kept(choice), kept(weights), span))

    def arrays(self) -> list[mx.array]:
        return [
            *self._taken,
            *(a for choice, weights, _ in self._routes for a in (choice, weights)),
        ]

    def finish(self, evaluated: bool) -> None:
        if not evaluated:
            self._taken = self._taken[:1]
            super().finish(evaluated)
            self._shapes = [Shape((-1, s.shape[-1]), s.dtype) for s in self._shapes]
            return
        found = [
            self._rows(contribution, *route)
            for contribution, route in zip(self._taken, self._routes, strict=True)
        ]
        self._taken = [rows for rows, _, _ in found]
        self._tokens, self._weights = [t for _, t, _ in found], [w for _, _, w in found]
        self._routes = []
        mx.eval(self._taken, self._weights)
        super().finish(evaluated)

    def _rows(
        self, contribution: mx.array, choice: mx.array, weights: mx.array, span: Span
    ) -> tuple[mx.array, Array, mx.array]:
        # longcat's identity experts are seen as expert 0 with no weight.
        hit = (np.array(choice) == self.point.expert) & (on_host(weights) != 0)
        place = np.arange(span.width)
        hit &= ((place >= span.first[:, None]) & (place < span.past[:, None]))[..., None]
        if self._only is not None:
            wanted = np.zeros(hit.shape[:2], np.bool_)
            for number, places in enumerate(span.places(self._only)):
                wanted[number, places[(places >= 0) & (places < span.width)]] = True
            hit &= wanted[..., None]
        row, position, slot = np.nonzero(hit)
        at = mx.array(row), mx.array(position), mx.array(slot)
        own = position - span.first[row] + span.offset
        width = contribution.shape[-1]
        if not len(row):
            none = mx.zeros((0, width), contribution.dtype), mx.zeros((0,), weights.dtype)
            return none[0], np.zeros((0, 2), np.int64), none[1]
        return contribution[at], np.stack([row, own], axis=1), weights[at]

    @property
    def tokens(self) -> Array:
        """int [n, 2]: row and position of each token that the expert serves."""
        self.value  # noqa: B018 - says what is wrong before the trace has run
        return self._tokens[0]

    @property
    def weights(self) -> mx.array:
        """[n]: what its outputs were multiplied by."""
        self.value  # noqa: B018
        return self._weights[0]


def kept(value: mx.array) -> mx.array:
    """A name of its own for an array: some models (gemma3n) write into the arrays that they hand
    on, and what was saved would change with them."""
    return mx.stop_gradient(value)


def on_host(array: mx.array) -> Array:
    """An evaluated array as NumPy's, half floats as float32."""
    half = array.dtype in (mx.bfloat16, mx.float16)
    return np.array(array.astype(mx.float32) if half else array)
