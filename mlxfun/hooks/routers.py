"""Proxies for routers and expert lists whose results no leaf module computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.device.batch_size import routed_rows
from mlxfun.model.live_experts import LiveExperts

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tap(Protocol):
    """What the stand-ins need of mlxfun.hooks.routing.LayerTap."""

    experts: LiveExperts
    present: mx.array | None
    observed: bool

    @property
    def layer(self) -> MoELayer: ...
    @property
    def watches_logits(self) -> bool: ...
    @property
    def bias(self) -> mx.array | None: ...
    def open(
        self, x: mx.array, indices: mx.array, y: mx.array, mapped: mx.array | None = None
    ) -> None: ...
    def complete(self, weights: mx.array) -> None: ...
    def saw_router(self, weights: mx.array) -> None: ...
    def multiplied(self, factor: mx.array) -> None: ...
    def saw_logits(self, x: mx.array, logits: mx.array) -> mx.array: ...
    def routed_logits(self) -> mx.array: ...


def hook_layer(hooks: Hooks, tap: Tap) -> None:
    """What is hooked of one layer."""
    layer = tap.layer
    # Not required one by one: what a recording misses is noticed when it is drained.
    if layer.experts_list:
        list_block(hooks, tap)
    else:
        hooks.on_call(layer.experts, _experts(tap), required=False)
    if layer.router_kind == "weight":
        hooks.on_attribute(
            layer.logits, "weight", lambda own: GateWeight(own, tap) if tap.watches_logits else own
        )
    else:
        hooks.on_call(layer.logits, _logits(tap), required=False)
    if layer.facts.weights_from_router:
        hooks.on_call(layer.router, _router(tap), required=False)
    if layer.bias_owner is not None and layer.bias_name is not None:
        hooks.on_attribute(
            layer.bias_owner, layer.bias_name, lambda own: own if tap.bias is None else tap.bias
        )


def _experts(tap: Tap) -> Callable[..., mx.array]:
    """SwitchGLU/SwitchMLP: map indices, record, and make the output tell its weights."""
    product = product_class(tap)
    most = routed_rows()

    def call(own: Any, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        rows = tap.experts.mapped(indices)
        if most is not None and rows.size > most:
            y = in_parts(lambda x, rows: own(x, rows, *args, **kwargs), x, rows, most)
        else:
            y = own(x, rows, *args, **kwargs)
        if tap.observed:
            tap.open(x, indices, y, rows)
        if tap.observed or tap.present is not None:
            y.__class__ = product
        return y

    return call


def in_parts(
    run: Callable[[mx.array, mx.array], mx.array], x: mx.array, rows: mx.array, most: int
) -> mx.array:
    """Expert outputs [..., T, K, D] of tokens x [..., T, D] at `rows` [..., T, K], of so many tokens
    at once that at most `most` rows of experts are computed. For sequences longer than a device can
    take: batches of shorter ones are made to fit ahead of the forward.
    """
    tokens = rows.shape[-2]
    if x.ndim != rows.ndim or x.shape[-2] != tokens:
        return run(x, rows)
    each = max(1, most // (rows.size // tokens))
    parts = range(0, tokens, each)
    return mx.concatenate(
        [run(x[..., at : at + each, :], rows[..., at : at + each, :]) for at in parts], axis=-3
    )


def _logits(tap: Tap) -> Callable[[Any, mx.array], mx.array]:
    """A module whose output is the logits."""

    def call(own: Any, x: mx.array) -> mx.array:
        logits: mx.array = own(x)
        return tap.saw_logits(x, logits) if tap.watches_logits else logits

    return call


def _router(tap: Tap) -> Callable[..., Any]:
    """A gate module that returns (indices, weights)."""

    def call(own: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        tap.saw_router(result[1])
        return result

    return call


def without_absent(weights: mx.array, present: mx.array) -> mx.array:
    """`weights` [..., K] with those of absent experts 0, and the others grown to the same sum.

    present: bool [..., K]. A token without any present expert keeps no weight.
    """
    kept = mx.where(present, weights, mx.zeros_like(weights))
    left = kept.sum(axis=-1, keepdims=True)
    whole = weights.sum(axis=-1, keepdims=True)
    return kept * (whole / mx.where(left == 0, mx.ones_like(left), left))


def product_class(tap: Tap) -> type[mx.array]:
    """An `mx.array` subclass that notes the operand of `y * w[..., None]` in the open record, and
    takes the weights of experts that are left out away from it."""

    times, reflected_times = mx.array.__mul__, mx.array.__rmul__

    def noted(y: mx.array, other: Any) -> Any:
        if isinstance(other, mx.array) and other.ndim == y.ndim and other.shape[-1] == 1:
            present = tap.present
            if present is not None:
                tap.present = None
                other = without_absent(other[..., 0], present)[..., None]
            tap.multiplied(other)
        return other

    def multiply(self: mx.array, other: Any) -> mx.array:
        return times(self, noted(self, other))

    def reflected(self: mx.array, other: Any) -> mx.array:
        return reflected_times(self, noted(self, other))

    def astype(self: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        result = mx.array.astype(self, *args, **kwargs)
        result.__class__ = product
        return result

    product: type[mx.array] = type(
        "ExpertOutput",
        (mx.array,),
        {"__slots__": (), "__mul__": multiply, "__rmul__": reflected, "astype": astype},
    )
    return product


class SeesLogits(Protocol):
    """Who the logits of a gate pass."""

    def saw_logits(self, x: mx.array, logits: mx.array) -> mx.array: ...


class GateWeight:
    """Stands for a gate's weight in `x @ weight.T`, so that the product passes the tap."""

    def __init__(self, weight: mx.array, tap: SeesLogits) -> None:
        self._weight, self._tap = weight, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)

    def astype(self, dtype: mx.Dtype) -> GateWeight:
        """The same in another dtype."""
        return GateWeight(self._weight.astype(dtype), self._tap)

    @property
    def T(self) -> mx.array:  # noqa: N802 - the name that gates use
        """The transposed weight, whose product is the logits."""
        tap, plain = self._tap, self._weight.T

        def product(_: mx.array, x: mx.array) -> mx.array:
            return tap.saw_logits(x, x @ plain)

        # Python asks the right operand first when its class is a subclass of the left one's.
        watched = self._weight.T
        watched.__class__ = type(
            "GateWeight", (mx.array,), {"__slots__": (), "__rmatmul__": product}
        )
        return watched


