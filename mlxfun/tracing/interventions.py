"""Interventions: what is done to a value while a forward runs.

    zero_out()                 zeros
    scale(0.5)                 times a factor
    add_vector(v, 4.0)         plus a vector [D], times a strength
    replace_with(x)            a number, a vector, or an array of the value's shape
    clamp(-1.0, 1.0)           cut to a range
    noise(0.1, seed=0)         plus normal noise of a standard deviation
    compose(a, b)              one after the other
    force_route([3, 7])        experts that the router must choose (at layers.i.router)
    drop_expert(7)             takes away what an expert adds (at layers.i.experts)
    scale_expert(7, 2.0)       times a factor, what an expert adds (at layers.i.experts)
    steer_feature, clamp_feature of an autoencoder: see mlxfun.tracing.sae.features

Each takes `positions` and, in attention, `heads`; a number, an array or a function of one array
stands for an intervention as well. The value keeps its dtype, whatever it is changed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from mlxfun.errors import UsageError
from mlxfun.tracing.axes import Axes, Positions, Span, mask_of

InterventionKind = Literal[
    "zero_out", "scale", "add_vector", "replace_with", "clamp", "noise", "compose", "function",
    "force_route", "drop_expert", "scale_expert", "steer_feature",
    "clamp_feature",
]  # fmt: skip
OF_FEATURES = ("steer_feature", "clamp_feature")
"""Their first number says which feature; their array is of the autoencoder."""
Function = Callable[[mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class Intervention:
    """One change of one value. numbers: its parameters; array: a vector or more; parts: of compose.

    experts: of force_route, drop_expert and scale_expert, in checkpoint numbers. positions: among a
    row's own tokens, -1 the last of the prompt; None for all. heads: None for all.
    """

    kind: InterventionKind
    numbers: tuple[float, ...] = ()
    array: mx.array | None = field(default=None, compare=False)
    function: Function | None = None
    parts: tuple[Intervention, ...] = ()
    experts: tuple[int, ...] = ()
    positions: Positions | None = None
    heads: tuple[int, ...] | None = None

    @property
    def strength(self) -> float | None:
        """By what a vector is multiplied before it is added, None for other kinds."""
        return self.numbers[0] if self.kind == "add_vector" else None

    @property
    def described(self) -> str:
        """As it would be written, arrays by their shape."""
        words = [f"{number:g}" for number in self.numbers]
        if self.experts:
            words.insert(0, ",".join(map(str, self.experts)))
        if self.array is not None and self.kind not in OF_FEATURES:
            words.insert(0, f"array {list(self.array.shape)}")
        words += [part.described for part in self.parts]
        if self.positions is not None:
            words.append(f"positions={self.positions}")
        if self.heads is not None:
            words.append(f"heads={list(self.heads)}")
        return f"{self.kind}({', '.join(words)})"

    def __call__(self, value: mx.array, axes: Axes, span: Span) -> mx.array:
        """The changed value, of the same shape and dtype. value: laid out, see axes.laid_out."""
        if self.kind == "compose":
            for part in self.parts:
                value = part(value, axes, span)
            return value
        new = self._changed(value, span)
        if new.shape != value.shape:
            raise UsageError(
                f"{self.described} gives {list(new.shape)} where the value is {list(value.shape)}"
            )
        new = new.astype(value.dtype)
        mask = mask_of(value, axes, span, self.positions, self.heads)
        return new if mask is None else mx.where(mask, new, value)

    def _changed(self, value: mx.array, span: Span) -> mx.array:
        match self.kind:
            case "zero_out" | "drop_expert":
                return mx.zeros_like(value)
            case "scale" | "scale_expert":
                return value * self.numbers[0]
            case "add_vector":
                return value + self._fitting(value) * self.numbers[0]
            case "steer_feature":
                return value + self._fitting(value) * self.numbers[1]
            case "replace_with":
                return mx.broadcast_to(self._fitting(value), value.shape)
            case "clamp":
                return mx.clip(value, *self.numbers)
            case "noise":
                # Other noise at each step of a generation, the same in the same forward again.
                key = mx.random.key(int(self.numbers[1]) + span.offset)
                return value + mx.random.normal(value.shape, value.dtype, 0, self.numbers[0], key)
            case "function" | "clamp_feature":
                assert self.function is not None
                return _array(self.function(value), value.dtype)
            case "force_route" | "compose":
                raise UsageError(f"{self.described} belongs at layers.i.router")

    def _fitting(self, value: mx.array) -> mx.array:
        """The array in the value's dtype. Raises UsageError where it cannot be broadcast."""
        assert self.array is not None
        given, there = self.array.shape, value.shape
        fits = len(given) <= len(there) and all(
            a in (1, b) for a, b in zip(given[::-1], there[::-1], strict=False)
        )
        if not fits:
            raise UsageError(
                f"{self.kind}: an array of shape {list(given)} does not fit a value of shape "
                f"{list(there)}"
            )
        return self.array.astype(value.dtype)


class Edit(Protocol):
    """What changes a value in a run; an Intervention is one."""

    def __call__(self, value: mx.array, axes: Axes, span: Span, /) -> mx.array:
        """The changed value, of the same shape and dtype. value: laid out, see axes.laid_out."""


@runtime_checkable
class EditOfExperts(Protocol):
    """What changes the parts of all experts of a layer at once."""

    def on_experts(self, value: mx.array, choice: mx.array, /) -> mx.array:
        """The changed value. value: [B, T, K, D]; choice: [B, T, K]."""


Change = Intervention | Function | float | mx.array | np.ndarray
"""What may be assigned to a value."""