# -- dbrx -------------------------------------------------------------------------------------


def list_block(hooks: Hooks, tap: Tap) -> None:
    """Hook a block that calls `self.experts[e](x)` per token and place (dbrx)."""
    calls: list[tuple[int, mx.array]] = []  # (position among the live, output), in order

    def experts(own: list[nn.Module]) -> Any:
        mapped = tap.experts.index_map is not None
        return ExpertList(own, tap, calls) if mapped or tap.observed else own

    def block(own: Any, x: mx.array) -> mx.array:
        if not tap.observed:
            plain: mx.array = own(x)
            return plain
        calls.clear()
        out: mx.array = own(x)
        _record(tap, x, calls)
        calls.clear()
        return out

    hooks.on_attribute(tap.layer.block, "experts", experts)
    hooks.on_call(tap.layer.block, block, required=False)


def _record(tap: Tap, x: mx.array, calls: Sequence[tuple[int, mx.array]]) -> None:
    shape = (*x.shape[:-1], tap.layer.top_k)
    indices = mx.array([e for e, _ in calls], dtype=mx.uint32).reshape(shape)
    y = mx.stack([out for _, out in calls]).reshape(*shape, x.shape[-1])
    logits = tap.routed_logits()
    tap.open(x, indices, y)
    # The same operations in the same order as the block's own (l1-renormalised softmax).
    gates = mx.softmax(logits.reshape(*x.shape[:-1], -1).astype(mx.float32), axis=-1)
    scores = mx.take_along_axis(gates, indices, axis=-1)
    scores = scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)
    tap.complete(scores.astype(x.dtype))


class ExpertList:
    """A list of experts that maps indices and notes every call."""

    def __init__(
        self, experts: list[nn.Module], tap: Tap, calls: list[tuple[int, mx.array]]
    ) -> None:
        self._experts, self._tap, self._calls = experts, tap, calls

    def __len__(self) -> int:
        return len(self._tap.experts.rows)

    def __getitem__(self, index: int) -> Callable[[mx.array], mx.array]:
        expert = self._experts[self._tap.experts.rows[index]]
        if not self._tap.observed:
            return expert

        def call(x: mx.array) -> mx.array:
            y: mx.array = expert(x)
            self._calls.append((index, y))
            return y

        return call