def intervention(change: Any) -> Intervention:
    """`change` as an intervention. Raises UsageError for what is none."""
    if isinstance(change, Intervention):
        return change
    if isinstance(change, bool) or change is None:
        raise UsageError(f"{change!r} is no intervention: give a number, array, function, or one of "
                         "mlxfun.tracing.interventions")  # fmt: skip
    if isinstance(change, int | float):
        return zero_out() if change == 0 else replace_with(float(change))
    if hasattr(change, "value") and isinstance(change.value, mx.array):
        return replace_with(change.value)
    if isinstance(change, mx.array | np.ndarray):
        return replace_with(change)
    if callable(change):
        return Intervention("function", function=change)
    raise UsageError(f"a {type(change).__name__} is no intervention")


def _where(heads: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if heads is None else tuple(heads)


def zero_out(
    *, positions: Positions | None = None, heads: Sequence[int] | None = None
) -> Intervention:
    """Zeros."""
    return Intervention("zero_out", positions=positions, heads=_where(heads))


def scale(
    factor: float, *, positions: Positions | None = None, heads: Sequence[int] | None = None
) -> Intervention:
    """`factor` times the value."""
    return Intervention("scale", (float(factor),), positions=positions, heads=_where(heads))


def add_vector(
    vector: Any, strength: float = 1.0, *,
    positions: Positions | None = None, heads: Sequence[int] | None = None,
) -> Intervention:  # fmt: skip
    """The value plus `strength` times a vector [D], or any array that fits."""
    return Intervention("add_vector", (float(strength),), _array(vector), positions=positions,
                        heads=_where(heads))  # fmt: skip


def replace_with(
    value: Any, *, positions: Positions | None = None, heads: Sequence[int] | None = None
) -> Intervention:
    """A number, a vector [D], or any array that fits, in place of the value."""
    return Intervention(
        "replace_with", array=_array(value), positions=positions, heads=_where(heads)
    )


def clamp(
    low: float, high: float, *,
    positions: Positions | None = None, heads: Sequence[int] | None = None,
) -> Intervention:  # fmt: skip
    """The value cut to low..high. Raises UsageError for an empty range."""
    if low > high:
        raise UsageError(f"clamp({low:g}, {high:g}): the lower bound is above the upper one")
    return Intervention("clamp", (float(low), float(high)), positions=positions,
                        heads=_where(heads))  # fmt: skip


def noise(
    deviation: float, *, seed: int = 0,
    positions: Positions | None = None, heads: Sequence[int] | None = None,
) -> Intervention:  # fmt: skip
    """The value plus normal noise of a standard deviation."""
    return Intervention("noise", (float(deviation), float(seed)), positions=positions,
                        heads=_where(heads))  # fmt: skip


def compose(*parts: Any) -> Intervention:
    """Several interventions, the first one first."""
    return Intervention("compose", parts=tuple(intervention(part) for part in parts))


def force_route(experts: Sequence[int], *, positions: Positions | None = None) -> Intervention:
    """Experts that the router must choose, in checkpoint numbers; at most top-k of them.

    One that the router has not chosen takes the place, and the weight, of the chosen expert with
    the lowest logit among those that are not forced.
    """
    return Intervention("force_route", experts=tuple(experts), positions=positions)


def drop_expert(expert: int, *, positions: Positions | None = None) -> Intervention:
    """Take away what an expert adds; the others keep their weights."""
    return Intervention("drop_expert", experts=(expert,), positions=positions)


def scale_expert(expert: int, factor: float, *, positions: Positions | None = None) -> Intervention:
    """`factor` times what an expert adds."""
    return Intervention("scale_expert", (float(factor),), experts=(expert,), positions=positions)


def forced_choice(
    change: Intervention, choice: mx.array, logits: mx.array, columns: mx.array, span: Span
) -> mx.array:
    """A choice [B, T, K] with the experts of `force_route` in it, in checkpoint numbers.

    logits: [B, T, R]; columns: uint32 [B, T, K], where the logits of the chosen ones are.
    """
    top_k = choice.shape[-1]
    forced = list(dict.fromkeys(change.experts))
    if not 0 < len(forced) <= top_k:
        raise UsageError(f"{change.described}: a token has {top_k} experts; force 1 to {top_k}")
    own = mx.take_along_axis(logits.astype(mx.float32), columns, axis=-1)
    is_forced = mx.zeros(choice.shape, mx.bool_)
    for expert in forced:
        is_forced = is_forced | (choice == expert)
    # Places from the one to be given away first: not forced, lowest logit.
    order = mx.argsort(mx.where(is_forced, mx.inf, own), axis=-1)
    new, taken = choice, mx.zeros((*choice.shape[:-1], 1), mx.int32)
    for expert in forced:
        missing = ~mx.any(choice == expert, axis=-1, keepdims=True)
        place = mx.take_along_axis(order, mx.minimum(taken, top_k - 1), axis=-1)
        hit = (mx.arange(top_k) == place) & missing
        new = mx.where(hit, mx.array(expert, choice.dtype), new)
        taken = taken + missing.astype(mx.int32)
    mask = mask_of(choice, Axes(0, 1), span, change.positions, None)
    return new if mask is None else mx.where(mask, new, choice)


def _array(value: Any, dtype: mx.Dtype = mx.float32) -> mx.array:
    if isinstance(value, mx.array):
        return value
    if hasattr(value, "value") and isinstance(value.value, mx.array):
        found: mx.array = value.value
        return found
    if isinstance(value, int | float):
        return mx.array(value, dtype)
    return mx.array(np.asarray(value, np.float32))


def at(change: Intervention, positions: Positions | None) -> Intervention:
    """The same at other positions."""
    return replace(change, positions=positions)
